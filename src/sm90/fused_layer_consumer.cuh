// The consumer warpgroups of the fused layer kernel: decode weights and multiply. Each has a part of k; the
// sums of all go to a finisher, so that no consumer waits for what becomes of them.
#pragma once

#include <cstdint>

#include "sm90/fused_layer_args.cuh"
#include "sm90/fused_layer_layout.h"
#include "sm90/fused_layer_producer.cuh"
#include "sm90/ptx.cuh"

namespace fourfold::sm90 {

class FusedConsumer {
 public:
  __device__ __forceinline__ FusedConsumer(const FusedLayerArgs& args, const FusedShared& layout,
                                           uint32_t shared, int part)
      : args_(args),
        layout_(layout),
        shared_(shared),
        part_(part),
        thread_(static_cast<int>(threadIdx.x) % 128),
        lane_(static_cast<int>(threadIdx.x) % 32) {}

  __device__ __forceinline__ void run() {
    for (int n = 0;; ++n) {
      ptx::mbarrier_wait_parity(shared_ + layout_.full + stage_ * 8, phase_);
      const FusedTile tile = FusedTile::load(shared_ + layout_.stage_tiles + stage_ * 16);
      if (tile.work.rows == 0) return;
      const FusedMatrixArgs& matrix = tile.down ? args_.down : args_.gate_up;
      const uint32_t tokens = shared_ + layout_.tokens + buffer_ * layout_.token_buffer_bytes;
      ptx::mbarrier_wait_parity(shared_ + layout_.tokens_full + buffer_ * 8, buffer_phase_);
      float sums[4] = {};
      multiply(matrix, tile.work.rows, tokens, sums);
      ptx::mbarrier_arrive(shared_ + layout_.tokens_empty + buffer_ * 8);
      if (++buffer_ == args_.token_buffers) {
        buffer_ = 0;
        buffer_phase_ ^= 1u;
      }
      hand_over(n, sums);
    }
  }

 private:
  /// Sums of this part's k units. sums[2 u + i]: row 8 u + g of the warp's 16, token 2 t + i (lane 4 g + t).
  /// Columns of tokens that are not there repeat the last one.
  __device__ __forceinline__ void multiply(const FusedMatrixArgs& matrix, int rows, uint32_t tokens,
                                           float (&sums)[4]) {
    const uint32_t units = shared_ + part_ * kUnitBytes;
    const uint32_t codes = units + thread_ * 16, scales = units + kUnitCodeBytes + thread_ / 4 * 8;
    uint32_t operand = tokens + min(lane_ % 8, rows - 1) * FusedShared::row_bytes(matrix.depth_units) +
                       lane_ / 8 * 16 + part_ * (kUnitDepth * 2);
    for (int unit = part_; unit - part_ < matrix.depth_units; unit += kFusedParts) {
      ptx::mbarrier_wait_parity(shared_ + layout_.full + stage_ * 8, phase_);
      if (unit < matrix.depth_units) {
        const uint4 packed = ptx::ld_shared_v4(codes + stage_ * kFusedStageBytes);
        const uint2 scale = ptx::ld_shared_v2(scales + stage_ * kFusedStageBytes);
        multiply_pair(packed.x, packed.y, scale.x, operand, sums);
        multiply_pair(packed.z, packed.w, scale.y, operand + kUnitDepth, sums);
        operand += kFusedParts * kUnitDepth * 2;
      }
      ptx::mbarrier_arrive(shared_ + layout_.empty + stage_ * 8);
      if (++stage_ == args_.stages) {
        stage_ = 0;
        phase_ ^= 1u;
      }
    }
  }

  /// Two k-steps.
  __device__ __forceinline__ void multiply_pair(uint32_t first, uint32_t second, uint32_t scales,
                                                uint32_t operand, float (&sums)[4]) const {
    uint32_t tokens[4], weights[4];
    ptx::ldmatrix_x4(operand, tokens);
    decode_step<ptx::PtxOps, 0>(first, second, scales, args_.masks, weights);
    ptx::mma_m16n8k16(sums, weights, tokens[0], tokens[1]);
    decode_step<ptx::PtxOps, 1>(first, second, scales, args_.masks, weights);
    ptx::mma_m16n8k16(sums, weights, tokens[2], tokens[3]);
  }

  /// To the finisher of this tile; its buffer is free when it has read those of its tile before.
  __device__ __forceinline__ void hand_over(int n, const float (&sums)[4]) const {
    const uint32_t finisher = n % kFusedFinishers;
    ptx::mbarrier_wait_parity(shared_ + layout_.partials_free + finisher * 8, (n / kFusedFinishers % 2) ^ 1);
    if (lane_ % 4 * 2 < args_.tile_tokens) {
      ptx::st_shared_v4(shared_ + layout_.partial(finisher, part_, thread_ / 32, lane_),
                        __float_as_uint(sums[0]), __float_as_uint(sums[1]), __float_as_uint(sums[2]),
                        __float_as_uint(sums[3]));
    }
    ptx::mbarrier_arrive(shared_ + layout_.partials_full + finisher * 8);
  }

  const FusedLayerArgs& args_;
  const FusedShared& layout_;
  uint32_t shared_;
  int part_, thread_, lane_;
  int stage_ = 0, buffer_ = 0;
  uint32_t phase_ = 0, buffer_phase_ = 0;
};

}  // namespace fourfold::sm90
