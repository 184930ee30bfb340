// The epilogues: sums of a pair -> h, the activation between the GEMMs, and combine; plain loops like
// row_loops.h.
//
// exp is a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2] (Cephes' expf, relative error below 2e-7),
// computed for arguments that are not positive so that nothing overflows: silu(x) = x * (x < 0 ? e : 1) / (1
// + e), e = exp(-|x|). With the divisions and products that follow, a relative error below 1e-6 reaches the
// rounding to bf16, whose half unit is at least 2e-3: about one element in 2000 falls to the other side of a
// rounding boundary, which costs a relative L2 of 1e-4. erfc is by W. J. Cody's kind of fit as in Numerical
// Recipes (erfcc, fractional error below 1.2e-7 everywhere); its exponent, up to 90, is rounded to float32,
// which adds 90 * 2^-24 = 5e-6.
#pragma once

#include <cstdint>

#include "cpu/row_loops.h"
#include "fourfold/moe_layer.h"

namespace fourfold::cpu::loops {

/// exp(x) for x <= 0 (or a rounding above); NaN goes through.
FOURFOLD_INLINE float exp_nonpositive(float x) {
  constexpr float kLowest = -104.0f;  // exp is below the smallest subnormal
  x = x < kLowest ? kLowest : x;
  const float shifted = x * 1.44269504f + kFloatBias;  // the integer n nearest to x / ln 2, as low bits
  const uint32_t n = to_bits(shifted) - to_bits(kFloatBias);
  const float nearest = shifted - kFloatBias;
  const float r = x - nearest * 0.693359375f + nearest * 2.12194440e-4f;  // the first product is exact
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors: n goes down to -150.
  const uint32_t half = static_cast<uint32_t>(static_cast<int32_t>(n) >> 1);
  return p * to_float((half + 127u) << 23) * to_float((n - half + 127u) << 23);
}

/// x * sigmoid(y).
FOURFOLD_INLINE float times_sigmoid(float x, float y) {
  const float e = exp_nonpositive(-to_float(to_bits(y) & kMagnitude));
  return x * (y >= 0.0f ? 1.0f : e) / (1.0f + e);
}

/// x / 2 * erfc(-x / sqrt 2).
FOURFOLD_INLINE float gelu(float x) {
  const float argument = x * -0.70710678f, z = to_float(to_bits(argument) & kMagnitude);
  const float t = 1.0f / (1.0f + 0.5f * z);
  float p = 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  const float tail = t * exp_nonpositive(p * t - 1.26551223f - z * z);
  return 0.5f * x * (argument >= 0.0f ? tail : 2.0f - tail);
}

FOURFOLD_INLINE float gelu_tanh(float x) {
  return times_sigmoid(x, 1.59576912f * (x + 0.044715f * x * x * x));  // 2 sqrt(2 / pi)
}

/// Keeps NaN, like the reference's.
FOURFOLD_INLINE float clamp_keeping_nan(float value, float low, float high) {
  const float raised = value < low ? low : value;
  return raised > high ? high : raised;
}

template <ActivationKind kKind>
FOURFOLD_INLINE float activate(float gate, float up, float alpha, float beta, float limit) {
  if constexpr (kKind == ActivationKind::kSwiglu) {
    const float g = gate > limit ? limit : gate;
    const float u = clamp_keeping_nan(up, -limit, limit);
    return times_sigmoid(g, alpha * g) * (beta == 0.0f ? u : u + beta);
  } else if constexpr (kKind == ActivationKind::kSwigluStep) {
    const float gated = times_sigmoid(gate, gate);
    return (gated > limit ? limit : gated) * clamp_keeping_nan(up, -limit, limit);
  } else if constexpr (kKind == ActivationKind::kGeglu) {
    return gelu(gate) * up;
  } else if constexpr (kKind == ActivationKind::kGegluTanh) {
    return gelu_tanh(gate) * up;
  } else if constexpr (kKind == ActivationKind::kReluSquared) {
    const float positive = up < 0.0f ? 0.0f : up;
    return positive * positive;
  } else if constexpr (kKind == ActivationKind::kSilu) {
    return times_sigmoid(up, up);
  } else {
    return gelu(up);
  }
}

}  // namespace fourfold::cpu::loops
