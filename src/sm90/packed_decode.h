// Packed codes and scales -> the bf16 register operand of WGMMA, a few bit operations a register.
//
// e2m1 and e5m3 have so few bits that a bf16 can be assembled by moving them into place: the code's sign and
// three bits become a (subnormal) bf16 of code x 2^-126, the scale's eight bits a bf16 of scale x 2^119, and
// their product, scale x code x 2^-7, is exact. Accumulators are therefore 2^7 too small (kDecodedToValue).
//
// The functions run on the host and on the device, so that tests on the CPU run the very code of the kernel.
// `Ops` gives the two operations that need an instruction of their own: HostOps here, PtxOps in ptx.cuh.
#pragma once

#include <cstdint>

#include "fourfold/number_formats.h"
#include "sm90/packed_layout.h"

namespace fourfold::sm90 {

/// What a sum of decoded weights is to be multiplied by.
inline constexpr float kDecodedToValue = 128.0f;

/// Masks that a kernel takes as arguments: with literals, ptxas makes two operations of each LOP3.
struct DecodeMasks {
  uint32_t spread = kSpreadMask;
  uint32_t scale_exponent = 0x70007000u;  ///< bf16 exponents 224 + the 5 bits of a packed scale
};

struct HostOps {
  /// bf16 x bf16 in both halves, rounded to nearest even.
  static uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
    const auto product = [](uint32_t x, uint32_t y) {
      return uint32_t{encode_bf16(float_from_bits(x << 16) * float_from_bits(y << 16)).bits};
    };
    return product(a & 0xFFFFu, b & 0xFFFFu) | product(a >> 16, b >> 16) << 16;
  }
  static uint32_t low_half_twice(uint32_t x) { return (x & 0xFFFFu) * 0x10001u; }
  static uint32_t high_half_twice(uint32_t x) { return (x >> 16) * 0x10001u; }
};

/// Register kRegister of k-step kStep (0 or 1) of a pair of code words, unscaled: two codes x 2^-126.
template <int kStep, int kRegister>
FOURFOLD_HOST_DEVICE constexpr uint32_t decode_codes(uint32_t first, uint32_t second, uint32_t spread_mask) {
  constexpr uint32_t kE2m1Bits = 0x81C081C0u;
  constexpr int kRotation = pair_rotation(4 * kStep + kRegister);
  const uint32_t word = kRegister == 3 ? (first & spread_mask) | (second & ~spread_mask)
                        : kStep == 0   ? first
                                       : second;
  // A shift does where no wanted bit wraps around, and is cheaper.
  constexpr bool kWraps = kRotation > 6;
  return (kWraps ? rotate_left(word, kRotation) : word << kRotation) & kE2m1Bits;
}

/// Scales of k-step kStep (0 or 1) of a pair, x 2^119: the lower row's in the low half, the upper row's in
/// the high half.
template <int kStep>
FOURFOLD_HOST_DEVICE constexpr uint32_t decode_scales(uint32_t scales, uint32_t scale_exponent) {
  return (rotate_left(scales, kStep == 0 ? 0 : 24) & 0x0FF00FF0u) | scale_exponent;
}

/// One k-step of operand A: registers 0 and 2 belong to the lower row, 1 and 3 to the upper one, 0 and 1 to
/// k = 2t, 2t+1, 2 and 3 to k = 2t+8, 2t+9. `first`, `second`: a pair of code words; `scales`: its scale
/// word.
template <class Ops, int kStep>
FOURFOLD_HOST_DEVICE inline void decode_step(uint32_t first, uint32_t second, uint32_t scales,
                                             const DecodeMasks& masks, uint32_t (&a)[4]) {
  const uint32_t scale = decode_scales<kStep>(scales, masks.scale_exponent);
  const uint32_t lower = Ops::low_half_twice(scale), upper = Ops::high_half_twice(scale);
  a[0] = Ops::multiply_bf16x2(decode_codes<kStep, 0>(first, second, masks.spread), lower);
  a[1] = Ops::multiply_bf16x2(decode_codes<kStep, 1>(first, second, masks.spread), upper);
  a[2] = Ops::multiply_bf16x2(decode_codes<kStep, 2>(first, second, masks.spread), lower);
  a[3] = Ops::multiply_bf16x2(decode_codes<kStep, 3>(first, second, masks.spread), upper);
}

}  // namespace fourfold::sm90
