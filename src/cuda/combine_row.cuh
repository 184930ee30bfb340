// Combine of eight columns of one token, by one thread: the arithmetic that cuda/combine.h specifies.
#pragma once

#include <cstdint>

#include "fourfold/number_formats.h"

namespace fourfold::cuda {

inline constexpr int kColumns = 8;  ///< a 16-byte load of bf16

/// Rows of the experts' outputs and their routing weights. Members as in CombineArgs.
struct SlotRows {
  const Bf16* z;
  int64_t z_stride;
  const int32_t* row_of_slot;
  const float* weights;  ///< null: all 1
  int64_t weight_stride;
  int32_t top_k;
};

__device__ __forceinline__ void store_row(float* y, const float (&sums)[kColumns]) {
#pragma unroll
  for (int i = 0; i < kColumns; ++i) y[i] = sums[i];
}

__device__ __forceinline__ void store_row(Bf16* y, const float (&sums)[kColumns]) {
  if (reinterpret_cast<uintptr_t>(y) % 16 != 0) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) y[i] = encode_bf16(sums[i]);
    return;
  }
  uint32_t words[kColumns / 2];
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) {
    words[i] = encode_bf16(sums[2 * i]).bits | uint32_t{encode_bf16(sums[2 * i + 1]).bits} << 16;
  }
  *reinterpret_cast<uint4*>(y) = make_uint4(words[0], words[1], words[2], words[3]);
}

/// From L2: other CTAs of a running kernel may have written the row.
__device__ __forceinline__ uint4 load_eight(const Bf16* row, int32_t column) {
  return __ldcg(reinterpret_cast<const uint4*>(row + int64_t{column} * kColumns));
}

__device__ __forceinline__ void add_weighted(const uint4& words, float weight, float (&sums)[kColumns]) {
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    const float low = float_from_bits(word[pair] << 16), high = float_from_bits(word[pair] & 0xFFFF0000u);
    sums[2 * pair] = __fadd_rn(sums[2 * pair], __fmul_rn(weight, low));
    sums[2 * pair + 1] = __fadd_rn(sums[2 * pair + 1], __fmul_rn(weight, high));
  }
}

/// Rows and weights of kCount slots of a token, as many as there are from `first` on; -1 for a row that is
/// not there. Past L1: read while the kernel before this one ends, or while others of this one write.
template <int kCount>
struct SlotBatch {
  int32_t rows[kCount];
  float weights[kCount];

  __device__ __forceinline__ SlotBatch(const SlotRows& slots, int64_t token, int32_t first) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool there = first + i < slots.top_k;
      rows[i] = there ? __ldcg(slots.row_of_slot + token * slots.top_k + first + i) : -1;
      weights[i] = there && slots.weights != nullptr
                       ? __ldcg(slots.weights + token * slots.weight_stride + first + i)
                       : 1.0f;
    }
  }
};

/// Adds all slots of a token, in order of k, with as many loads in flight as `batch`, the first ones, has.
template <int kCount>
__device__ __forceinline__ void add_slots(const SlotRows& slots, int64_t token, int32_t column,
                                          SlotBatch<kCount> batch, float (&sums)[kColumns]) {
  for (int32_t first = 0;;) {
    uint4 words[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (batch.rows[i] >= 0) words[i] = load_eight(slots.z + batch.rows[i] * slots.z_stride, column);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (batch.rows[i] >= 0) add_weighted(words[i], batch.weights[i], sums);
    }
    first += kCount;
    if (first >= slots.top_k) return;
    batch = SlotBatch<kCount>(slots, token, first);
  }
}

}  // namespace fourfold::cuda
