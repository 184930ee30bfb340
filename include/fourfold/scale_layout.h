// The 128x4 scale-factor layout ("swizzled", "to_blocked", 32_4_4) that block-scaled tensor cores read.
//
// Scales of shape (rows, k_sf), rows = M or N, k_sf = K/16, are zero-padded to multiples of 128 and 4 and cut
// into tiles of 128 x 4 = 512 bytes, tiles row-major. docs/formats.md, section 2, tells the traps.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "fourfold/export.h"
#include "fourfold/tensor.h"

namespace FOURFOLD_EXPORT fourfold {

inline constexpr int64_t kScaleTileRows = 128;
inline constexpr int64_t kScaleTileCols = 4;

FOURFOLD_HOST_DEVICE constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

/// Bytes of one swizzled matrix of `rows` x `k_sf` scales, padding included.
FOURFOLD_HOST_DEVICE constexpr int64_t swizzled_scale_bytes(int64_t rows, int64_t k_sf) {
  return round_up(rows, kScaleTileRows) * round_up(k_sf, kScaleTileCols);
}

/// Byte offset of scale (row, col) in a swizzled matrix with `k_sf` scales a row before padding.
FOURFOLD_HOST_DEVICE constexpr int64_t swizzled_scale_offset(int64_t row, int64_t col, int64_t k_sf) {
  const int64_t tile =
      row / kScaleTileRows * (round_up(k_sf, kScaleTileCols) / kScaleTileCols) + col / kScaleTileCols;
  return tile * (kScaleTileRows * kScaleTileCols) + row % 32 * 16 + row % kScaleTileRows / 32 * 4 +
         col % kScaleTileCols;
}

/// Throws Error unless `group_offsets` [G+1] ascends from 0 to `rows`.
void validate_group_offsets(std::span<const int32_t> group_offsets, int64_t rows);

/// First padded row of every group of the activation side, and their total: groups are padded to 128 rows
/// each. `group_offsets` [G+1] -> [G+1].
std::vector<int64_t> padded_group_rows(std::span<const int32_t> group_offsets);

/// One matrix: `scales` [rows, k_sf] -> swizzled bytes, padding written as zero.
std::vector<uint8_t> swizzle_scales(MatrixView<const uint8_t> scales);

/// The reverse of swizzle_scales: -> [rows, k_sf] row-major. Throws Error when `swizzled` has another size.
std::vector<uint8_t> unswizzle_scales(std::span<const uint8_t> swizzled, int64_t rows, int64_t k_sf);

/// Activation side ("2D"): `scales` [M, k_sf] in groups of rows; each group is padded and swizzled on its
/// own, the results are concatenated.
std::vector<uint8_t> swizzle_scale_groups(MatrixView<const uint8_t> scales,
                                          std::span<const int32_t> group_offsets);

/// Weight side ("3D"): `scales` [experts x rows, k_sf], expert after expert; each is padded and swizzled on
/// its own.
/// -> (experts, swizzled_scale_bytes(rows, k_sf)).
std::vector<uint8_t> swizzle_expert_scales(MatrixView<const uint8_t> scales, int64_t experts);

/// Weight side from checkpoints that store the transpose (ModelOpt's fused exports): `scales`
/// [experts x k_sf, rows], each expert (K_sf, N). Feeding such an array to swizzle_expert_scales crashes
/// nothing and ruins the model.
std::vector<uint8_t> swizzle_expert_scales_from_transposed(MatrixView<const uint8_t> scales, int64_t experts);

}  // namespace fourfold
