// Everything that is done to rows beside multiplying them, as plain loops that the compiler vectorises:
// row_functions.cpp compiles them once for every instruction set. No fused operations (the project is built
// without contraction), so every instruction set gives the same bits.
#pragma once

#include <cstdint>

#include "cpu/operands.h"
#include "cpu/targets.h"
#include "fourfold/number_formats.h"
#include "fourfold/quantize.h"

namespace fourfold::cpu::loops {

inline constexpr uint32_t kMagnitude = 0x7FFFFFFFu;
inline constexpr uint32_t kInfinityBits = 0x7F800000u;

FOURFOLD_INLINE float to_float(uint32_t bits) {
  return __builtin_bit_cast(float, bits);
}
FOURFOLD_INLINE uint32_t to_bits(float value) {
  return __builtin_bit_cast(uint32_t, value);
}

/// encode_bf16 without a branch.
FOURFOLD_INLINE uint16_t round_to_bf16(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  const uint32_t quiet = bits >> 16 | 0x40u;
  return static_cast<uint16_t>((bits & kMagnitude) > kInfinityBits ? quiet : rounded);
}

/// A float that bf16 holds: `value` rounded.
FOURFOLD_INLINE float rounded_to_bf16(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = bits + 0x7FFFu + (bits >> 16 & 1u);
  const uint32_t quiet = bits | 0x400000u;
  return to_float(((bits & kMagnitude) > kInfinityBits ? quiet : rounded) & 0xFFFF0000u);
}

FOURFOLD_INLINE void widen(const Bf16* x, int64_t cols, float* out) {
  for (int64_t col = 0; col < cols; ++col) out[col] = to_float(uint32_t{x[col].bits} << 16);
}

/// bf16(weight * x), widened.
FOURFOLD_INLINE void widen_weighted(const Bf16* x, float weight, int64_t cols, float* out) {
  for (int64_t col = 0; col < cols; ++col) {
    const float weighted = weight * to_float(uint32_t{x[col].bits} << 16);
    out[col] = to_float(uint32_t{round_to_bf16(weighted)} << 16);
  }
}

FOURFOLD_INLINE void narrow(const float* x, int64_t cols, Bf16* out) {
  for (int64_t col = 0; col < cols; ++col) out[col].bits = static_cast<uint16_t>(to_bits(x[col]) >> 16);
}

/// Magnitudes order like their bits, NaN above infinity: the largest bits are a NaN's if there is one.
FOURFOLD_INLINE float largest_magnitude(const float* x, int64_t cols) {
  uint32_t largest = 0;
  for (int64_t col = 0; col < cols; ++col) {
    const uint32_t magnitude = to_bits(x[col]) & kMagnitude;
    largest = magnitude > largest ? magnitude : largest;
  }
  return to_float(largest);
}

/// encode_e4m3 of a number that is not negative, without a branch.
FOURFOLD_INLINE uint32_t encode_positive_e4m3(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t subnormal = to_bits(value + 16384.0f) - to_bits(16384.0f);
  uint32_t normal = ((bits + 0x7FFFFu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
  normal = normal < kE4m3MaxCode ? normal : uint32_t{kE4m3MaxCode};
  const uint32_t code = bits < to_bits(0.015625f) ? subnormal : normal;
  return bits > kInfinityBits ? uint32_t{kE4m3NanCode} : code;
}

/// decode_e4m3 of a code below 0x80, without a branch.
FOURFOLD_INLINE float decode_positive_e4m3(uint32_t code) {
  const float normal = to_float((code << 20) + (120u << 23));
  const float subnormal = static_cast<float>(static_cast<int32_t>(code)) * 0.001953125f;
  const float value = code < 8 ? subnormal : normal;
  return code == kE4m3NanCode ? to_float(0x7FC00000u) : value;
}

/// encode_e2m1 without a branch.
FOURFOLD_INLINE uint32_t encode_code(float value) {
  const uint32_t bits = to_bits(value), magnitude = bits & kMagnitude;
  // Below 1 codes are multiples of 0.5, which is the unit in the last place of a float in [2^22, 2^23).
  // Above, a code is exponent and one bit of mantissa, rounded in place.
  const uint32_t small = to_bits(to_float(magnitude) + 4194304.0f) - to_bits(4194304.0f);
  uint32_t large = ((magnitude + 0x1FFFFFu + (magnitude >> 22 & 1u)) >> 22) - 252u;
  large = large < 7u ? large : 7u;
  const uint32_t code = magnitude < to_bits(1.0f) ? small : large;
  const uint32_t sign = magnitude > kInfinityBits ? 0u : bits >> 28 & 8u;
  return code | sign;
}

/// decode_e2m1 without a branch.
FOURFOLD_INLINE float decode_code(uint32_t code) {
  const uint32_t magnitude = code & 7u;
  const float normal = to_float((magnitude << 22) + (126u << 23));
  const float positive = magnitude < 2 ? 0.5f * static_cast<float>(static_cast<int32_t>(magnitude)) : normal;
  return to_float(to_bits(positive) | (code & 8u) << 28);
}

/// The block scale by amax / 6 of a block with this amax, not a number where the block holds none.
FOURFOLD_INLINE uint32_t encode_block_scale(float amax, float global) {
  const uint32_t scale = encode_positive_e4m3(amax / 6.0f / global);
  return to_bits(amax) < kInfinityBits ? scale : uint32_t{kE4m3NanCode};
}

/// What values are multiplied by before they are rounded to codes, of a block with this decoded scale.
FOURFOLD_INLINE float reciprocal_of(float decoded, float global) {
  const float reciprocal = 1.0f / (decoded * global);
  return decoded == 0.0f ? 0.0f : reciprocal;
}

/// Scratch of the quantizers, for rows of `cols` values.
struct QuantizerScratch {
  float* reciprocals;  ///< [cols / 16]
  uint32_t* codes;     ///< [cols]
  float* residual;     ///< [cols]
};

/// quantize_row_nvfp4 of fourfold/quantize.h with ScaleFloor::kNone, bit for bit.
FOURFOLD_INLINE void quantize_nvfp4(const float* x, int64_t cols, float global, uint8_t* codes,
                                    uint8_t* scales, const QuantizerScratch& scratch) {
  const int64_t blocks = cols / kBlockDepth;
  for (int64_t block = 0; block < blocks; ++block) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < kBlockDepth; ++i) {
      const uint32_t magnitude = to_bits(x[block * kBlockDepth + i]) & kMagnitude;
      largest = magnitude > largest ? magnitude : largest;
    }
    scratch.reciprocals[block] = to_float(largest);
  }
  for (int64_t block = 0; block < blocks; ++block) {
    const float amax = scratch.reciprocals[block];
    const uint32_t scale = encode_block_scale(amax, global);
    scratch.reciprocals[block] = reciprocal_of(decode_positive_e4m3(scale), global);
    scales[block] = static_cast<uint8_t>(scale);
  }
  for (int64_t block = 0; block < blocks; ++block) {
    const float reciprocal = scratch.reciprocals[block];
    for (int64_t i = 0; i < kBlockDepth; ++i) {
      const int64_t k = block * kBlockDepth + i;
      scratch.codes[k] = encode_code(x[k] * reciprocal);
    }
  }
  for (int64_t i = 0; i < cols / 2; ++i) {
    uint64_t two = 0;  // codes of k = 2i in the low half, of 2i + 1 in the high one
    __builtin_memcpy(&two, scratch.codes + 2 * i, sizeof(two));
    codes[i] = static_cast<uint8_t>(two | two >> 28);
  }
}

/// What quantize_nvfp4 left of `x`, whose codes are still in the scratch: x - q1 with the same rounding as
/// quantize_row_nvfp4x2.
FOURFOLD_INLINE void subtract_quantized(const float* x, int64_t cols, float global, const uint8_t* scales,
                                        const QuantizerScratch& scratch) {
  for (int64_t block = 0; block < cols / kBlockDepth; ++block) {
    const float scale = decode_positive_e4m3(scales[block]);
    for (int64_t i = 0; i < kBlockDepth; ++i) {
      const int64_t k = block * kBlockDepth + i;
      const float value = decode_code(scratch.codes[k]) * scale;
      scratch.residual[k] = x[k] - value * global;
    }
  }
}

/// Blocks of which a search over scales goes through side by side: every lane of a vector tries a candidate
/// of its own block.
inline constexpr int kSearchLanes = 16;

struct SearchedBlocks {
  alignas(64) float x[kBlockDepth][kSearchLanes];
  alignas(64) uint32_t codes[kBlockDepth][kSearchLanes], tried[kBlockDepth][kSearchLanes];
  alignas(64) double error[kSearchLanes], tried_error[kSearchLanes];
  alignas(64) uint32_t scales[kSearchLanes], candidates[kSearchLanes], first[kSearchLanes];
  alignas(64) float amax[kSearchLanes];
};

/// Quantizes all lanes with the scales `candidates` into `codes` and `error`.
FOURFOLD_INLINE void quantize_lanes(const SearchedBlocks& blocks, float global,
                                    uint32_t (&codes)[kBlockDepth][kSearchLanes],
                                    double (&error)[kSearchLanes]) {
  alignas(64) float decoded[kSearchLanes], reciprocal[kSearchLanes];
  for (int lane = 0; lane < kSearchLanes; ++lane) {
    decoded[lane] = decode_positive_e4m3(blocks.candidates[lane]);
    reciprocal[lane] = reciprocal_of(decoded[lane], global);
    error[lane] = 0.0;
  }
  for (int k = 0; k < kBlockDepth; ++k) {
    for (int lane = 0; lane < kSearchLanes; ++lane) {
      const float x = blocks.x[k][lane];
      const uint32_t code = encode_code(x * reciprocal[lane]);
      codes[k][lane] = code;
      const double difference = double{x} - double{(decode_code(code) * decoded[lane]) * global};
      error[lane] += difference * difference;
    }
  }
}

/// quantize_row_nvfp4 of fourfold/quantize.h with ScaleFloor::kNone by a rule that tries several scales, bit
/// for bit. What has nothing to choose from keeps the first: zeros, whose error is 0, and blocks that are not
/// finite, whose error is NaN.
FOURFOLD_INLINE void quantize_nvfp4_searching(ScaleRule rule, const float* x, int64_t cols, float global,
                                              uint8_t* codes, uint8_t* scales) {
  constexpr int kOctave = 8;  // codes of e4m3
  const int tries = rule == ScaleRule::kFourOverSix ? 1 : 2 * kOctave + 1;
  SearchedBlocks blocks;
  const int64_t count = cols / kBlockDepth;
  for (int64_t begin = 0; begin < count; begin += kSearchLanes) {
    const int present = static_cast<int>(count - begin < kSearchLanes ? count - begin : kSearchLanes);
    for (int lane = 0; lane < kSearchLanes; ++lane) {
      const float* const block = x + (begin + (lane < present ? lane : 0)) * kBlockDepth;
      for (int k = 0; k < kBlockDepth; ++k) blocks.x[k][lane] = block[k];
    }
    for (int lane = 0; lane < kSearchLanes; ++lane) {
      uint32_t largest = 0;
      for (int k = 0; k < kBlockDepth; ++k) {
        const uint32_t magnitude = to_bits(blocks.x[k][lane]) & kMagnitude;
        largest = magnitude > largest ? magnitude : largest;
      }
      blocks.amax[lane] = to_float(largest);
      blocks.first[lane] = encode_block_scale(blocks.amax[lane], global);
      blocks.scales[lane] = blocks.candidates[lane] = blocks.first[lane];
    }
    quantize_lanes(blocks, global, blocks.codes, blocks.error);
    for (int step = 0; step < tries; ++step) {
      for (int lane = 0; lane < kSearchLanes; ++lane) {
        const uint32_t fourth = encode_positive_e4m3(blocks.amax[lane] / 4.0f / global);
        const auto near = static_cast<int32_t>(blocks.first[lane]) + step - kOctave;
        const auto chosen = rule == ScaleRule::kFourOverSix ? static_cast<int32_t>(fourth) : near;
        const int32_t positive = chosen < kE4m3SmallestCode ? kE4m3SmallestCode : chosen;
        blocks.candidates[lane] = static_cast<uint32_t>(positive < kE4m3MaxCode ? positive : kE4m3MaxCode);
      }
      quantize_lanes(blocks, global, blocks.tried, blocks.tried_error);
      uint32_t better[kSearchLanes];
      for (int lane = 0; lane < kSearchLanes; ++lane) {
        better[lane] = blocks.tried_error[lane] < blocks.error[lane] ? ~uint32_t{0} : 0;
        blocks.error[lane] = better[lane] != 0 ? blocks.tried_error[lane] : blocks.error[lane];
        blocks.scales[lane] = better[lane] != 0 ? blocks.candidates[lane] : blocks.scales[lane];
      }
      for (int k = 0; k < kBlockDepth; ++k) {
        for (int lane = 0; lane < kSearchLanes; ++lane) {
          blocks.codes[k][lane] =
              (blocks.tried[k][lane] & better[lane]) | (blocks.codes[k][lane] & ~better[lane]);
        }
      }
    }
    for (int lane = 0; lane < present; ++lane) {
      scales[begin + lane] = static_cast<uint8_t>(blocks.scales[lane]);
      for (int k = 0; k < kBlockDepth; k += 2) {
        codes[((begin + lane) * kBlockDepth + k) / 2] =
            static_cast<uint8_t>(blocks.codes[k][lane] | blocks.codes[k + 1][lane] << 4);
      }
    }
  }
}

/// encode_e4m3, for either sign.
FOURFOLD_INLINE void encode_fp8(const float* x, int64_t cols, float reciprocal, uint8_t* codes) {
  for (int64_t col = 0; col < cols; ++col) {
    const uint32_t bits = to_bits(x[col] * reciprocal), magnitude = bits & kMagnitude;
    const uint32_t code = encode_positive_e4m3(to_float(magnitude));
    codes[col] = static_cast<uint8_t>(code == kE4m3NanCode ? code : code | (bits >> 24 & 0x80u));
  }
}

/// decode_e4m3 of a row, without a table.
FOURFOLD_INLINE void decode_fp8(const uint8_t* codes, int64_t cols, float* out) {
  constexpr uint32_t kExponents = 127 - 7;  // between the biases of float32 and e4m3
  for (int64_t col = 0; col < cols; ++col) {
    const uint32_t code = codes[col], magnitude = code & 0x7Fu;
    const uint32_t normal = (magnitude << 20) + (kExponents << 23);
    const uint32_t subnormal = to_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f);
    uint32_t bits = magnitude < 8 ? subnormal : normal;
    bits = magnitude == kE4m3NanCode ? 0x7FC00000u : bits;
    out[col] = to_float(bits | (code & 0x80u) << 24);
  }
}

/// e2m1 x e4m3 of a row. Exact.
FOURFOLD_INLINE void decode_nvfp4(const uint8_t* codes, const float* scales, int64_t cols, float* out) {
  for (int64_t block = 0; block < cols / kBlockDepth; ++block) {
    const float scale = scales[block];
    for (int64_t i = 0; i < kBlockDepth; ++i) {
      const int64_t k = block * kBlockDepth + i;
      const uint32_t code = static_cast<uint32_t>(codes[k / 2]) >> (4 * (i % 2)), magnitude = code & 7u;
      const float normal = to_float((magnitude << 22) + (126u << 23));
      const float positive =
          magnitude < 2 ? 0.5f * static_cast<float>(static_cast<int32_t>(magnitude)) : normal;
      out[k] = to_float(to_bits(positive) | (code & 8u) << 28) * scale;
    }
  }
}

/// bf16 of x * factor, exact where it is not below bf16's normal range, padded with zeros to whole chunks: 32
/// values at `out`, the next 32 `stride` values on (a row of a matrix of tiles; with stride 32, a plain row).
FOURFOLD_INLINE void write_scaled_bf16(const float* x, int64_t cols, float factor, int64_t stride, Bf16* out,
                                       const Bf16* ask_for) {
  const auto scaled = [&](int64_t k) { return static_cast<uint16_t>(to_bits(x[k] * factor) >> 16); };
  int64_t k = 0;
  for (; k + kTileDepth <= cols; k += kTileDepth, out += stride, ask_for += stride) {
    __builtin_prefetch(ask_for, 1, 2);
    for (int64_t i = 0; i < kTileDepth; ++i) out[i].bits = scaled(k + i);
  }
  for (; k < chunks_of(cols) * kChunkDepth; k += kTileDepth, out += stride) {
    for (int64_t i = 0; i < kTileDepth; ++i) out[i].bits = k + i < cols ? scaled(k + i) : uint16_t{0};
  }
}

}  // namespace fourfold::cpu::loops
