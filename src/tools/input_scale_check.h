// Are the checkpoint's input scales sound? What staging loses with them, against what it loses with a scale a
// token.
#pragma once

#include <cstdint>
#include <span>

#include "fourfold/activations.h"
#include "fourfold/tensor.h"
#include "tools/layer_trace.h"

namespace fourfold {

/// One expert's loss.
struct ScaleLoss {
  int64_t expert = -1;  ///< index in the layer; -1 where no expert has rows
  /// Median relative L2 of a staged row, over that with a scale by token. Medians, because how one massive
  /// activation happens to round can decide a sum. Rises when scales underflow or most rows saturate.
  double median_ratio = 1.0;
  /// What lies beyond 2688 x scale, in energy, over the quantization noise with a scale by token. Rises when
  /// a few large rows saturate; no luck of rounding enters.
  double clipped_over_noise = 0.0;

  /// Error beside that with a scale by token, by either measure: noise and clipping add in energy.
  double severity() const;
};

/// The expert whose input scale does most harm beside dynamic-token staging of the same rows. `rows` [M,
/// cols] is what was staged into `staged` as `options` say (NVFP4 formats alone); `group_offsets` [E+1].
ScaleLoss worst_scale_loss(MatrixView<const Bf16> rows, const StagedBuffers& staged,
                           const LayerOptions& options, std::span<const int32_t> group_offsets);

}  // namespace fourfold
