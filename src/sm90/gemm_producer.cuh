// The producer warps of the grouped GEMM: one finds the tiles, one keeps the pipeline full of their weights,
// one of token rows, or two where they gather them.
#pragma once

#include <cstdint>

#include "sm90/gemm_kernel_args.cuh"
#include "sm90/gemm_queue.cuh"
#include "sm90/ptx.cuh"
#include "sm90/tile_schedule.h"

namespace fourfold::sm90 {

/// Item number -> tile, by one warp together. Each lane counts the items of a segment of neighbouring
/// experts; a look-up finds the segment, then the expert in it. Items must be asked for in ascending order to
/// be quick.
template <class Traits>
class WorkFinder {
 public:
  __device__ WorkFinder(const int32_t* group_offsets, int experts, RowBand band, int row_tiles)
      : offsets_(group_offsets),
        experts_(experts),
        row_tiles_(row_tiles),
        lane_(threadIdx.x % 32),
        band_(band) {
    segment_ = (experts + 31) / 32;
    const int begin = min(lane_ * segment_, experts), end = min(begin + segment_, experts);
    int items = 0, row = offsets_[begin];
#pragma unroll 4
    for (int e = begin; e < end; ++e) {
      const int next_row = offsets_[e + 1];
      items += tile_tokens(band_.of(next_row - row), Traits::kTokens, Traits::kGranule).tiles * row_tiles_;
      row = next_row;
    }
    segment_end_ = inclusive_sum(items);
    segment_begin_ = segment_end_ - items;
  }

  /// Of the expert of the tile that was found last.
  __device__ int expert_rows() const {
    return group_rows_;
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
      const int row = mine ? offsets_[e] : 0, rows = mine ? band_.of(offsets_[e + 1] - row) : 0;
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
  RowBand band_;
  int segment_begin_, segment_end_;  ///< items of this lane's experts
  int expert_ = 0, expert_begin_ = 0, expert_end_ = 0, group_begin_ = 0, group_rows_ = 0;
};

/// What the producer warps do: walk the tiles of this CTA, and the stages of each.
template <class Traits>
class Producer {
 public:
  __device__ Producer(const GemmKernelArgs& args, const TokenMaps& maps, uint32_t shared)
      : args_(args), maps_(maps), shared_(shared) {}

  /// Finds the tiles of this CTA, each while the weights of the one before are still asked for. One warp.
  /// Beside that, it counts what is written, and waits for what is to be read.
  __device__ void run_schedule() {
    WorkFinder<Traits> finder(args_.group_offsets, args_.experts, args_.band,
                              (args_.row_blocks + Traits::kTileBlocks - 1) / Traits::kTileBlocks);
    WorkTile before;
    for (int n = 0, item = static_cast<int>(blockIdx.x);; ++n) {
      const WorkTile tile = finder.find(item);
      if (threadIdx.x % 32 == 0) {
        post_tile<Traits>(shared_, n, tile);
        if (args_.progress != nullptr && n > 0) count_written(n - 1, before);
        if (args_.awaited != nullptr && tile.rows > 0) await_rows(n, tile.expert, finder.expert_rows());
      }
      __syncwarp();
      if (tile.rows == 0) return;
      ptx::mbarrier_wait_parity(shared_ + Traits::kAskedOffset, n % 2);
      item = next_item(item);
      before = tile;
    }
  }

  /// The weights of every tile, then the end. Weights do not depend on the kernel before this one, so nothing
  /// here waits for it. One thread.
  __device__ void run_weights() {
    const uint64_t policy = ptx::createpolicy_evict_first();
    for (int n = 0;; ++n) {
      const WorkTile tile = wait_for_tile<Traits>(shared_, n);
      if (tile.rows == 0) return post_end();
      load_weights(tile, policy);
    }
  }

  /// The token rows of every tile: gathered by kGatherThreads threads from wherever they are, or loaded by
  /// one thread, once they are written.
  __device__ void run_tokens() {
    if (!gathers<Traits>(args_) && !args_.waits_at_end) ptx::griddepcontrol_wait();
    ptx::griddepcontrol_launch_dependents();
    for (int n = 0;; ++n) {
      const WorkTile tile = wait_for_tile<Traits>(shared_, n);
      if (tile.rows == 0) return post_end();
      if (gathers<Traits>(args_)) {
        gather_tokens(tile);
        continue;
      }
      if (args_.awaited != nullptr) {
        wait_until_ready<Traits>(shared_, n);
        ptx::fence_proxy_async_global();
      }
      load_tokens(tile);
    }
  }

 private:
  /// The next tile is looked for when so many stages of this one are left to be filled: about the time that
  /// it takes. Sooner would bind it to this CTA while another has nothing left to do.
  static constexpr int kAheadStages =
      (4 * Traits::kDepthParts + Traits::kStageUnits - 1) / Traits::kStageUnits;

  /// By the whole warp: one taken by ticket where there are tickets, else the one that is this CTA's turn.
  __device__ int next_item(int item) const {
    const auto ctas = static_cast<int>(gridDim.x);
    if (args_.tickets == nullptr) return item + ctas;
    const int ticket = threadIdx.x % 32 == 0 ? atomicAdd(args_.tickets, 1) : 0;
    return ctas + __shfl_sync(~0u, ticket, 0);
  }

  /// One thread, as await_rows(). Whoever acquires the sum sees what the consumers wrote.
  __device__ void count_written(int n, const WorkTile& tile) const {
    wait_until_written<Traits>(shared_, n);
    const int blocks = min(Traits::kTileBlocks, args_.row_blocks - tile.row_tile * Traits::kTileBlocks);
    ptx::red_release_gpu_add(args_.progress + tile.expert, tile.rows * blocks);
  }

  __device__ void await_rows(int n, int expert, int rows) const {
    while (ptx::ld_acquire_gpu(args_.awaited + expert) != rows * args_.awaited_row_blocks) __nanosleep(40);
    post_ready<Traits>(shared_, n);
  }

  __device__ uint32_t full_barrier() const { return shared_ + Traits::kFullOffset + slot_ * 8; }

  __device__ void wait_for_slot() const {
    ptx::mbarrier_wait_parity(shared_ + Traits::kEmptyOffset + slot_ * 8, phase_ ^ 1u);
  }

  /// A stage without bytes, at which consumers find that there is no tile.
  __device__ void post_end() const {
    wait_for_slot();
    ptx::mbarrier_arrive(full_barrier());
  }

  __device__ void next_slot() {
    if (++slot_ == Traits::kStages) {
      slot_ = 0;
      phase_ ^= 1u;
    }
  }

  __device__ void load_weights(const WorkTile& tile, uint64_t policy) {
    const int first_block = tile.row_tile * Traits::kTileBlocks;
    // The last tile may have fewer blocks. What the others then multiply are rows that nobody stores.
    const int blocks = min(Traits::kTileBlocks, args_.row_blocks - first_block);
    const int64_t block_bytes = int64_t{args_.depth_units} * kUnitBytes;
    const uint8_t* from =
        args_.packed + tile.expert * args_.packed_bytes_per_expert + first_block * block_bytes;
    const int stages = (args_.depth_units + Traits::kStageUnits - 1) / Traits::kStageUnits;
    const int ahead_at = args_.depth_units - max(stages - kAheadStages, 0) * Traits::kStageUnits;
    for (int left = args_.depth_units; left > 0; left -= Traits::kStageUnits) {
      const int bytes = min(Traits::kStageUnits, left) * kUnitBytes;
      const uint32_t to = shared_ + Traits::kWeightOffset + slot_ * Traits::kWeightStageBytes;
      wait_for_slot();
      if (left == ahead_at) ptx::mbarrier_arrive(shared_ + Traits::kAskedOffset);
      ptx::mbarrier_arrive_expect_tx(full_barrier(), blocks * bytes);
#pragma unroll
      for (int b = 0; b < Traits::kTileBlocks; ++b) {
        if (b < blocks) {
          ptx::cp_async_bulk(to + b * Traits::kStageUnits * kUnitBytes, from + b * block_bytes, bytes,
                             full_barrier(), policy);
        }
      }
      from += bytes;
      next_slot();
    }
  }

  /// One box a term and stage, or a box a k unit where K is no multiple of 64 (TokenMaps).
  __device__ void load_tokens(const WorkTile& tile) {
    const int box_rows = Traits::box_rows(tile.rows), unit_bytes = box_rows * kUnitDepth * 2;
    for (int unit = 0; unit < args_.depth_units; unit += Traits::kStageUnits) {
      const int boxes = maps_.stage_in_a_box ? 1 : min(Traits::kStageUnits, args_.depth_units - unit);
      const int box_bytes = maps_.stage_in_a_box ? Traits::kStageUnits * unit_bytes : unit_bytes;
      wait_for_slot();
      ptx::mbarrier_arrive_expect_tx(full_barrier(), Traits::kTerms * boxes * box_bytes);
#pragma unroll
      for (int term = 0; term < Traits::kTerms; ++term) {
        const uint32_t to =
            shared_ + slot_ * Traits::kTokenStageBytes + term * Traits::kStageUnits * unit_bytes;
        for (int box = 0; box < boxes; ++box) {
          ptx::cp_async_bulk_tensor_3d(to + box * box_bytes,
                                       &maps_.of[term][box_rows / Traits::kBoxGranule - 1],
                                       maps_.stage_in_a_box ? 0 : (unit + box) * kUnitDepth, tile.first_row,
                                       maps_.stage_in_a_box ? unit : 0, full_barrier());
        }
      }
      next_slot();
    }
  }

  /// As a box of TokenMaps lays them out: rows of 128 bytes, chunk c of row r at c ^ (r % 8). Four threads
  /// share a row, two chunks each. Rows behind the tile's last keep what was there: their sums are not
  /// stored.
  __device__ void gather_tokens(const WorkTile& tile) {
    constexpr int kChunks = kUnitDepth / 8, kThreadsARow = kChunks / 2;
    static_assert(kThreadsARow == kOtherChunk);
    constexpr int kRowsAtOnce = Traits::kGatherThreads / kThreadsARow;
    constexpr int kRowsAThread = (Traits::kTokens + kRowsAtOnce - 1) / kRowsAtOnce;
    const int thread = static_cast<int>(threadIdx.x) % Traits::kGatherThreads;
    const int row = thread / kThreadsARow, chunk = thread % kThreadsARow;
    const GatheredTokens& gathered = args_.gathered;
    static_assert(kRowsAtOnce % 8 == 0);
    const uint32_t place = row * 128 + ((chunk ^ row % 8) << 4);
    uint32_t from[kRowsAThread];  // in units of 16 bytes
#pragma unroll
    for (int i = 0; i < kRowsAThread; ++i) {
      const int mine = row + i * kRowsAtOnce;
      const int slot = mine < tile.rows ? gathered.slot_of_row[tile.first_row + mine] : 0;
      from[i] = static_cast<uint32_t>(slot / gathered.top_k) * static_cast<uint32_t>(gathered.stride / 8);
    }
    const int unit_bytes = Traits::box_rows(tile.rows) * 128;
    const int whole_units = gathered.cols / kUnitDepth;  // K may end within the last unit
    const auto* chunks = reinterpret_cast<const uint4*>(gathered.rows) + chunk;
    for (int unit = 0; unit < args_.depth_units; unit += Traits::kStageUnits) {
      wait_for_slot();
      const uint32_t to = shared_ + slot_ * Traits::kTokenStageBytes;
      if (unit + Traits::kStageUnits <= whole_units) {
        gather_stage<kRowsAtOnce>(tile.rows - row, to + place, unit_bytes, chunks, from);
      } else {
        const int left = gathered.cols - unit * kUnitDepth - chunk * 8;
        gather_last_stage<kRowsAtOnce>(tile.rows - row, to + place, unit_bytes, chunks, from,
                                       min(Traits::kStageUnits, args_.depth_units - unit), left);
      }
      chunks += Traits::kStageUnits * kChunks;
      ptx::cp_async_mbarrier_arrive_noinc(full_barrier());
      next_slot();
    }
  }

  /// One of two chunks that a thread copies of every row and unit lies here, the other kOtherPlace from it
  /// (by exclusive or) in shared memory, kOtherChunk further in the row.
  static constexpr int kOtherChunk = kUnitDepth / 8 / 2, kOtherPlace = kOtherChunk * 16;

  /// A stage of whole units: this thread's part of every kRowsAtOnce-th row, as long as there are `rows`.
  /// Two warps copy for a whole CTA, so every instruction counts: of a row two are its address, and little
  /// more than one each copy.
  template <int kRowsAtOnce, int kRowsAThread>
  static __device__ __forceinline__ void gather_stage(int rows, uint32_t to, int unit_bytes,
                                                      const uint4* chunks,
                                                      const uint32_t (&from)[kRowsAThread]) {
#pragma unroll
    for (int i = 0; i < kRowsAThread; ++i) {
      if (i * kRowsAtOnce >= rows) continue;
      const uint4* const chunk = ptx::offset_16(chunks, from[i]);
#pragma unroll
      for (int u = 0; u < Traits::kStageUnits; ++u) {
        const uint32_t place = to + u * unit_bytes;
        const int below = i * kRowsAtOnce * 128;
        ptx::cp_async_cg_16(place + below, chunk + u * kUnitDepth / 8);
        ptx::cp_async_cg_16((place ^ kOtherPlace) + below, chunk + u * kUnitDepth / 8 + kOtherChunk);
      }
    }
  }

  /// The same where K ends: `units` units, of which this thread's first chunk begins `left` before the end.
  template <int kRowsAtOnce, int kRowsAThread>
  static __device__ __forceinline__ void gather_last_stage(int rows, uint32_t to, int unit_bytes,
                                                           const uint4* chunks,
                                                           const uint32_t (&from)[kRowsAThread], int units,
                                                           int left) {
#pragma unroll 1
    for (int u = 0; u < units; ++u, to += unit_bytes, chunks += kUnitDepth / 8, left -= kUnitDepth) {
#pragma unroll
      for (int i = 0; i < kRowsAThread; ++i) {
        if (i * kRowsAtOnce >= rows) continue;
        const uint4* const chunk = ptx::offset_16(chunks, from[i]);
        const int below = i * kRowsAtOnce * 128;
        ptx::cp_async_cg_16_or_zero(to + below, chunk, left > 0);
        ptx::cp_async_cg_16_or_zero((to ^ kOtherPlace) + below, chunk + kOtherChunk, left > kOtherChunk * 8);
      }
    }
  }

  const GemmKernelArgs& args_;
  const TokenMaps& maps_;
  uint32_t shared_;
  int slot_ = 0;
  uint32_t phase_ = 0;
};

}  // namespace fourfold::sm90
