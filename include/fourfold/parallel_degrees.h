// Into how many equal parts a layer can be cut.
#pragma once

#include <cstdint>
#include <vector>

#include "fourfold/export.h"

namespace FOURFOLD_EXPORT fourfold {

/// Degrees from 2: powers of two, and divisors of what is cut.
struct CutDegrees {
  std::vector<int64_t> clean;
  /// Of those, whose parts backends pad: not a multiple of kPaddedPart.
  std::vector<int64_t> padded;
  std::vector<int64_t> cuts_block;  ///< parts are equal, and split blocks that share a scale
  std::vector<int64_t> uneven;      ///< powers of two that do not divide it
};

/// K of a packed unit (src/cpu, src/sm90), and four scales of the 128x4 layout.
inline constexpr int64_t kPaddedPart = 64;

/// Tensor parallelism cuts I: rows of gate and up, columns of down, along which blocks of `block` lie (NVFP4
/// 16, MXFP4 32, tiles of FP8 128; 1: no blocks). Degrees up to 64.
CutDegrees tensor_parallel_degrees(int64_t intermediate, int64_t block);

/// Expert parallelism gives each rank as many experts. Degrees up to `experts`, at most 512.
CutDegrees expert_parallel_degrees(int64_t experts);

}  // namespace fourfold
