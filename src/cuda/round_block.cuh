// Rounding of values to NVFP4 on the GPU: what decode(encode(x)) gives, by what the GPU does in few
// instructions. The same bits as numeric/block_quantizer.h, but for the signs of zeros where they are not
// asked for.
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

/// decode_e2m1(encode_e2m1(value)) for magnitudes below 7, but that no zero has a sign. Adding 1.5 x 2^23
/// steps makes the step the unit in the last place, so that the addition rounds, ties to even; two steps are
/// the power of two below the magnitude, or 1.
__device__ __forceinline__ float round_to_e2m1(float value) {
  const float steps = float_from_bits(float_bits(fmaxf(fabsf(value), 1.0f)) & 0x7F800000u);
  return __fmaf_rn(steps, -0x1.8p22f, __fmaf_rn(steps, 0x1.8p22f, value));
}

/// Whether a value times the reciprocal may be above 6.4. It is not where scale and reciprocal are normal:
/// then the scale, which is rounded to four bits, is at least 16/17 of the quotient.
__device__ __forceinline__ bool may_exceed_range(const BlockScale& scale) {
  constexpr uint8_t kSmallestNormal = 0x08;
  return scale.code < kSmallestNormal || scale.code >= kE4m3MaxCode || scale.reciprocal > 0x1p125f;
}

/// What the codes of values of a block with this scale stand for, before the scale multiplies it. kSigns:
/// of zeros, too, as codes have them; no sum depends on these. Where the scale is NaN it is anything. The NaN
/// that an instruction gives, from a reciprocal that is infinite, gives 6, as kE2m1NanCode has it.
template <bool kSigns, int kCount>
__device__ __forceinline__ void round_block(const float (&x)[kCount], const BlockScale& scale,
                                            float (&rounded)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) rounded[i] = __fmul_rn(x[i], scale.reciprocal);
  if (may_exceed_range(scale)) {
#pragma unroll
    for (float& value : rounded) value = fmaxf(fminf(value, kE2m1Max), -kE2m1Max);
  }
#pragma unroll
  for (float& value : rounded) {
    const float sign = value;
    value = round_to_e2m1(value);
    if constexpr (kSigns) value = copysignf(value, sign);
  }
}

/// Two rounded values times their block's scale, as bf16, which holds the products exactly; the first in the
/// low half.
__device__ __forceinline__ uint32_t scale_pair(float low, float high, float scale) {
  const uint32_t scales = __byte_perm(float_bits(scale), 0, 0x3232);  // upper halves: all are bf16
  uint32_t pair;
  asm("mul.rn.bf16x2 %0, %1, %2;"
      : "=r"(pair)
      : "r"(__byte_perm(float_bits(low), float_bits(high), 0x7632)), "r"(scales));
  return pair;
}

}  // namespace fourfold::cuda
