// Pieces of kernels that walk over rows: sixteen values at a time, a block of threads a row.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/device.h"
#include "fourfold/number_formats.h"
#include "fourfold/tensor.h"
#include "numeric/block_quantizer.h"

namespace fourfold::cuda {

inline constexpr int kMostRowThreads = 512;
inline constexpr int kThreadsPerMultiprocessor = 2048;
inline constexpr int64_t kMostRows = int64_t{1} << 30;

/// A matrix as kernels take it.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;
  bool aligned = false;  ///< every row starts at a multiple of 16 bytes

  Rows() = default;
  explicit Rows(const MatrixView<T>& matrix)
      : data(matrix.data),
        stride(matrix.stride),
        aligned(reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 &&
                matrix.stride * static_cast<int64_t>(sizeof(T)) % 16 == 0) {}

  __device__ T* row(int64_t r) const { return data + r * stride; }
};

/// Threads for rows of `cols`: one for each sixteen values, in whole warps.
inline unsigned row_threads(int64_t cols) {
  return static_cast<unsigned>(std::clamp<int64_t>((cols / kNvfp4Block + 31) / 32 * 32, 32, kMostRowThreads));
}

/// Blocks of threads for so many rows: what the GPU can hold at once; more rows are taken in turn.
inline unsigned row_blocks(int64_t rows, int64_t cols) {
  const int64_t resident = int64_t{multiprocessor_count()} * (kThreadsPerMultiprocessor / row_threads(cols));
  return static_cast<unsigned>(std::min(rows, resident));
}

/// Sixteen bf16 from `source` as float32, past L1: a kernel may begin while the one before it runs, and no
/// line which its multiprocessor kept from an earlier call is to be taken for this one's.
__device__ inline void load_block(const Bf16* source, bool aligned, float (&x)[kNvfp4Block]) {
  if (aligned) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 words = __ldcg(reinterpret_cast<const uint4*>(source) + half);
      const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[half * 8 + 2 * i] = float_from_bits(word[i] << 16);
        x[half * 8 + 2 * i + 1] = float_from_bits(word[i] & 0xFFFF0000u);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kNvfp4Block; ++i) {
      x[i] = float_from_bits(uint32_t{__ldcg(reinterpret_cast<const unsigned short*>(source) + i)} << 16);
    }
  }
}

/// Writes sixteen bf16, pairs of them.
__device__ inline void store_block(const uint32_t (&words)[kNvfp4Block / 2], Bf16* to, bool aligned) {
  if (aligned) {
    reinterpret_cast<uint4*>(to)[0] = make_uint4(words[0], words[1], words[2], words[3]);
    reinterpret_cast<uint4*>(to)[1] = make_uint4(words[4], words[5], words[6], words[7]);
  } else {
#pragma unroll
    for (int i = 0; i < kNvfp4Block; ++i) {
      to[i].bits = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
    }
  }
}

/// Writes sixteen values that bf16 holds exactly.
__device__ inline void store_exact_block(const float (&x)[kNvfp4Block], Bf16* to, bool aligned) {
  uint32_t words[kNvfp4Block / 2];
#pragma unroll
  for (int i = 0; i < kNvfp4Block / 2; ++i) {
    words[i] = __byte_perm(float_bits(x[2 * i]), float_bits(x[2 * i + 1]), 0x7632);  // both upper halves
  }
  store_block(words, to, aligned);
}

/// Largest of the block's `bits`; every thread gets it. Ends with a barrier.
__device__ inline uint32_t block_maximum(uint32_t bits) {
  __shared__ uint32_t of_warps[kMostRowThreads / 32];
  bits = __reduce_max_sync(~0u, bits);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = bits;
  __syncthreads();
  bits = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) bits = max(bits, of_warps[warp]);
  __syncthreads();
  return bits;
}

/// Bits of |x|: they order like the magnitudes, with NaN above infinity.
__device__ inline uint32_t magnitude_bits(float x) {
  return float_bits(x) & 0x7FFFFFFFu;
}

}  // namespace fourfold::cuda
