// Rounding of values to NVFP4 on the GPU: what decode(encode(x)) gives, by what the GPU does in few
// instructions. The same bits as numeric/block_quantizer.h.
#pragma once

#include <cstdint>

#include "fourfold/number_formats.h"
#include "numeric/block_quantizer.h"

namespace fourfold::cuda {

/// max(a, |b|), NaN if either is.
__device__ __forceinline__ float max_magnitude_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(fabsf(b)));
  return r;
}

/// encode_e4m3 by the GPU's conversion.
__device__ __forceinline__ uint8_t convert_to_e4m3(float value) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(value));
  return static_cast<uint8_t>(pair);
}

/// decode_e4m3 by the GPU's conversion.
__device__ __forceinline__ float convert_from_e4m3(uint8_t code) {
  float value;
  asm("{\n"
      ".reg .b32 halves;\n"
      ".reg .b16 low, high;\n"
      "cvt.rn.f16x2.e4m3x2 halves, %1;\n"
      "mov.b32 {low, high}, halves;\n"
      "cvt.f32.f16 %0, low;\n"
      "}"
      : "=f"(value)
      : "h"(static_cast<uint16_t>(code)));
  return value;
}

/// The scale of a block.
struct BlockScale {
  uint8_t code;      ///< nvfp4_block_scale, without ModelOpt's floor
  float value;       ///< what it stands for
  float reciprocal;  ///< nvfp4_reciprocal
};

/// `sixth`: of the largest magnitude, by division.
__device__ __forceinline__ BlockScale block_scale(float sixth, float global) {
  const uint8_t code = is_finite(sixth) ? convert_to_e4m3(sixth / global) : kE4m3NanCode;
  const float value = convert_from_e4m3(code);
  return {code, value, value == 0.0f ? 0.0f : 1.0f / (value * global)};
}

/// decode_e2m1(encode_e2m1(value)). Adding 1.5 x 2^23 steps makes the step the unit in the last place, so
/// that the addition rounds, ties to even; two steps are the power of two below the magnitude, or 1. The
/// NaN that an instruction gives, which has no sign, gives 6, as kE2m1NanCode has it.
__device__ __forceinline__ float round_to_e2m1(float value) {
  const float magnitude = fminf(fabsf(value), kE2m1Max);
  const float steps = float_from_bits(float_bits(fmaxf(magnitude, 1.0f)) & 0x7F800000u);
  const float sum = __fmaf_rn(steps, 0x1.8p22f, magnitude);
  return copysignf(__fmaf_rn(steps, -0x1.8p22f, sum), value);
}

}  // namespace fourfold::cuda
