// The quantizer of one NVFP4 block: the arithmetic of fourfold/quantize.h and nothing else. GPUs have their
// own instructions for it, cuda/round_block.cuh, which give the same bits.
#pragma once

#include <cstdint>

#include "fourfold/number_formats.h"

namespace fourfold {

inline constexpr int kNvfp4Block = 16;

/// max(|a|, |b|) that keeps NaN.
constexpr float max_magnitude(float a, float b) {
  const float magnitude = float_from_bits(float_bits(b) & 0x7FFFFFFFu);
  return (magnitude > a || magnitude != magnitude) ? magnitude : a;
}

FOURFOLD_HOST_DEVICE constexpr bool is_finite(float value) {
  return (float_bits(value) & 0x7F800000u) != 0x7F800000u;
}

/// e4m3 scale of a block with this amax. `modelopt_floor`: at least 2^-9, and 1.0 for a block of zeros.
constexpr uint8_t nvfp4_block_scale(float amax, float global, bool modelopt_floor) {
  if (!is_finite(amax)) return kE4m3NanCode;
  if (modelopt_floor && amax == 0.0f) return kE4m3One;
  const uint8_t scale = encode_e4m3(amax / 6.0f / global);
  return modelopt_floor && scale == 0 ? kE4m3SmallestCode : scale;
}

/// What values are multiplied by before rounding to e2m1.
constexpr float nvfp4_reciprocal(uint8_t scale, float global) {
  const float decoded = decode_e4m3(scale);
  return decoded == 0.0f ? 0.0f : 1.0f / (decoded * global);
}

/// Quantizes 16 values: writes 8 bytes of codes, returns the scale.
constexpr uint8_t quantize_nvfp4_block(const float* x, float global, bool modelopt_floor, uint8_t* codes) {
  float amax = 0.0f;
  for (int i = 0; i < kNvfp4Block; ++i) amax = max_magnitude(amax, x[i]);
  const uint8_t scale = nvfp4_block_scale(amax, global, modelopt_floor);
  const float reciprocal = nvfp4_reciprocal(scale, global);
  for (int i = 0; i < kNvfp4Block; i += 2) {
    const uint8_t low = encode_e2m1(x[i] * reciprocal), high = encode_e2m1(x[i + 1] * reciprocal);
    codes[i / 2] = static_cast<uint8_t>(low | (high << 4));
  }
  return scale;
}

}  // namespace fourfold
