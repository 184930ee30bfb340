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
        (row_part_ * Traits::kRowBlocks * Traits::kDepthParts + depth_part_) * kUnitBytes;
    codes_ = weights + thread_ * 16;
    scales_ = weights + kUnitCodeBytes + thread_ / 4 * 8;
    tokens_ = ptx::matrix_descriptor(shared_);
    my_units_ = (args.depth_units - depth_part_ + Traits::kDepthParts - 1) / Traits::kDepthParts;
    steps_ = (args.depth_units + Traits::kDepthParts - 1) / Traits::kDepthParts;
  }

  __device__ __forceinline__ void run() {
    for (int n = 0;; ++n) {
      wait_until_full(stage_, phase_);
      WorkTile work = posted_tile<Traits>(shared_, n);
      if (work.rows == 0) return;
      work.rows = __shfl_sync(~0u, work.rows, 0);  // the same in all lanes, as the compiler now knows
      Sums<Traits> sums = {};
      Epilogue<Traits> epilogue(args_, shared_, row_part_, depth_part_, work);
      multiply(work.rows, sums);
      epilogue.finish(sums);
    }
  }

 private:
  static constexpr int kBurst = 16;                    ///< units between choices of the instruction
  static constexpr int kUnrolled = Traits::kUnrolled;  ///< units without a branch

  /// Tokens of one k unit in shared memory, in the descriptor's units of 16 bytes.
  template <int kN>
  static constexpr uint64_t kUnitTokens = kN* kUnitDepth * 2 / 16;

  __device__ __forceinline__ uint32_t full_barrier(int stage) const {
    return shared_ + Traits::kFullOffset + stage * 8;
  }

  __device__ __forceinline__ void wait_until_full(int stage, uint32_t phase) const {
    ptx::mbarrier_wait_parity(full_barrier(stage), phase);
    if constexpr (Traits::kGathered) ptx::fence_proxy_async();  // plain copies brought what WGMMA reads
  }

  /// Every thread arrives for its own reads. One arrival a warp costs the same time, and would be as safe
  /// only by what ptxas happens to emit: it drops a __syncwarp() between the reads and the arrival.
  __device__ __forceinline__ void release(int stage) const {
    ptx::mbarrier_arrive(shared_ + Traits::kEmptyOffset + stage * 8);
  }

  __device__ __forceinline__ void load(PackedRegisters<Traits>& packed, int stage) const {
#pragma unroll
    for (int b = 0; b < Traits::kRowBlocks; ++b) {
      const int offset = stage * Traits::kWeightStageBytes + b * Traits::kDepthParts * kUnitBytes;
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

  /// Gives decoded k-steps to WGMMA as one commit group.
  template <int kFirst, int kN>
  __device__ __forceinline__ void issue(const DecodedRegisters<Traits>& a, uint64_t tokens,
                                        Sums<Traits>& sums) const {
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Traits::kGroup; ++step) {
#pragma unroll
      for (int term = 0; term < Traits::kTerms; ++term) {
        const uint64_t b_operand =
            tokens + term * Traits::kDepthParts * kUnitTokens<kN> + (kFirst + step) * 2;
#pragma unroll
        for (int b = 0; b < Traits::kRowBlocks; ++b)
          ptx::Wgmma<kN>::mma(sums.of[b], a.of[step][b], b_operand);
      }
    }
    ptx::wgmma_commit_group();
  }

  /// kUnits units by the instruction for kN tokens, without a branch between. One commit group multiplies
  /// while the next is decoded: `a` comes with the first group and leaves with that of the unit after,
  /// `other` takes turns with it. Nothing is in flight at the end. Only so may the caller branch: with WGMMA
  /// in flight around a loop, ptxas gives each kN accumulators of its own, and serialises all for want of
  /// registers; or, in a simpler loop, silently overwrites registers that are still read.
  template <int kN, int kUnits>
  __device__ __forceinline__ void multiply_units(PackedRegisters<Traits>& packed, DecodedRegisters<Traits>& a,
                                                 int left, Sums<Traits>& sums) {
    DecodedRegisters<Traits> other;
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      const uint64_t tokens =
          tokens_ + stage_ * (Traits::kTokenStageBytes / 16) + depth_part_ * kUnitTokens<kN>;
      issue<0, kN>(a, tokens, sums);
      if (unit > 0) {
        ptx::wgmma_wait_group<1>();
        release(previous_);
      }
      if constexpr (Traits::kGroup == 1) {
        decode<1>(packed, other);
        issue<1, kN>(other, tokens, sums);
        ptx::wgmma_wait_group<1>();
        decode<2>(packed, a);
        issue<2, kN>(a, tokens, sums);
        ptx::wgmma_wait_group<1>();
      }
      decode<4 - Traits::kGroup>(packed, other);
      issue<4 - Traits::kGroup, kN>(other, tokens, sums);
      previous_ = stage_;
      // After the last unit of the tile this waits for a stage that is there, so that there is no branch.
      int next = stage_;
      uint32_t next_phase = phase_;
      next_stage(next, next_phase);
      const bool more = unit + 1 < kUnits || left > kUnits;
      const int ahead = more ? next : stage_;
      wait_until_full(ahead, more ? next_phase : phase_);
      load(packed, ahead);
      stage_ = next;
      phase_ = next_phase;
      ptx::wgmma_wait_group<1>();
      decode<0>(packed, a);
    }
    ptx::wgmma_wait_group<0>();
    release(previous_);
  }

  /// Some units by the same instruction; returns how many are left.
  template <int kN>
  __device__ __forceinline__ int multiply_burst(PackedRegisters<Traits>& packed, DecodedRegisters<Traits>& a,
                                                int left, Sums<Traits>& sums) {
    for (int i = 0; i < kBurst && left >= kUnrolled; i += kUnrolled, left -= kUnrolled) {
      multiply_units<kN, kUnrolled>(packed, a, left, sums);
    }
    if (left > 0 && left < kUnrolled) {
      multiply_units<kN, 1>(packed, a, left, sums);
      --left;
    }
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
    load(packed, stage_);
    decode<0>(packed, a);
    for (int left = my_units_; left > 0;) {
      left = multiply_tokens<0, Traits::kTokens>(rows, packed, a, left, sums);
    }
    if (Traits::kDepthParts > 1 && my_units_ < steps_) {
      ptx::mbarrier_wait_parity(full_barrier(stage_), phase_);
      release(stage_);
      next_stage(stage_, phase_);
    }
  }

  const GemmKernelArgs& args_;
  uint32_t shared_;
  int row_part_, depth_part_, thread_;
  uint32_t codes_, scales_;
  uint64_t tokens_;
  int my_units_, steps_;
  int stage_ = 0;
  int previous_ = 0;
  uint32_t phase_ = 0;
};

}  // namespace fourfold::sm90
