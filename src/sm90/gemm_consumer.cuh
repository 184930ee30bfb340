// The consumer warpgroups of the grouped GEMM: decode weights into registers while WGMMA multiplies those
// decoded before.
#pragma once

#include <cstdint>

#include "sm90/gemm_epilogue.cuh"
#include "sm90/gemm_kernel_args.cuh"
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
  __device__ Consumer(const GemmKernelArgs& args, uint32_t shared, int warpgroup)
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
    tokens_ = ptx::matrix_descriptor(shared_ + depth_part_ * Traits::kTokenBoxBytes);
    my_units_ = (args.depth_units - depth_part_ + Traits::kDepthParts - 1) / Traits::kDepthParts;
    steps_ = (args.depth_units + Traits::kDepthParts - 1) / Traits::kDepthParts;
  }

  __device__ void run() {
    for (;;) {
      ptx::mbarrier_wait_parity(full_barrier(stage_), phase_);
      const uint4 tile = ptx::ld_shared_v4(shared_ + Traits::kTileOffset + stage_ * 16);
      if (tile.w == 0) return;
      const WorkTile work{static_cast<int32_t>(tile.x), static_cast<int32_t>(tile.y),
                          static_cast<int32_t>(tile.z), __shfl_sync(~0u, static_cast<int32_t>(tile.w), 0)};
      Sums<Traits> sums = {};
      Epilogue<Traits> epilogue(args_, shared_, row_part_, depth_part_, work);
      multiply(work.rows, sums);
      epilogue.finish(sums);
    }
  }

 private:
  __device__ uint32_t full_barrier(int stage) const { return shared_ + Traits::kFullOffset + stage * 8; }

  /// One arrival a warp.
  __device__ void release(int stage) const {
    ptx::mbarrier_arrive_if(shared_ + Traits::kEmptyOffset + stage * 8, thread_ % 32 == 0);
  }

  __device__ void load(PackedRegisters<Traits>& packed, int stage) const {
#pragma unroll
    for (int b = 0; b < Traits::kRowBlocks; ++b) {
      const int offset = stage * Traits::kWeightStageBytes + b * Traits::kDepthParts * kUnitBytes;
      packed.codes[b] = ptx::ld_shared_v4(codes_ + offset);
      packed.scales[b] = ptx::ld_shared_v2(scales_ + offset);
    }
  }

  __device__ void next_stage(int& stage, uint32_t& phase) const {
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
        constexpr uint64_t kTermStride = Traits::kDepthParts * Traits::kTokenBoxBytes / 16;
        const uint64_t b_operand = tokens + term * kTermStride + (kFirst + step) * 2;
#pragma unroll
        for (int b = 0; b < Traits::kRowBlocks; ++b)
          ptx::Wgmma<kN>::mma(sums.of[b], a.of[step][b], b_operand);
      }
    }
    ptx::wgmma_commit_group();
  }

  /// One unit by the instruction for kN tokens: while one group multiplies, the next is decoded. `a` comes
  /// with the first group of this unit and leaves with that of the next, so that decoding is never waited
  /// for. Nothing is in flight at the end: the caller may branch, and ptxas need not know what WGMMA still
  /// reads.
  template <int kN>
  __device__ __forceinline__ void multiply_unit(PackedRegisters<Traits>& packed, DecodedRegisters<Traits>& a,
                                                int next, uint32_t next_phase, Sums<Traits>& sums) {
    const uint64_t tokens = tokens_ + stage_ * (Traits::kTokenStageBytes / 16);
    DecodedRegisters<Traits> other;
    issue<0, kN>(a, tokens, sums);
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
    ptx::mbarrier_wait_parity(full_barrier(next), next_phase);
    load(packed, next);
    ptx::wgmma_wait_group<1>();
    decode<0>(packed, a);
    ptx::wgmma_wait_group<0>();
  }

  /// Picks the instruction by the tokens of the tile. The choice is inside the loop over k: with a loop for
  /// each size, ptxas adds up the registers of their accumulators, and serialises WGMMA for want of them.
  template <int kN>
  __device__ __forceinline__ void multiply_tokens(int rows, PackedRegisters<Traits>& packed,
                                                  DecodedRegisters<Traits>& a, int next, uint32_t next_phase,
                                                  Sums<Traits>& sums) {
    if constexpr (kN < Traits::kTokens) {
      if (rows > kN) return multiply_tokens<kN + Traits::kGranule>(rows, packed, a, next, next_phase, sums);
    }
    multiply_unit<kN>(packed, a, next, next_phase, sums);
  }

  /// All k units of a tile that are this warpgroup's.
  __device__ __forceinline__ void multiply(int rows, Sums<Traits>& sums) {
    PackedRegisters<Traits> packed;
    DecodedRegisters<Traits> a;
    load(packed, stage_);
    decode<0>(packed, a);
    for (int unit = 0; unit < my_units_; ++unit) {
      int next = stage_;
      uint32_t next_phase = phase_;
      next_stage(next, next_phase);
      // After the last unit, "the next" is this one again: there, whatever comes.
      const bool more = unit + 1 < my_units_;
      multiply_tokens<Traits::kGranule>(rows, packed, a, more ? next : stage_, more ? next_phase : phase_,
                                        sums);
      release(stage_);
      stage_ = next;
      phase_ = next_phase;
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
  uint32_t phase_ = 0;
};

}  // namespace fourfold::sm90
