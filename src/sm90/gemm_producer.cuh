// The producer warp of the grouped GEMM: finds the work and keeps the pipeline full.
#pragma once

#include <cstdint>

#include "sm90/gemm_kernel_args.cuh"
#include "sm90/ptx.cuh"
#include "sm90/tile_schedule.h"

namespace fourfold::sm90 {

/// Item number -> tile, by one warp together. Each lane counts the items of a segment of neighbouring
/// experts; a look-up finds the segment, then the expert in it. Items must be asked for in ascending order to
/// be quick.
template <class Traits>
class WorkFinder {
 public:
  __device__ WorkFinder(const int32_t* group_offsets, int experts, int row_tiles)
      : offsets_(group_offsets), experts_(experts), row_tiles_(row_tiles), lane_(threadIdx.x % 32) {
    segment_ = (experts + 31) / 32;
    const int begin = min(lane_ * segment_, experts), end = min(begin + segment_, experts);
    int items = 0, row = offsets_[begin];
#pragma unroll 4
    for (int e = begin; e < end; ++e) {
      const int next_row = offsets_[e + 1];
      items += tile_tokens(next_row - row, Traits::kTokens, Traits::kGranule).tiles * row_tiles_;
      row = next_row;
    }
    segment_end_ = inclusive_sum(items);
    segment_begin_ = segment_end_ - items;
  }

  /// No rows when there are no more items.
  __device__ WorkTile find(int item) {
    if (item < expert_begin_ || item >= expert_end_) {
      if (!find_expert(item)) return {};
    }
    return work_tile(item - expert_begin_, expert_, group_begin_, group_rows_, Traits::kTokens,
                     Traits::kGranule);
  }

 private:
  static __device__ int inclusive_sum(int value) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(~0u, value, distance);
      if (threadIdx.x % 32 >= distance) value += other;
    }
    return value;
  }

  __device__ bool find_expert(int item) {
    const uint32_t holders = __ballot_sync(~0u, item >= segment_begin_ && item < segment_end_);
    if (holders == 0) return false;
    const int holder = __ffs(static_cast<int>(holders)) - 1;
    int begin = __shfl_sync(~0u, segment_begin_, holder);
    for (int first = holder * segment_;; first += 32) {
      const int e = first + lane_;
      const bool mine = e < min((holder + 1) * segment_, experts_);
      const int row = mine ? offsets_[e] : 0, rows = mine ? offsets_[e + 1] - row : 0;
      const int items = tile_tokens(rows, Traits::kTokens, Traits::kGranule).tiles * row_tiles_;
      const int end = begin + inclusive_sum(items);
      const uint32_t hit = __ballot_sync(~0u, item >= end - items && item < end);
      if (hit != 0) {
        const int source = __ffs(static_cast<int>(hit)) - 1;
        expert_ = first + source;
        expert_begin_ = __shfl_sync(~0u, end - items, source);
        expert_end_ = __shfl_sync(~0u, end, source);
        group_begin_ = __shfl_sync(~0u, row, source);
        group_rows_ = __shfl_sync(~0u, rows, source);
        return true;
      }
      begin = __shfl_sync(~0u, end, 31);
    }
  }

  const int32_t* offsets_;
  int experts_, row_tiles_, lane_, segment_;
  int segment_begin_, segment_end_;  ///< items of this lane's experts
  int expert_ = 0, expert_begin_ = 0, expert_end_ = 0, group_begin_ = 0, group_rows_ = 0;
};

/// What to load next.
struct StageCursor {
  int item = 0;
  int step = 0;  ///< stage of the tile: kDepthParts k units
  WorkTile tile;
};

template <class Traits>
class Producer {
 public:
  __device__ Producer(const GemmKernelArgs& args, const TokenMaps& maps, uint32_t shared)
      : args_(args),
        maps_(maps),
        shared_(shared),
        steps_((args.depth_units + Traits::kDepthParts - 1) / Traits::kDepthParts),
        leader_(threadIdx.x % 32 == 0),
        finder_(args.group_offsets, args.experts,
                (args.row_blocks + Traits::kTileBlocks - 1) / Traits::kTileBlocks) {}

  /// Runs the whole warp until every tile of this CTA is on its way, then posts the end.
  __device__ void run() {
    StageCursor cursor{static_cast<int>(blockIdx.x), 0, finder_.find(blockIdx.x)};
    const uint64_t policy = ptx::createpolicy_evict_first();
    prefetch(cursor, policy);
    while (cursor.tile.rows > 0) {
      if (leader_) {
        ptx::mbarrier_wait_parity(empty_barrier(), phase_ ^ 1u);
        announce(cursor, slot_);
        load_weights(cursor, slot_, policy);
        load_tokens(cursor, slot_);
      }
      advance(cursor);
      next_slot();
    }
    if (leader_) {
      ptx::mbarrier_wait_parity(empty_barrier(), phase_ ^ 1u);
      announce_end();
    }
  }

 private:
  /// Fills the pipeline with weights while the kernel before this one may still write the tokens.
  __device__ void prefetch(StageCursor& cursor, uint64_t policy) {
    StageCursor ahead = cursor;
    int filled = 0;
    for (; filled < Traits::kStages && ahead.tile.rows > 0; ++filled) {
      if (leader_) {
        announce(ahead, filled);
        load_weights(ahead, filled, policy);
      }
      advance(ahead);
    }
    ptx::griddepcontrol_wait();
    ptx::griddepcontrol_launch_dependents();
    for (int slot = 0; slot < filled; ++slot) {
      if (leader_) load_tokens(cursor, slot);
      advance(cursor);
      next_slot();
    }
  }

  __device__ void advance(StageCursor& cursor) {
    if (++cursor.step < steps_) return;
    cursor.step = 0;
    cursor.item += static_cast<int>(gridDim.x);
    cursor.tile = finder_.find(cursor.item);
  }

  __device__ void next_slot() {
    if (++slot_ == Traits::kStages) {
      slot_ = 0;
      phase_ ^= 1u;
    }
  }

  __device__ uint32_t empty_barrier() const { return shared_ + Traits::kEmptyOffset + slot_ * 8; }
  __device__ uint32_t full_barrier(int slot) const { return shared_ + Traits::kFullOffset + slot * 8; }
  __device__ int units_of(const StageCursor& cursor) const {
    return min(Traits::kDepthParts, args_.depth_units - cursor.step * Traits::kDepthParts);
  }
  /// Token rows to load: what is there, in whole granules.
  __device__ static int padded_rows(const WorkTile& tile) {
    return (tile.rows + Traits::kGranule - 1) / Traits::kGranule * Traits::kGranule;
  }

  /// Tells the consumers which tile the stage belongs to, and how many bytes it will have.
  __device__ void announce(const StageCursor& cursor, int slot) {
    ptx::st_shared_v4(shared_ + Traits::kTileOffset + slot * 16, cursor.tile.expert, cursor.tile.row_tile,
                      cursor.tile.first_row, cursor.tile.rows);
    const int token_bytes = padded_rows(cursor.tile) * kUnitDepth * 2 * Traits::kTerms;
    const int weight_bytes = Traits::kTileBlocks * kUnitBytes;
    ptx::mbarrier_arrive_expect_tx(full_barrier(slot), units_of(cursor) * (token_bytes + weight_bytes));
  }

  __device__ void announce_end() {
    ptx::st_shared_v4(shared_ + Traits::kTileOffset + slot_ * 16, 0, 0, 0, 0);
    ptx::mbarrier_arrive(full_barrier(slot_));
  }

  __device__ void load_weights(const StageCursor& cursor, int slot, uint64_t policy) {
    const int64_t row_bytes = int64_t{args_.depth_units} * kUnitBytes;
    const uint8_t* expert = args_.packed + cursor.tile.expert * args_.packed_bytes_per_expert +
                            int64_t{cursor.step} * Traits::kDepthParts * kUnitBytes;
    const uint32_t to = shared_ + Traits::kWeightOffset + slot * Traits::kWeightStageBytes;
    const int bytes = units_of(cursor) * kUnitBytes;
#pragma unroll
    for (int b = 0; b < Traits::kTileBlocks; ++b) {
      // The last tile may have fewer blocks: its last one again, for rows that nobody will store.
      const int block = min(cursor.tile.row_tile * Traits::kTileBlocks + b, args_.row_blocks - 1);
      ptx::cp_async_bulk(to + b * Traits::kDepthParts * kUnitBytes, expert + block * row_bytes, bytes,
                         full_barrier(slot), policy);
    }
  }

  __device__ void load_tokens(const StageCursor& cursor, int slot) {
    const int rows = padded_rows(cursor.tile), units = units_of(cursor);
    for (int unit = 0; unit < units; ++unit) {
      const int x = (cursor.step * Traits::kDepthParts + unit) * kUnitDepth;
      for (int term = 0; term < Traits::kTerms; ++term) {
        const uint32_t to = shared_ + slot * Traits::kTokenStageBytes +
                            (term * Traits::kDepthParts + unit) * Traits::kTokenBoxBytes;
        for (int row = 0; row < rows;) {
          const bool large = rows - row >= Traits::kLargeBox;
          ptx::cp_async_bulk_tensor_2d(to + row * kUnitDepth * 2,
                                       large ? &maps_.large[term] : &maps_.small[term], x,
                                       cursor.tile.first_row + row, full_barrier(slot));
          row += large ? Traits::kLargeBox : Traits::kGranule;
        }
      }
    }
  }

  const GemmKernelArgs& args_;
  const TokenMaps& maps_;
  uint32_t shared_;
  int steps_;
  bool leader_;
  WorkFinder<Traits> finder_;
  int slot_ = 0;
  uint32_t phase_ = 0;
};

}  // namespace fourfold::sm90
