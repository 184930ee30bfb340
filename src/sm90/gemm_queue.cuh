// The tiles of a CTA on their way, through shared memory, from the warp that finds them to all others.
//
// A tile's place is free when the finder comes round to it: it looks for tile n + 1 when a stage of tile n is
// about to be filled, kStages after one that all readers have released, of tile n - kStages or a later one.
#pragma once

#include <cstdint>

#include "sm90/gemm_kernel_args.cuh"
#include "sm90/ptx.cuh"
#include "sm90/tile_schedule.h"

namespace fourfold::sm90 {

/// The CTA's n-th tile; no rows: the end. By one thread.
template <class Traits>
__device__ __forceinline__ void post_tile(uint32_t shared, int n, const WorkTile& tile) {
  const int place = n % Traits::kQueuedTiles;
  ptx::st_shared_v4(shared + Traits::kQueueOffset + place * 16, tile.expert, tile.row_tile, tile.first_row,
                    tile.rows);
  ptx::mbarrier_arrive(shared + Traits::kQueuedOffset + place * 8);
}

/// For a reader that knows the tile to be there, because a stage of it is.
template <class Traits>
__device__ __forceinline__ WorkTile posted_tile(uint32_t shared, int n) {
  const uint4 words = ptx::ld_shared_v4(shared + Traits::kQueueOffset + n % Traits::kQueuedTiles * 16);
  return {static_cast<int32_t>(words.x), static_cast<int32_t>(words.y), static_cast<int32_t>(words.z),
          static_cast<int32_t>(words.w)};
}

template <class Traits>
__device__ __forceinline__ WorkTile wait_for_tile(uint32_t shared, int n) {
  ptx::mbarrier_wait_parity(shared + Traits::kQueuedOffset + n % Traits::kQueuedTiles * 8,
                            n / Traits::kQueuedTiles % 2);
  return posted_tile<Traits>(shared, n);
}

/// Between the finder and who loads token rows: those of the CTA's n-th tile are there.
template <class Traits>
__device__ __forceinline__ void post_ready(uint32_t shared, int n) {
  ptx::mbarrier_arrive(shared + Traits::kReadyOffset + n % Traits::kQueuedTiles * 8);
}
template <class Traits>
__device__ __forceinline__ void wait_until_ready(uint32_t shared, int n) {
  ptx::mbarrier_wait_parity(shared + Traits::kReadyOffset + n % Traits::kQueuedTiles * 8,
                            n / Traits::kQueuedTiles % 2);
}

/// Between the consumers and the finder: this thread's part of the n-th tile is written. Two barriers take
/// turns, as the consumers may be a tile ahead.
template <class Traits>
__device__ __forceinline__ void post_written(uint32_t shared, int n) {
  ptx::mbarrier_arrive(shared + Traits::kWrittenOffset + n % 2 * 8);
}
template <class Traits>
__device__ __forceinline__ void wait_until_written(uint32_t shared, int n) {
  ptx::mbarrier_wait_parity(shared + Traits::kWrittenOffset + n % 2 * 8, n / 2 % 2);
}

}  // namespace fourfold::sm90
