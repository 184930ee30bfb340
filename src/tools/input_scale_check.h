// Are the checkpoint's input scales sound? What staging loses with them, against what it loses with a scale a
// token.
#pragma once

#include <cstdint>
#include <span>

#include "fourfold/activations.h"
#include "fourfold/tensor.h"
#include "tools/layer_trace.h"

namespace fourfold {

/// One expert's loss. Medians over its rows: a single massive activation does not decide.
struct ScaleLoss {
  int64_t expert = -1;      ///< index in the layer; -1 where no expert has rows
  double with_scale = 0.0;  ///< median relative L2 of a staged row
  double with_token_scale = 0.0;

  double ratio() const { return with_token_scale > 0.0 ? with_scale / with_token_scale : 1.0; }
};

/// The expert whose staged rows lose most beside dynamic-token staging of the same rows. `rows` [M, cols] is
/// what was staged into `staged` as `format` (NVFP4 formats alone); `group_offsets` [E+1].
ScaleLoss worst_scale_loss(MatrixView<const Bf16> rows, const StagedBuffers& staged, ActivationFormat format,
                           std::span<const int32_t> group_offsets);

}  // namespace fourfold
