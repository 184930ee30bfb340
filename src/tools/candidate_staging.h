// Codes and block scales that a serving engine quantized activations to: whose, and in which layout?
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "tools/candidate_file.h"

namespace fourfold {

struct StagedReport {
  std::string what;       ///< "x" or "activation"
  std::string layout;     ///< of the scales, the one that fits best: "row-major", "swizzled 128x4", ...
  double distance = 0.0;  ///< of codes x scales from the values, after the best factor for all of them
  std::string runner_up_layout;  ///< the next best
  double runner_up = 0.0;
  double due = 0.0;  ///< the distance that the specified quantizer leaves

  /// Half as much again is more than another way to choose scales costs (docs/diagnosis.md).
  bool is_right() const { return distance <= 1.5 * due; }
};

/// `values` [rows, width] were quantized to `codes` U8 [rows, width/2] and `scales` (e4m3 bytes) of rows x
/// width/16 bytes, or as many as the 128x4 layout has. Throws Error for tensors of other sizes, and where the
/// width is not in blocks of 16.
StagedReport compare_staged(const std::string& what, std::span<const float> values, int64_t width,
                            const DumpedTensor& codes, const DumpedTensor& scales);

}  // namespace fourfold
