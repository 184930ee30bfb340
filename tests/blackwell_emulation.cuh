// The sm_120 grouped kernel on a Hopper GPU: include this before src/blackwell/cutlass_gemm.cuh, compile for
// sm_90a.
//
// Two things of that kernel can't run on Hopper, and only they are replaced:
//  - the instruction mma.sync.m16n8k64 with block scales: by the same arithmetic in plain code, lane for
//  lane;
//  - tensor maps of 4-bit elements: the same bytes are loaded as UINT8, with half as many elements along K.
// Groups, scheduler, tensor maps that are rewritten on the device, pipeline, scale loads, shared-memory
// layouts and epilogue are those that sm_120 runs. The arithmetic is held against CuTe's own layouts of the
// instruction by tests/blackwell_layout_test.cu, on the host.
#pragma once

#include <cstdint>

#include "cute/tensor.hpp"  // has to come first

#include "blackwell_emulated_loads.h"
#include "blackwell_emulated_multiply.h"
#include "cute/arch/mma_sm120.hpp"
#include "cute/atom/mma_traits_sm120.hpp"

namespace fourfold::emulation {

/// A warp's registers, read by shuffles.
struct ShuffledWarp {
  uint4 a_words;
  uint2 b_words;
  uint32_t a_scale_word, b_scale_word;

  __device__ uint32_t a(int word, int lane) const {
    const uint32_t own = word == 0 ? a_words.x : word == 1 ? a_words.y : word == 2 ? a_words.z : a_words.w;
    return __shfl_sync(~0u, own, lane);
  }
  __device__ uint32_t b(int word, int lane) const {
    return __shfl_sync(~0u, word == 0 ? b_words.x : b_words.y, lane);
  }
  __device__ uint32_t a_scales(int lane) const { return __shfl_sync(~0u, a_scale_word, lane); }
  __device__ uint32_t b_scales(int lane) const { return __shfl_sync(~0u, b_scale_word, lane); }
};

/// Not inlined: the kernel multiplies in many places.
__device__ __noinline__ static float4 multiply_warp(ShuffledWarp warp, float4 c) {
  float sums[4] = {c.x, c.y, c.z, c.w};
  multiply_lane(static_cast<int>(threadIdx.x % 32), warp, sums);
  return make_float4(sums[0], sums[1], sums[2], sums[3]);
}

}  // namespace fourfold::emulation

namespace cute {
namespace SM120::BLOCKSCALED {

/// The instruction of the NVFP4 kernel.
template <>
struct SM120_16x8x64_TN_VS<float_e2m1_t, float_e2m1_t, float, float_ue4m3_t, 16> {
  using DRegisters = float[4];
  using ARegisters = uint32_t[4];
  using BRegisters = uint32_t[2];
  using CRegisters = float[4];
  using RegTypeSF = uint32_t;
  using SFARegisters = RegTypeSF[1];
  using SFBRegisters = RegTypeSF[1];
  static constexpr int SFBits = 32;

  CUTE_HOST_DEVICE static void fma(float& d0, float& d1, float& d2, float& d3, const uint32_t& a0,
                                   const uint32_t& a1, const uint32_t& a2, const uint32_t& a3,
                                   const uint32_t& b0, const uint32_t& b1, const float& c0, const float& c1,
                                   const float& c2, const float& c3, const RegTypeSF& a_scales,
                                   const RegTypeSF& b_scales) {
#if defined(__CUDA_ARCH__)
    const float4 d = fourfold::emulation::multiply_warp(
        {make_uint4(a0, a1, a2, a3), make_uint2(b0, b1), a_scales, b_scales}, make_float4(c0, c1, c2, c3));
    d0 = d.x;
    d1 = d.y;
    d2 = d.z;
    d3 = d.w;
#endif
  }
};

}  // namespace SM120::BLOCKSCALED
}  // namespace cute
