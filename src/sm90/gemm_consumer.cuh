// The consumer warpgroups of the grouped GEMM: decode weights into registers while WGMMA multiplies those
// decoded before.
#pragma once

#include <cstdint>

#include "sm90/gemm_epilogue.cuh"
#include "sm90/gemm_kernel_args.cuh"
#include "sm90/gemm_queue.cuh"
#include "sm90/ptx.cuh"
#include "sm90/tile_schedule.h"

namespace fourfold::sm90 {

/// Codes and scales of one unit for every row block of a warpgroup, as one thread holds them.
template <class Traits>
struct PackedRegisters {
  uint4 codes[Traits::kRowBlocks];
  uint2 scales[Traits::kRowBlocks];
};

/// Operand A of one commit group: kGroup k-steps of every row block.
template <class Traits>
struct DecodedRegisters {
  uint32_t of[Traits::kGroup][Traits::kRowBlocks][4];
};

template <class Traits>
class Consumer {
 public:
  __device__ __forceinline__ Consumer(const GemmKernelArgs& args, uint32_t shared, int warpgroup)
      : args_(args),
        shared_(shared),
        row_part_(warpgroup / Traits::kDepthParts),
        depth_part_(warpgroup % Traits::kDepthParts),
        thread_(static_cast<int>(threadIdx.x) % 128) {
    const uint32_t weights =
        shared_ + Traits::kWeightOffset +
        (row_part_ * Traits::kRowBlocks * Traits::kStageUnits + depth_part_) * kUnitBytes;
    codes_ = weights + thread_ * 16;
    scales_ = weights + kUnitCodeBytes + thread_ / 4 * 8;
    tokens_ = ptx::matrix_descriptor_low(shared_);
    my_units_ = (args.depth_units - depth_part_ + Traits::kDepthParts - 1) / Traits::kDepthParts;
    const int stages = (args.depth_units + Traits::kStageUnits - 1) / Traits::kStageUnits;
    skips_last_stage_ = (my_units_ + kMyStageUnits - 1) / kMyStageUnits < stages;
  }

  __device__ __forceinline__ void run() {
    for (int n = 0;; ++n) {
      wait_until_full(stage_, phase_);
      WorkTile work = posted_tile<Traits>(shared_, n);
      if (work.rows == 0) return;
      work.rows = __shfl_sync(~0u, work.rows, 0);  // the same in all lanes, as the compiler now knows
      Sums<Traits> sums = {};
      const TileScales<Traits> scales(args_, depth_part_, work);
      multiply(work.rows, sums);
      if (args_.paired) {
        Epilogue<Traits, true>(args_, shared_, row_part_, depth_part_, work, scales).finish(sums);
      } else {
        Epilogue<Traits, false>(args_, shared_, row_part_, depth_part_, work, scales).finish(sums);
      }
      if (args_.progress != nullptr) post_written<Traits>(shared_, n);
    }
  }

 private:
  static constexpr int kBurst = 16;                    ///< units between choices of the instruction
  static constexpr int kUnrolled = Traits::kUnrolled;  ///< units without a branch
  static constexpr int kMyStageUnits = Traits::kMyStageUnits;
  static_assert(kBurst % kUnrolled == 0);

  /// The tokens of a tile of one k unit in shared memory, in the descriptor's units of 16 bytes.
  static __device__ __forceinline__ constexpr uint32_t unit_tokens_of(int tokens) {
    return static_cast<uint32_t>(Traits::box_rows(tokens)) * kUnitDepth * 2 / 16;
  }

  __device__ __forceinline__ uint32_t full_barrier(int stage) const {
    return shared_ + Traits::kFullOffset + stage * 8;
  }

  __device__ __forceinline__ void wait_until_full(int stage, uint32_t phase) const {
    ptx::mbarrier_wait_parity(full_barrier(stage), phase);
    if (gathers<Traits>(args_)) ptx::fence_proxy_async();  // plain copies brought what WGMMA reads
  }

  /// Every thread arrives for its own reads. One arrival a warp costs the same time, and would be as safe
  /// only by what ptxas happens to emit: it drops a __syncwarp() between the reads and the arrival.
  __device__ __forceinline__ void release(int stage) const {
    ptx::mbarrier_arrive(shared_ + Traits::kEmptyOffset + stage * 8);
  }

  __device__ __forceinline__ void load(PackedRegisters<Traits>& packed, int stage, int unit) const {
#pragma unroll
    for (int b = 0; b < Traits::kRowBlocks; ++b) {
      const int offset = stage * Traits::kWeightStageBytes +
                         (b * Traits::kStageUnits + unit * Traits::kDepthParts) * kUnitBytes;
      packed.codes[b] = ptx::ld_shared_v4(codes_ + offset);
      packed.scales[b] = ptx::ld_shared_v2(scales_ + offset);
    }
  }

  __device__ __forceinline__ void next_stage(int& stage, uint32_t& phase) const {
    if (++stage == Traits::kStages) {
      stage = 0;
      phase ^= 1u;
    }
  }

  /// Decodes k-steps kFirst to kFirst + kGroup - 1 of a unit.
  template <int kFirst>
  __device__ __forceinline__ void decode(const PackedRegisters<Traits>& packed,
                                         DecodedRegisters<Traits>& a) const {
#pragma unroll
    for (int b = 0; b < Traits::kRowBlocks; ++b) {
      constexpr bool kFirstPair = kFirst < 2;
      const uint32_t first = kFirstPair ? packed.codes[b].x : packed.codes[b].z;
      const uint32_t second = kFirstPair ? packed.codes[b].y : packed.codes[b].w;
      const uint32_t scales = kFirstPair ? packed.scales[b].x : packed.scales[b].y;
      decode_step<ptx::PtxOps, kFirst % 2>(first, second, scales, args_.masks, a.of[0][b]);
      if constexpr (Traits::kGroup == 2) {
        decode_step<ptx::PtxOps, 1>(first, second, scales, args_.masks, a.of[1][b]);
      }
    }
  }

  /// Gives decoded k-steps to WGMMA as one commit group. `unit_tokens`: unit_tokens_of the tile.
  template <int kFirst, int kN>
  __device__ __forceinline__ void issue(const DecodedRegisters<Traits>& a, uint64_t tokens,
                                        uint32_t unit_tokens, Sums<Traits>& sums) const {
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Traits::kGroup; ++step) {
#pragma unroll
      for (int term = 0; term < Traits::kTerms; ++term) {
        const uint64_t b_operand = tokens + term * Traits::kStageUnits * unit_tokens + (kFirst + step) * 2;
#pragma unroll
        for (int b = 0; b < Traits::kRowBlocks; ++b)
          ptx::Wgmma<kN>::mma(sums.of[b], a.of[step][b], b_operand);
      }
    }
    ptx::wgmma_commit_group();
  }

  /// kUnits units by the instruction for kN tokens, without a branch between: kUnrolled, from the beginning
  /// of a stage on, or one, the stage's unit `first`. `unit_tokens`: unit_tokens_of the tile, whose tokens
  /// may be fewer than kN. One commit group multiplies while the next is decoded: `a` comes with the first
  /// group and leaves with that of the unit after, `other` takes turns with it. Nothing is in flight at the
  /// end. Only so may the caller branch: with WGMMA in flight around a loop, ptxas gives each kN accumulators
  /// of its own, and serialises all for want of registers; or, in a simpler loop, silently overwrites
  /// registers that are still read.
  template <int kN, int kUnits>
  __device__ __forceinline__ void multiply_units(PackedRegisters<Traits>& packed, DecodedRegisters<Traits>& a,
                                                 int first, int left, uint32_t unit_tokens,
                                                 Sums<Traits>& sums) {
    DecodedRegisters<Traits> other;
    uint64_t stage_tokens;
    multiply_unit<kN, kUnits, 0>(packed, a, other, stage_tokens, first, left, unit_tokens, sums);
    ptx::wgmma_wait_group<0>();
    if (kUnits == kUnrolled || previous_ != stage_) release(previous_);  // else units of the stage are left
  }

  /// Unit kUnit of multiply_units(), and those after it. A recursion, since the compiler leaves a loop of
  /// four units a loop, whatever pragma asks for.
  template <int kN, int kUnits, int kUnit>
  __device__ __forceinline__ void multiply_unit(PackedRegisters<Traits>& packed, DecodedRegisters<Traits>& a,
                                                DecodedRegisters<Traits>& other, uint64_t& stage_tokens,
                                                int first, int left, uint32_t unit_tokens,
                                                Sums<Traits>& sums) {
    constexpr int kOfStage = kUnit % kMyStageUnits;
    if constexpr (kOfStage == 0) {
      stage_tokens = ptx::matrix_descriptor(tokens_ + stage_ * (Traits::kTokenStageBytes / 16) +
                                            (first * Traits::kDepthParts + depth_part_) * unit_tokens);
    }
    const uint64_t tokens = stage_tokens + kOfStage * Traits::kDepthParts * unit_tokens;
    issue<0, kN>(a, tokens, unit_tokens, sums);
    if constexpr (kUnit > 0) {
      ptx::wgmma_wait_group<1>();
      if constexpr (kOfStage == 0) release(previous_);
    }
    if constexpr (Traits::kGroup == 1) {
      decode<1>(packed, other);
      issue<1, kN>(other, tokens, unit_tokens, sums);
      ptx::wgmma_wait_group<1>();
      decode<2>(packed, a);
      issue<2, kN>(a, tokens, unit_tokens, sums);
      ptx::wgmma_wait_group<1>();
    }
    decode<4 - Traits::kGroup>(packed, other);
    issue<4 - Traits::kGroup, kN>(other, tokens, unit_tokens, sums);
    if constexpr (kUnits == kUnrolled && kOfStage + 1 < kMyStageUnits) {
      load(packed, stage_, kOfStage + 1);
    } else {
      load_after(packed, kUnits == kUnrolled ? kMyStageUnits - 1 : first,
                 kUnit + 1 < kUnits || left > kUnits);
    }
    ptx::wgmma_wait_group<1>();
    decode<0>(packed, a);
    if constexpr (kUnit + 1 < kUnits) {
      multiply_unit<kN, kUnits, kUnit + 1>(packed, a, other, stage_tokens, first, left, unit_tokens, sums);
    }
  }

  /// Loads the unit after unit `of_stage` of this stage, wherever it is, once it is there; `more`: there is
  /// one in this tile. Without, this waits for a stage that is there and loads what nobody will use, so that
  /// there is no branch.
  __device__ __forceinline__ void load_after(PackedRegisters<Traits>& packed, int of_stage, bool more) {
    int next = stage_;
    uint32_t next_phase = phase_;
    next_stage(next, next_phase);
    const bool stage_ends = !more || of_stage + 1 == kMyStageUnits;
    const bool goes_on = stage_ends && more;
    const int ahead = goes_on ? next : stage_;
    wait_until_full(ahead, goes_on ? next_phase : phase_);
    load(packed, ahead, stage_ends ? 0 : of_stage + 1);
    previous_ = stage_;
    stage_ = stage_ends ? next : stage_;
    phase_ = stage_ends ? next_phase : phase_;
  }

  /// Some units by the same instruction, kUnrolled at a time; returns how many are left.
  template <int kN>
  __device__ __forceinline__ int multiply_burst(PackedRegisters<Traits>& packed, DecodedRegisters<Traits>& a,
                                                int left, Sums<Traits>& sums) {
    for (const int last = max(left - kBurst, 0) + kUnrolled; left >= last; left -= kUnrolled)
      multiply_units<kN, kUnrolled>(packed, a, 0, left, unit_tokens_of(kN), sums);
    return left;
  }

  /// Picks the instruction for more than kAbove and at most kMost tokens by bisection. The choice is inside
  /// the loop over k: with a loop for each size, ptxas adds up the registers of their accumulators, and
  /// serialises WGMMA for want of them.
  template <int kAbove, int kMost>
  __device__ __forceinline__ int multiply_tokens(int rows, PackedRegisters<Traits>& packed,
                                                 DecodedRegisters<Traits>& a, int left, Sums<Traits>& sums) {
    if constexpr (kMost - kAbove == Traits::kGranule) {
      return multiply_burst<kMost>(packed, a, left, sums);
    } else {
      constexpr int kMiddle = kAbove + (kMost - kAbove) / Traits::kGranule / 2 * Traits::kGranule;
      if (rows <= kMiddle) return multiply_tokens<kAbove, kMiddle>(rows, packed, a, left, sums);
      return multiply_tokens<kMiddle, kMost>(rows, packed, a, left, sums);
    }
  }

  /// All k units of a tile that are this warpgroup's.
  __device__ __forceinline__ void multiply(int rows, Sums<Traits>& sums) {
    PackedRegisters<Traits> packed;
    DecodedRegisters<Traits> a;
    load(packed, stage_, 0);
    decode<0>(packed, a);
    int left = my_units_;
    while (left >= kUnrolled) left = multiply_tokens<0, Traits::kTokens>(rows, packed, a, left, sums);
    // What is left, where K is no multiple of kUnrolled units, by the instruction for most tokens: one for
    // each number would be a third of the code. Columns of tokens that the tile does not have hold whatever
    // lies there, and are not stored.
    const uint32_t unit_tokens = unit_tokens_of(rows);
#pragma unroll 1
    for (int unit = 0; left > 0; ++unit, --left)
      multiply_units<Traits::kTokens, 1>(packed, a, unit % kMyStageUnits, left, unit_tokens, sums);
    if (Traits::kDepthParts > 1 && skips_last_stage_) {
      ptx::mbarrier_wait_parity(full_barrier(stage_), phase_);
      release(stage_);
      next_stage(stage_, phase_);
    }
  }

  const GemmKernelArgs& args_;
  uint32_t shared_;
  int row_part_, depth_part_, thread_;
  uint32_t codes_, scales_;
  uint32_t tokens_;
  int my_units_;
  bool skips_last_stage_;  ///< of a tile: it has none of this warpgroup's units
  int stage_ = 0;
  int previous_ = 0;
  uint32_t phase_ = 0;
};

}  // namespace fourfold::sm90
