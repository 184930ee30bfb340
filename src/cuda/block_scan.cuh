// Prefix sums over the threads of a block.
#pragma once

#include <cstdint>

namespace fourfold::cuda {

/// Inclusive prefix sum of `value` over the lanes of a full warp.
__device__ inline int32_t warp_inclusive_scan(int32_t value) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int distance = 1; distance < 32; distance *= 2) {
    const int32_t below = __shfl_up_sync(~0u, value, static_cast<unsigned>(distance));
    if (lane >= distance) value += below;
  }
  return value;
}

/// offsets[i] = sum of counts[0, i) for i in [0, count]; offsets has count + 1 entries. All threads of a
/// one-dimensional block of whole warps, at most 1024 threads, take part. `counts` may be `offsets + 1`.
/// Ends with a barrier.
__device__ inline void block_exclusive_offsets(const int32_t* counts, int count, int32_t* offsets) {
  __shared__ int32_t warp_sums[32];
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int warps = static_cast<int>(blockDim.x / 32);
  int32_t carry = 0;
  for (int first = 0; first < count; first += static_cast<int>(blockDim.x)) {
    const int index = first + static_cast<int>(threadIdx.x);
    int32_t sum = warp_inclusive_scan(index < count ? counts[index] : 0);
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    if (warp == 0) {
      const int32_t of_warp = lane < warps ? warp_sums[lane] : 0;
      warp_sums[lane] = warp_inclusive_scan(of_warp);
    }
    __syncthreads();
    sum += carry + (warp > 0 ? warp_sums[warp - 1] : 0);
    carry += warp_sums[warps - 1];
    if (index < count) offsets[index + 1] = sum;
    __syncthreads();
  }
  if (threadIdx.x == 0) offsets[0] = 0;
  __syncthreads();
}

}  // namespace fourfold::cuda
