// The producer warps of the fused layer kernel: one takes tickets, one keeps the ring full of weights, one
// brings the token rows of the same tiles.
#pragma once

#include <cstdint>

#include "sm90/fused_layer_args.cuh"
#include "sm90/fused_layer_layout.h"
#include "sm90/ptx.cuh"
#include "sm90/tile_schedule.h"

namespace fourfold::sm90 {

/// A tile as it travels through shared memory. No rows: the end, and then `expert` is 1 where there was no
/// tile at all, for no CTA.
struct FusedTile {
  WorkTile work;
  bool down;

  __device__ __forceinline__ void store(uint32_t address) const {
    ptx::st_shared_v4(address, work.expert, work.row_tile, work.first_row, work.rows | (down ? kDown : 0));
  }
  static __device__ __forceinline__ FusedTile load(uint32_t address) {
    const uint4 words = ptx::ld_shared_v4(address);
    return {{static_cast<int32_t>(words.x), static_cast<int32_t>(words.y), static_cast<int32_t>(words.z),
             static_cast<int32_t>(words.w & ~uint32_t{kDown})},
            (words.w & kDown) != 0};
  }

 private:
  static constexpr int kDown = 1 << 16;
};

/// Of a tile.
__device__ __forceinline__ int stages_of(const FusedMatrixArgs& matrix) {
  return (matrix.depth_units + kFusedParts - 1) / kFusedParts;
}

/// The tiles of the whole grid, and which of them a ticket stands for. Tiles are numbered by token tile, then
/// by row tile; those of gate and up have the first tickets.
class FusedTickets {
 public:
  /// Lists the token tiles in shared memory. By one warp.
  __device__ __forceinline__ FusedTickets(const FusedLayerArgs& args, const FusedShared& layout,
                                          uint32_t shared)
      : args_(args), list_(shared + layout.token_tiles) {
    const int lane = threadIdx.x % 32, segment = (args.experts + 31) / 32, begin = lane * segment;
    int32_t offsets[kMostSegment + 1];  // all asked for at once
#pragma unroll
    for (int i = 0; i <= kMostSegment; ++i) {
      offsets[i] = i <= segment ? args.group_offsets[min(begin + i, args.experts)] : 0;
    }
    int count = 0;
#pragma unroll
    for (int i = 0; i < kMostSegment; ++i) {
      if (i < segment) count += (offsets[i + 1] - offsets[i] + args.tile_tokens - 1) / args.tile_tokens;
    }
    int end = count;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(~0u, end, distance);
      if (lane >= distance) end += other;
    }
    uint32_t to = list_ + (end - count) * 8;
#pragma unroll
    for (int i = 0; i < kMostSegment; ++i) {
      if (i >= segment) continue;
      for (int row = offsets[i]; row < offsets[i + 1]; row += args.tile_tokens, to += 8) {
        ptx::st_shared_v2(to, begin + i, row | min(args.tile_tokens, offsets[i + 1] - row) << kRowBits);
      }
    }
    __syncwarp();
    token_tiles_ = __shfl_sync(~0u, end, 31);
    const bool plenty = token_tiles_ * args.down.row_blocks >= 4 * static_cast<int>(gridDim.x);
    down_tiles_ = plenty && stages_of(args.down) <= kFusedShortStages ? 2 : 1;
    down_tickets_ = (args.down.row_blocks + down_tiles_ - 1) / down_tiles_;
  }

  __device__ __forceinline__ int token_tiles() const {
    return token_tiles_;
  }

  /// The ticket's first tile; no rows when there are no more.
  __device__ __forceinline__ FusedTile find(int ticket) const {
    const int first_down = token_tiles_ * args_.gate_up.row_blocks;
    const bool down = ticket >= first_down;
    const int index = down ? ticket - first_down : ticket,
              each = down ? down_tickets_ : args_.gate_up.row_blocks;
    const int token_tile = index / each;
    if (token_tile >= token_tiles_) return {{token_tiles_ == 0 ? 1 : 0}, false};
    const uint2 words = ptx::ld_shared_v2(list_ + token_tile * 8);
    const int row_tile = (index - token_tile * each) * (down ? down_tiles_ : 1);
    return {{static_cast<int32_t>(words.x), row_tile, static_cast<int32_t>(words.y & ((1u << kRowBits) - 1)),
             static_cast<int32_t>(words.y >> kRowBits)},
            down};
  }

  /// One beyond the ticket's last row tile.
  __device__ __forceinline__ int end_row_tile(const FusedTile& first) const {
    return first.down ? min(first.work.row_tile + down_tiles_, args_.down.row_blocks)
                      : first.work.row_tile + 1;
  }

 private:
  static constexpr int kMostSegment = kFusedMostExperts / 32;
  static constexpr int kRowBits = 16;

  const FusedLayerArgs& args_;
  uint32_t list_;
  int token_tiles_, down_tiles_, down_tickets_;  ///< row tiles of a ticket, tickets of a token tile
};

/// Takes tickets and queues their tiles for the CTA's other warps, a little ahead of the weights: so the
/// answer to one ticket is awaited while weights of others arrive, and no idle CTA misses a tile. A tile of
/// down waits for tiles with earlier tickets alone, which running CTAs hold, so that the kernel ends even if
/// only some of its CTAs run at a time.
__device__ __forceinline__ void run_fused_schedule(const FusedLayerArgs& args, const FusedShared& layout,
                                                   uint32_t shared) {
  const int lane = threadIdx.x % 32;
  if (args.weights_wait) ptx::griddepcontrol_wait();
  int ticket = lane == 0 ? atomicAdd(args.tickets, 1) : 0;
  const FusedTickets tickets(args, layout, shared);
  if (lane != 0) return;
  ptx::st_shared_f32(shared + layout.tile_count, __int_as_float(tickets.token_tiles()));
  const auto enqueue = [&](const FusedTile& tile, int n) {
    const uint32_t slot = n % kFusedQueue;
    tile.store(shared + layout.queue + slot * 16);
    ptx::mbarrier_arrive(shared + layout.queued + slot * 8);
  };
  for (int n = 0;;) {
    FusedTile tile = tickets.find(ticket);
    if (tile.work.rows == 0) {
      for (int i = 0; i < kFusedFinishers; ++i) enqueue(tile, n + i);
      return;
    }
    for (const int end = tickets.end_row_tile(tile); tile.work.row_tile < end; ++tile.work.row_tile) {
      enqueue(tile, n++);
    }
    const FusedMatrixArgs& matrix = tile.down ? args.down : args.gate_up;
    if (const int behind = n - (stages_of(matrix) <= kFusedShortStages ? kFusedAhead : 1); behind >= 0) {
      ptx::mbarrier_wait_parity(shared + layout.nearly_asked + behind % kFusedAhead * 8,
                                behind / kFusedAhead % 2);
    }
    ticket = atomicAdd(args.tickets, 1);
  }
}

/// Tile n of this CTA, once it is queued.
__device__ __forceinline__ FusedTile wait_for_tile(const FusedShared& layout, uint32_t shared, int n) {
  const uint32_t slot = n % kFusedQueue;
  ptx::mbarrier_wait_parity(shared + layout.queued + slot * 8, n / kFusedQueue % 2);
  return FusedTile::load(shared + layout.queue + slot * 16);
}

/// Keeps the ring full of weights. One thread.
__device__ __forceinline__ void run_fused_weights(const FusedLayerArgs& args, const FusedShared& layout,
                                                  uint32_t shared) {
  const uint64_t policy = ptx::createpolicy_evict_first();
  int stage = 0;
  uint32_t phase = 0;
  for (int n = 0;; ++n) {
    const FusedTile tile = wait_for_tile(layout, shared, n);
    const bool ends = tile.work.rows == 0;
    const FusedMatrixArgs& matrix = tile.down ? args.down : args.gate_up;
    const uint8_t* from = matrix.packed + tile.work.expert * matrix.packed_bytes_per_expert +
                          int64_t{tile.work.row_tile} * matrix.depth_units * kUnitBytes;
    const int ask_at = matrix.depth_units - max(stages_of(matrix) - kFusedAheadStages, 0) * kFusedParts;
    for (int left = ends ? 1 : matrix.depth_units; left > 0; left -= kFusedParts) {
      const uint32_t full = shared + layout.full + stage * 8;
      ptx::mbarrier_wait_parity(shared + layout.empty + stage * 8, phase ^ 1u);
      tile.store(shared + layout.stage_tiles + stage * 16);
      if (ends) return ptx::mbarrier_arrive(full);
      if (left == ask_at) ptx::mbarrier_arrive(shared + layout.nearly_asked + n % kFusedAhead * 8);
      const int bytes = min(kFusedParts, left) * kUnitBytes;
      ptx::mbarrier_arrive_expect_tx(full, bytes);
      ptx::cp_async_bulk(shared + stage * kFusedStageBytes, from, bytes, full, policy);
      from += bytes;
      if (++stage == args.stages) {
        stage = 0;
        phase ^= 1u;
      }
    }
  }
}

/// Where a row of ours is in x, in elements.
__device__ __forceinline__ int64_t x_row(const FusedLayerArgs& args, int row) {
  return (args.slot_of_row != nullptr ? args.slot_of_row[row] / args.slots.top_k : row) * args.x_stride;
}

/// Rows of x for tiles of gate and up; for tiles of down those of the activation, once they are complete.
/// Some buffers take turns. Plain copies, which no bulk copy of weights is in the way of.
__device__ __forceinline__ void run_fused_tokens(const FusedLayerArgs& args, const FusedShared& layout,
                                                 uint32_t shared) {
  const int lane = threadIdx.x % 32;
  ptx::griddepcontrol_wait();
  int buffer = 0, complete_row = -1;
  uint32_t phase = 0;
  for (int n = 0;; ++n) {
    const FusedTile tile = wait_for_tile(layout, shared, n);
    if (tile.work.rows == 0) return;
    ptx::mbarrier_wait_parity(shared + layout.tokens_empty + buffer * 8, phase ^ 1u);
    if (tile.down && tile.work.first_row != complete_row) {
      complete_row = tile.work.first_row;
      const int32_t* done = args.activated_tiles + complete_row;
      while (ptx::ld_acquire_gpu(done) < args.gate_up.row_blocks) {
      }
    }
    const FusedMatrixArgs& matrix = tile.down ? args.down : args.gate_up;
    const uint32_t row_bytes = FusedShared::row_bytes(matrix.depth_units);
    uint32_t to = shared + layout.tokens + buffer * layout.token_buffer_bytes + lane * 16;
    for (int row = tile.work.first_row; row < tile.work.first_row + tile.work.rows; ++row, to += row_bytes) {
      const Bf16* from =
          (tile.down ? args.intermediate + row * args.activated_stride : args.x + x_row(args, row)) +
          lane * 8;
      for (int left = matrix.depth_units * (kUnitDepth / 8) - lane, i = 0; left > 0; left -= 32, ++i) {
        ptx::cp_async_cg_16(to + i * 512, from + i * 256);
      }
    }
    ptx::cp_async_mbarrier_arrive_noinc(shared + layout.tokens_full + buffer * 8);
    if (++buffer == args.token_buffers) {
      buffer = 0;
      phase ^= 1u;
    }
  }
}

}  // namespace fourfold::sm90
