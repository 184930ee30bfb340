// Activation variants of one channel in float32: the formulas of ActivationKind. NaN goes through clamps, as
// in src/reference/stages.cpp.
#pragma once

#include "fourfold/moe_layer.h"

namespace fourfold::cuda {

__device__ inline float clamp_keeping_nan(float value, float low, float high) {
  return value < low ? low : value > high ? high : value;
}
__device__ inline float sigmoid(float x) {
  return 1.0f / (1.0f + expf(-x));
}
__device__ inline float silu(float x) {
  return x / (1.0f + expf(-x));
}
/// erfc, not 1 + erf, which cancels for negative x.
__device__ inline float gelu(float x) {
  return 0.5f * x * erfcf(-x * 0.707106781f);
}
__device__ inline float gelu_tanh(float x) {
  return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
}

__device__ inline float activate(const ActivationFunction& function, float gate, float up) {
  const float limit = function.limit;
  switch (function.kind) {
    case ActivationKind::kSwiglu: {
      const float g = gate > limit ? limit : gate, u = clamp_keeping_nan(up, -limit, limit);
      return g * sigmoid(function.alpha * g) * (function.beta == 0.0f ? u : u + function.beta);
    }
    case ActivationKind::kSwigluStep: {
      const float s = silu(gate);
      return (s > limit ? limit : s) * clamp_keeping_nan(up, -limit, limit);
    }
    case ActivationKind::kGeglu:
      return gelu(gate) * up;
    case ActivationKind::kGegluTanh:
      return gelu_tanh(gate) * up;
    case ActivationKind::kReluSquared: {
      const float positive = up < 0.0f ? 0.0f : up;
      return positive * positive;
    }
    case ActivationKind::kSilu:
      return silu(up);
    case ActivationKind::kGelu:
      return gelu(up);
  }
  return up;
}

}  // namespace fourfold::cuda
