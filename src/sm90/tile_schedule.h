// Which work there is and in which order: plain functions for host and device, tested on the CPU.
//
// A work item is one tile: an expert, a tile of its weight rows, a tile of its tokens. Items are numbered by
// expert, then row tile, then token tile, so that the token tiles that share weights follow each other and
// those weights come from memory once. CTA b of a persistent grid begins with item b; then it takes one by
// ticket, or b + grid, b + 2 grid, ... where there are no tickets.
#pragma once

#include <cstdint>
#include <limits>

#include "fourfold/number_formats.h"

namespace fourfold::sm90 {

/// How a group's rows are cut into token tiles: as few as fit `most`, of equal size but for the last.
struct TokenTiling {
  int32_t tiles = 0;
  int32_t rows_per_tile = 0;  ///< a multiple of the granule, at most `most`
};

/// `most` is a multiple of `granule`. A group without rows has no tiles.
FOURFOLD_HOST_DEVICE constexpr TokenTiling tile_tokens(int32_t rows, int32_t most, int32_t granule) {
  if (rows == 0) return {};
  const int32_t tiles = (rows - 1) / most + 1;
  const int32_t even = (rows - 1) / tiles + 1;
  return {tiles, (even + granule - 1) / granule * granule};
}

/// Which experts' tiles a launch has: those with more than `above` and at most `most` rows.
struct RowBand {
  int32_t above = 0;
  int32_t most = std::numeric_limits<int32_t>::max();

  /// The rows of an expert, or none where they are not of this band.
  FOURFOLD_HOST_DEVICE constexpr int32_t of(int32_t rows) const {
    return rows > above && rows <= most ? rows : 0;
  }
};

/// One tile of work.
struct WorkTile {
  int32_t expert = 0;
  int32_t row_tile = 0;
  int32_t first_row = 0;  ///< of the token matrix
  int32_t rows = 0;       ///< tokens that are really there; 0: no tile
};

/// Item `index` of an expert whose rows are [group_begin, group_begin + group_rows).
FOURFOLD_HOST_DEVICE constexpr WorkTile work_tile(int32_t index, int32_t expert, int32_t group_begin,
                                                  int32_t group_rows, int32_t most, int32_t granule) {
  const TokenTiling tiling = tile_tokens(group_rows, most, granule);
  const int32_t row_tile = index / tiling.tiles;
  const int32_t begin = (index - row_tile * tiling.tiles) * tiling.rows_per_tile;
  const int32_t left = group_rows - begin;
  return {expert, row_tile, group_begin + begin, left < tiling.rows_per_tile ? left : tiling.rows_per_tile};
}

}  // namespace fourfold::sm90
