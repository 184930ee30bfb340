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
  __device__ __forceinline__ FusedTickets(const FusedLayerArgs& args, const FusedShared& layout,
                                          uint32_t shared)
      : args_(args), list_(shared + layout.token_tiles) {}

  /// Lists the token tiles in shared memory, before anything else. By one warp.
  __device__ __forceinline__ void list(const FusedShared& layout, uint32_t shared) {
    token_tiles_ = args_.finds_own_rows ? list_own(shared + layout.own_slots) : list_groups();
    __syncwarp();
    const bool plenty = token_tiles_ * args_.down.row_blocks >= 4 * static_cast<int>(gridDim.x);
    down_tiles_ = plenty && stages_of(args_.down) <= kFusedShortStages ? 2 : 1;
    down_tickets_ = (args_.down.row_blocks + down_tiles_ - 1) / down_tiles_;
  }

  __device__ __forceinline__ int token_tiles() const { return token_tiles_; }

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

  /// Token tile `n` of the list.
  __device__ __forceinline__ void put(int n, int expert, int first_row, int rows) const {
    ptx::st_shared_v2(list_ + n * 8, expert, first_row | rows << kRowBits);
  }

  /// From group_offsets; returns how many there are.
  __device__ __forceinline__ int list_groups() const {
    const int lane = threadIdx.x % 32, segment = (args_.experts + 31) / 32, begin = lane * segment;
    int32_t offsets[kMostSegment + 1];  // all asked for at once
#pragma unroll
    for (int i = 0; i <= kMostSegment; ++i) {
      offsets[i] = i <= segment ? args_.group_offsets[min(begin + i, args_.experts)] : 0;
    }
    int count = 0;
#pragma unroll
    for (int i = 0; i < kMostSegment; ++i) {
      if (i < segment) count += (offsets[i + 1] - offsets[i] + args_.tile_tokens - 1) / args_.tile_tokens;
    }
    int end = count;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(~0u, end, distance);
      if (lane >= distance) end += other;
    }
    int n = end - count;
#pragma unroll
    for (int i = 0; i < kMostSegment; ++i) {
      if (i >= segment) continue;
      for (int row = offsets[i]; row < offsets[i + 1]; row += args_.tile_tokens) {
        put(n++, begin + i, row, min(args_.tile_tokens, offsets[i + 1] - row));
      }
    }
    return __shfl_sync(~0u, end, 31);
  }

  /// From the router's ids, a slot a lane; writes the slot of every row beside. The rows are those that the
  /// permutation finds meanwhile: by expert, in order of their slots.
  __device__ __forceinline__ int list_own(uint32_t slots) const {
    const int lane = threadIdx.x % 32;
    bool ignored = false;
    const int expert = lane < args_.ids.slots ? args_.ids.expert_of<true>(lane, ignored) : -1;
    const uint32_t peers = __match_any_sync(~0u, expert);
    const int rank = __popc(peers & ((1u << lane) - 1u));
    const bool begins_tile = expert >= 0 && rank % args_.tile_tokens == 0;
    uint32_t lower = 0;  // slots of experts below this one's
#pragma unroll
    for (int other = 0; other < 32; ++other) {
      const int expert_of_other = __shfl_sync(~0u, expert, other);
      lower |= (expert_of_other >= 0 && expert_of_other < expert ? 1u : 0u) << other;
    }
    const uint32_t tiles = __ballot_sync(~0u, begins_tile);
    const int row = __popc(lower) + rank;
    if (expert >= 0) ptx::st_shared_f32(slots + row * 4, __int_as_float(lane));
    if (begins_tile) {
      put(__popc(lower & tiles) + rank / args_.tile_tokens, expert, row,
          min(args_.tile_tokens, __popc(peers) - rank));
    }
    return __popc(tiles);
  }

  const FusedLayerArgs& args_;
  uint32_t list_;
  int token_tiles_, down_tiles_, down_tickets_;  ///< row tiles of a ticket, tickets of a token tile
};

/// Takes tickets and queues their tiles for the CTA's other warps, a little ahead of the weights: so the
/// answer to one ticket is awaited while weights of others arrive, and no idle CTA misses a tile. A tile of
/// down waits for tiles with earlier tickets alone, which running CTAs hold, so that the kernel ends even if
/// only some of its CTAs run at a time. By one warp.
class FusedSchedule {
 public:
  __device__ __forceinline__ FusedSchedule(const FusedLayerArgs& args, const FusedShared& layout,
                                           uint32_t shared)
      : args_(args), layout_(layout), shared_(shared), tickets_(args, layout, shared) {}

  /// What needs no barrier: the first ticket is awaited while the tiles are listed.
  __device__ __forceinline__ void begin() {
    if (args_.weights_wait) ptx::griddepcontrol_wait();
    if (threadIdx.x % 32 == 0) ticket_ = atomicAdd(args_.tickets, 1);
    tickets_.list(layout_, shared_);
  }

  /// The rest, once barriers are there.
  __device__ __forceinline__ void run() {
    if (threadIdx.x % 32 != 0) return;
    ptx::st_shared_f32(shared_ + layout_.tile_count, __int_as_float(tickets_.token_tiles()));
    for (int n = 0;;) {
      FusedTile tile = tickets_.find(ticket_);
      if (tile.work.rows == 0) {
        for (int i = 0; i < kFusedFinishers; ++i) enqueue(tile, n + i);
        return;
      }
      for (const int end = tickets_.end_row_tile(tile); tile.work.row_tile < end; ++tile.work.row_tile) {
        enqueue(tile, n++);
      }
      const FusedMatrixArgs& matrix = tile.down ? args_.down : args_.gate_up;
      if (const int behind = n - (stages_of(matrix) <= kFusedShortStages ? kFusedAhead : 1); behind >= 0) {
        ptx::mbarrier_wait_parity(shared_ + layout_.nearly_asked + behind % kFusedAhead * 8,
                                  behind / kFusedAhead % 2);
      }
      ticket_ = atomicAdd(args_.tickets, 1);
    }
  }

 private:
  __device__ __forceinline__ void enqueue(const FusedTile& tile, int n) const {
    const uint32_t slot = n % kFusedQueue;
    tile.store(shared_ + layout_.queue + slot * 16);
    ptx::mbarrier_arrive(shared_ + layout_.queued + slot * 8);
  }

  const FusedLayerArgs& args_;
  const FusedShared& layout_;
  uint32_t shared_;
  FusedTickets tickets_;
  int ticket_ = 0;
};

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

/// Which row of x a row of ours is.
__device__ __forceinline__ int64_t x_row(const FusedLayerArgs& args, uint32_t own_slots, int row) {
  if (args.slot_of_row == nullptr) return row;
  const int slot =
      args.finds_own_rows ? __float_as_int(ptx::ld_shared_f32(own_slots + row * 4)) : args.slot_of_row[row];
  return slot / args.slots_of_x_row;
}

/// Rows of x for tiles of gate and up; for tiles of down those of the activation, once they are complete.
/// Some buffers take turns. Plain copies, which no bulk copy of weights is in the way of.
__device__ __forceinline__ void run_fused_tokens(const FusedLayerArgs& args, const FusedShared& layout,
                                                 uint32_t shared) {
  const int lane = threadIdx.x % 32;
  if (args.waits_for_x || !args.finds_own_rows) ptx::griddepcontrol_wait();
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
      const Bf16* from = (tile.down ? args.intermediate + row * args.activated_stride
                                    : args.x + x_row(args, shared + layout.own_slots, row) * args.x_stride) +
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
