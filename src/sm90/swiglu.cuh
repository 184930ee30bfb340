// SwiGLU and its variants on one channel.
#pragma once

#include "fourfold/moe_layer.h"
#include "sm90/ptx.cuh"

namespace fourfold::sm90 {

struct SwigluArgs {
  float alpha, beta, limit;
};

/// A beta of zero becomes -0, which changes no sum.
inline SwigluArgs swiglu_args(const ActivationFunction& activation) {
  return {activation.alpha, activation.beta == 0.0f ? -0.0f : activation.beta, activation.limit};
}

/// min(g, limit) * sigmoid(alpha * that) * (clamp(u) + beta), in float32. NaN goes through the clamps.
__device__ __forceinline__ float swiglu(const SwigluArgs& args, float gate, float up) {
  constexpr float kLog2E = 1.44269504f;
  const float g = ptx::min_nan(gate, args.limit);
  const float u = ptx::max_nan(ptx::min_nan(up, args.limit), -args.limit);
  const float z = args.alpha * g;
  const float sigmoid = ptx::rcp_approx(1.0f + ptx::ex2_approx(-kLog2E * z));
  return g * sigmoid * __fadd_rn(u, args.beta);
}

}  // namespace fourfold::sm90
