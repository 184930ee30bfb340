// SwiGLU and its variants:
//
//   min(g, limit) * sigmoid(alpha * that) * (clamp(u) + beta), in float32.
//
// NaN goes through the clamps. Where the sigmoid is below 2^-126 (gates below -87.3, for alpha 1) it is taken
// for zero, which an infinite u then makes NaN.
#pragma once

#include <cstdint>

#include "fourfold/moe_layer.h"
#include "fourfold/number_formats.h"
#include "sm90/ptx.cuh"

namespace fourfold::sm90 {

struct SwigluArgs {
  float exponent;  ///< of 2, for a gate of 1: -alpha log2(e)
  float beta, limit;
  uint32_t limits;  ///< twice, in bf16: swiglu_pair() needs a limit that bf16 holds
};

/// A beta of zero becomes -0, which changes no sum.
inline SwigluArgs swiglu_args(const ActivationFunction& activation) {
  constexpr float kLog2E = 1.44269504f;
  return {-kLog2E * activation.alpha, activation.beta == 0.0f ? -0.0f : activation.beta, activation.limit,
          encode_bf16(activation.limit).bits * 0x10001u};
}

__device__ __forceinline__ float swiglu_of_clamped(const SwigluArgs& args, float gate, float up) {
  const float sigmoid = ptx::rcp_approx_ftz(1.0f + ptx::ex2_approx_ftz(args.exponent * gate));
  return gate * sigmoid * __fadd_rn(up, args.beta);
}

/// Of one channel.
__device__ __forceinline__ float swiglu(const SwigluArgs& args, float gate, float up) {
  return swiglu_of_clamped(args, ptx::min_nan(gate, args.limit),
                           ptx::max_nan(ptx::min_nan(up, args.limit), -args.limit));
}

/// Of two pairs of bf16, rounded to bf16: the same values.
__device__ __forceinline__ uint32_t swiglu_pair(const SwigluArgs& args, uint32_t gates, uint32_t ups) {
  gates = ptx::min_nan_bf16x2(gates, args.limits);
  ups = ptx::max_nan_bf16x2(ptx::min_nan_bf16x2(ups, args.limits), args.limits ^ 0x80008000u);
  return ptx::cvt_rn_bf16x2(swiglu_of_clamped(args, ptx::high_bf16(gates), ptx::high_bf16(ups)),
                            swiglu_of_clamped(args, ptx::low_bf16(gates), ptx::low_bf16(ups)));
}

}  // namespace fourfold::sm90
