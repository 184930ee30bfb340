// Rounding of NVFP4 blocks that neighbouring lanes of a warp hold together.
#pragma once

#include <cstdint>

#include "cuda/round_block.cuh"
#include "numeric/block_quantizer.h"
#include "sm90/ptx.cuh"

namespace fourfold::sm90 {

/// This lane's 16 / kLanes values of a block, in any order. The other lanes of the block are at multiples of
/// kStride from it; all of them take part in every call.
template <int kLanes, int kStride = 1>
struct BlockPart {
  static constexpr int kWords = kNvfp4Block / kLanes / 2;
  float of[2 * kWords];

  /// From pairs of bf16.
  static __device__ __forceinline__ BlockPart unpack(const uint32_t (&words)[kWords]) {
    BlockPart result;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      result.of[2 * i] = ptx::low_bf16(words[i]);
      result.of[2 * i + 1] = ptx::high_bf16(words[i]);
    }
    return result;
  }

  /// What the NVFP4 codes and block scale of these values hold, without the global scale; zeros have no sign.
  __device__ __forceinline__ void round(float global, uint32_t (&words)[kWords]) const {
    float amax = 0.0f;
#pragma unroll
    for (const float value : of) amax = cuda::max_magnitude_nan(amax, value);
#pragma unroll
    for (int distance = kStride; distance < kLanes * kStride; distance *= 2) {
      amax = cuda::max_magnitude_nan(amax, __shfl_xor_sync(lanes(), amax, distance));
    }
    const cuda::BlockScale scale = cuda::block_scale(amax / 6.0f, global);
    float rounded[2 * kWords];
    cuda::round_block<false>(of, scale, rounded);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      words[i] = cuda::scale_pair(rounded[2 * i], rounded[2 * i + 1], scale.value);
    }
  }

  __device__ __forceinline__ void subtract(const BlockPart& decoded, float global) {
#pragma unroll
    for (int i = 0; i < 2 * kWords; ++i) of[i] = __fsub_rn(of[i], __fmul_rn(decoded.of[i], global));
  }

 private:
  static __device__ __forceinline__ uint32_t lanes() {
    const int lane = threadIdx.x % 32;
    uint32_t mask = 0;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) mask |= 1u << (i * kStride);
    return mask << (lane / (kLanes * kStride) * (kLanes * kStride) + lane % kStride);
  }
};

}  // namespace fourfold::sm90
