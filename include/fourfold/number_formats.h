// Number formats bit by bit: e2m1, e4m3fn, e8m0, bf16 and f16, usable from host and device code.
//
// Decoding is exact. Encoding rounds to nearest, ties to even, from float32. docs/formats.md, section 1, is
// the prose of this file; tests run every code of every format against ml_dtypes.
#pragma once

#include <cstdint>
#include <limits>

#include "fourfold/export.h"

#if defined(__CUDACC__)
#define FOURFOLD_HOST_DEVICE __host__ __device__
#else
#define FOURFOLD_HOST_DEVICE
#endif

namespace FOURFOLD_EXPORT fourfold {

FOURFOLD_HOST_DEVICE constexpr uint32_t float_bits(float value) {
  return __builtin_bit_cast(uint32_t, value);
}
FOURFOLD_HOST_DEVICE constexpr float float_from_bits(uint32_t bits) {
  return __builtin_bit_cast(float, bits);
}

/// bfloat16: the upper half of a float32.
struct Bf16 {
  uint16_t bits = 0;

  /// Exact.
  FOURFOLD_HOST_DEVICE constexpr explicit operator float() const {
    return float_from_bits(uint32_t{bits} << 16);
  }

  friend constexpr bool operator==(Bf16,
                                   Bf16) = default;  ///< same bits: -0 differs from +0, NaN equals itself
};

/// Rounds to nearest even; overflows to infinity; a NaN stays a (quiet) NaN.
FOURFOLD_HOST_DEVICE constexpr Bf16 encode_bf16(float value) {
  const uint32_t bits = float_bits(value);
  if (value != value) return Bf16{static_cast<uint16_t>((bits >> 16) | 0x40u)};
  const uint32_t ties_to_even = 0x7FFFu + ((bits >> 16) & 1u);
  return Bf16{static_cast<uint16_t>((bits + ties_to_even) >> 16)};
}

inline constexpr float kE2m1Max = 6.0f;
inline constexpr uint8_t kE2m1NanCode = 0x7;  ///< e2m1 has no NaN: +6, as PTX `cvt.rn.satfinite` does

/// Value of an e2m1 code (0-15; higher bits are ignored). Bit 3 is the sign, -0 exists.
FOURFOLD_HOST_DEVICE constexpr float decode_e2m1(uint8_t code) {
  // Codes 0 and 1 are subnormal (0, 0.5); the others are (1 + m/2) * 2^(e-1).
  const uint32_t exponent = (code >> 1) & 3u, mantissa = code & 1u;
  const float magnitude = exponent == 0 ? 0.5f * static_cast<float>(mantissa)
                                        : float_from_bits(((exponent + 126u) << 23) | (mantissa << 22));
  return (code & 8u) ? -magnitude : magnitude;
}

/// Nearest e2m1 code, ties to the even mantissa, saturating at 6. The sign is kept: a negative value that
/// rounds to zero is code 8. NaN gives kE2m1NanCode.
FOURFOLD_HOST_DEVICE constexpr uint8_t encode_e2m1(float value) {
  if (value != value) return kE2m1NanCode;
  const float magnitude = float_from_bits(float_bits(value) & 0x7FFFFFFFu);
  // Midpoints between neighbours; `>=` where the upper neighbour is the even one.
  const int code = (magnitude > 0.25f) + (magnitude >= 0.75f) + (magnitude > 1.25f) + (magnitude >= 1.75f) +
                   (magnitude > 2.5f) + (magnitude >= 3.5f) + (magnitude > 5.0f);
  return static_cast<uint8_t>(code | ((float_bits(value) >> 28) & 8u));
}

inline constexpr float kE4m3Max = 448.0f;
inline constexpr uint8_t kE4m3MaxCode = 0x7E;
inline constexpr uint8_t kE4m3NanCode = 0x7F;
inline constexpr uint8_t kE4m3One = 0x38;
inline constexpr uint8_t kE4m3SmallestCode = 0x01;  ///< 2^-9, the smallest subnormal

/// Value of an e4m3fn code: bias 7, no infinity, 0x7F and 0xFF are NaN.
FOURFOLD_HOST_DEVICE constexpr float decode_e4m3(uint8_t code) {
  const uint32_t exponent = (code >> 3) & 15u, mantissa = code & 7u;
  float magnitude = 0.0f;
  if ((code & 0x7Fu) == 0x7Fu) {
    magnitude = float_from_bits(0x7FC00000u);
  } else if (exponent == 0) {
    magnitude = static_cast<float>(mantissa) * 0.001953125f;  // 2^-9
  } else {
    magnitude = float_from_bits(((exponent + 120u) << 23) | (mantissa << 20));
  }
  return (code & 0x80u) ? -magnitude : magnitude;
}

/// Nearest e4m3fn code, ties to even, saturating at 448 (infinity too). NaN gives 0x7F, without its sign.
FOURFOLD_HOST_DEVICE constexpr uint8_t encode_e4m3(float value) {
  if (value != value) return kE4m3NanCode;
  const uint32_t sign = (float_bits(value) >> 24) & 0x80u;
  const uint32_t magnitude = float_bits(value) & 0x7FFFFFFFu;
  uint32_t code = 0;
  if (magnitude < float_bits(0.015625f)) {
    // Below 2^-6 codes are multiples of 2^-9, which is the unit in the last place of a float in [2^14, 2^15):
    // the addition does the rounding.
    code = float_bits(float_from_bits(magnitude) + 16384.0f) - float_bits(16384.0f);
  } else {
    const uint32_t ties_to_even = 0x7FFFFu + ((magnitude >> 20) & 1u);
    code = ((magnitude + ties_to_even) >> 20) - (120u << 3);
    if (code > kE4m3MaxCode) code = kE4m3MaxCode;
  }
  return static_cast<uint8_t>(code | sign);
}

inline constexpr uint8_t kE8m0NanCode = 0xFF;
inline constexpr int kE8m0Bias = 127;

/// Value of an e8m0 code: 2^(code-127); 0xFF is NaN. Code 0 is 2^-127, a subnormal float32.
FOURFOLD_HOST_DEVICE constexpr float decode_e8m0(uint8_t code) {
  if (code == kE8m0NanCode) return float_from_bits(0x7FC00000u);
  return code == 0 ? float_from_bits(0x00400000u) : float_from_bits(uint32_t{code} << 23);
}

/// Value of an IEEE binary16 pattern. Exact.
FOURFOLD_HOST_DEVICE constexpr float decode_f16(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16, exponent = (bits >> 10) & 31u,
                 mantissa = bits & 0x3FFu;
  if (exponent == 31) return float_from_bits(sign | 0x7F800000u | (mantissa << 13));
  if (exponent != 0) return float_from_bits(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -magnitude : magnitude;
}

/// 2^exponent, exact down to the smallest subnormal float32. exponent in [-149, 127].
FOURFOLD_HOST_DEVICE constexpr float power_of_two(int exponent) {
  return exponent >= -126 ? float_from_bits(static_cast<uint32_t>(exponent + 127) << 23)
                          : float_from_bits(1u << (exponent + 149));
}

}  // namespace fourfold
