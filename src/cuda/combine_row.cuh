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

/// Adds the slots of a token from `first` on, in order of k, with so many loads in flight.
template <int kSlotsAtOnce>
__device__ __forceinline__ void add_slots(const SlotRows& slots, int64_t token, int32_t column,
                                          float (&sums)[kColumns], int32_t first = 0) {
  for (; first < slots.top_k; first += kSlotsAtOnce) {
    uint4 words[kSlotsAtOnce];
    int32_t rows[kSlotsAtOnce];
#pragma unroll
    for (int i = 0; i < kSlotsAtOnce; ++i) {
      rows[i] = first + i < slots.top_k ? slots.row_of_slot[token * slots.top_k + first + i] : -1;
      if (rows[i] >= 0) words[i] = load_eight(slots.z + rows[i] * slots.z_stride, column);
    }
#pragma unroll
    for (int i = 0; i < kSlotsAtOnce; ++i) {
      if (rows[i] < 0) continue;
      add_weighted(words[i],
                   slots.weights != nullptr ? slots.weights[token * slots.weight_stride + first + i] : 1.0f,
                   sums);
    }
  }
}

}  // namespace fourfold::cuda
