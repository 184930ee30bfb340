// Rounding of values to e2m1 on the GPU: what decode(encode(x)) gives, without the codes.
#pragma once

#include "fourfold/number_formats.h"
#include "numeric/block_quantizer.h"

namespace fourfold::cuda {

/// decode_e2m1(encode_e2m1(value)) in a few instructions. Adding 1.5 x 2^23 steps makes the step the unit in
/// the last place, so that the addition rounds, ties to even. NaN gives 6, as kE2m1NanCode has it.
__device__ __forceinline__ float round_to_e2m1(float value) {
  const float magnitude = fminf(fabsf(value), kE2m1Max);
  const float anchor = magnitude < 2.0f ? 0x1.8p22f : magnitude < 4.0f ? 0x1.8p23f : 0x1.8p24f;
  return copysignf(__fsub_rn(__fadd_rn(magnitude, anchor), anchor), value);
}

}  // namespace fourfold::cuda
