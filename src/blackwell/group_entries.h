// The entries of the arrays in which CUTLASS's grouped kernels look up their groups: this project's own
// types, whose bytes are those of CuTe's (src/blackwell/group_types.cuh checks that), so that what writes the
// arrays does without CuTe, seconds of compilation an architecture.
#pragma once

#include <cstdint>

#include "fourfold/scale_layout.h"

namespace fourfold::blackwell {

inline constexpr int kScaleBlock = 16;

/// M, N, K.
struct ShapeEntry {
  int32_t m, n, k;
  friend constexpr bool operator==(const ShapeEntry&, const ShapeEntry&) = default;
};

/// Of a, b and d: from one row to the next, in elements.
struct StrideEntry {
  int64_t row;
  friend constexpr bool operator==(const StrideEntry&, const StrideEntry&) = default;
};

/// Scales of one matrix in the 128x4 layout: how many tiles, and the bytes from one to the next. Those of a
/// row of tiles follow one another.
struct ScaleLayoutEntry {
  int32_t row_tiles, column_tiles, matrices;
  int32_t row_tile_bytes, matrix_bytes;
  friend constexpr bool operator==(const ScaleLayoutEntry&, const ScaleLayoutEntry&) = default;
};

/// Of the scales of `rows` x `depth` values.
FOURFOLD_HOST_DEVICE constexpr ScaleLayoutEntry scale_layout_of(int32_t rows, int32_t depth) {
  constexpr auto kTileRows = int32_t{kScaleTileRows}, kTileDepth = int32_t{kScaleTileCols * kScaleBlock};
  constexpr auto kTileBytes = int32_t{kScaleTileRows * kScaleTileCols};
  const int32_t row_tiles = (rows + kTileRows - 1) / kTileRows;
  const int32_t column_tiles = (depth + kTileDepth - 1) / kTileDepth;
  const int32_t row_tile_bytes = column_tiles * kTileBytes;
  return {row_tiles, column_tiles, 1, row_tile_bytes, row_tiles * row_tile_bytes};
}

}  // namespace fourfold::blackwell
