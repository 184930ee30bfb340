// Where every bit of a weight lives once it is packed for Hopper, as constexpr functions for host and device.
//
// A packed matrix is a row-major grid of units, a unit is 64 rows x 64 k in 2304 bytes: 2048 bytes of codes,
// then 256 bytes of scales. Units of the same 64 rows lie one after the other along k, so that a plain bulk
// copy of n units brings 64 rows x 64n k. Nothing is rounded: codes are moved, scales re-encoded exactly.
//
//   codes:  thread `lane` of warp w reads 16 bytes at (32 w + lane) * 16: four words, word pair p = k-steps
//   2p
//           and 2p+1 (a k-step is 16 k, one NVFP4 block). The bits of a pair are placed for the decode of
//           sm90/packed_decode.h.
//   scales: lanes 4g..4g+3 of warp w read 8 bytes at 2048 + (8 w + g) * 8: two words, word p = the scales of
//           rows 16w+g and 16w+g+8 for k-steps 2p and 2p+1.
//
// A thread's codes are those of the register operand A of wgmma.m64nNk16: lane 4g+t of warp w holds, for
// every k-step, rows 16w+g and 16w+g+8, k = 2t, 2t+1, 2t+8, 2t+9. docs/hopper.md has the picture.
#pragma once

#include <cstdint>

#include "fourfold/scale_layout.h"

namespace fourfold::sm90 {

inline constexpr int kUnitRows = 64;
inline constexpr int kUnitDepth = 64;
inline constexpr int kUnitCodeBytes = kUnitRows * kUnitDepth / 2;
inline constexpr int kUnitScaleBytes = kUnitRows * kUnitDepth / 16;
inline constexpr int kUnitBytes = kUnitCodeBytes + kUnitScaleBytes;
static_assert(kUnitBytes == 2304);

/// How the rows of a packed matrix follow each other.
enum class RowOrder : uint8_t {
  kPlain,  ///< as in the checkpoint
  /// Gate and up of an expert as one matrix: row 16s+r is gate channel 8s+r, row 16s+8+r up channel 8s+r
  /// (r < 8). One thread's accumulators then hold both halves of a channel.
  kGateUpPaired,
};

/// The weights of one expert for one GEMM, before padding.
struct PackedShape {
  RowOrder order = RowOrder::kPlain;
  int64_t channels = 0;  ///< rows of the checkpoint's matrix; of one half when gate and up are paired
  int64_t depth = 0;     ///< K

  FOURFOLD_HOST_DEVICE constexpr int64_t halves() const { return order == RowOrder::kGateUpPaired ? 2 : 1; }
  FOURFOLD_HOST_DEVICE constexpr int64_t rows() const { return channels * halves(); }
  /// Rows in units of 64, k in units of 64; the last of each may be padded with zeros.
  FOURFOLD_HOST_DEVICE constexpr int64_t row_blocks() const { return (rows() + kUnitRows - 1) / kUnitRows; }
  FOURFOLD_HOST_DEVICE constexpr int64_t depth_units() const { return (depth + kUnitDepth - 1) / kUnitDepth; }
  FOURFOLD_HOST_DEVICE constexpr int64_t bytes() const { return row_blocks() * depth_units() * kUnitBytes; }
  FOURFOLD_HOST_DEVICE constexpr int64_t unit_offset(int64_t row_block, int64_t depth_unit) const {
    return (row_block * depth_units() + depth_unit) * kUnitBytes;
  }
};

/// Which row of the checkpoint a packed row is.
struct SourceRow {
  int64_t half = 0;  ///< 0: the matrix itself, or gate; 1: up
  int64_t channel = 0;
};

FOURFOLD_HOST_DEVICE constexpr SourceRow source_row(RowOrder order, int64_t packed_row) {
  if (order == RowOrder::kPlain) return {0, packed_row};
  return {packed_row / 8 % 2, packed_row / 16 * 8 + packed_row % 8};
}

/// One bit of a unit.
struct BitPosition {
  int byte = 0;
  int bit = 0;
};

/// The two code words of a pair hold 64 bits: 2 k-steps x 4 registers x 2 halves x 4 bits. The decode takes
/// register r of k-step s in the pair from a word, rotated left by pair_rotation(4 s + r), at the bits where
/// bf16 has its sign (15) and the lowest three bits that e2m1 needs (8 to 6), in both halves. Three rotations
/// of that bit pattern fit one word without overlap; register 3 of both k-steps takes the bits that are left,
/// from the words that kSpreadMask selects.
FOURFOLD_HOST_DEVICE constexpr int pair_rotation(int slot) {
  return static_cast<int>(0xEC628A40u >> (4 * slot) & 15u);  // 0, 4, 10, 8, 2, 6, 12, 14
}
/// Bits that the spread registers take from the first word of a pair; the others come from the second.
inline constexpr uint32_t kSpreadMask = 0x06030603u;

/// Where bit `code_bit` (3 is the sign) of the code of (row, k) lies in its unit. row, k < 64.
FOURFOLD_HOST_DEVICE constexpr BitPosition code_bit_position(int row, int k, int code_bit) {
  const int warp = row / 16, upper_row = row % 16 / 8, g = row % 8;
  const int step = k / 16, upper_k = k % 16 / 8, t = k % 8 / 2, half = k % 2;
  const int lane = 4 * g + t, slot = 4 * (step % 2) + 2 * upper_k + upper_row;
  const int decoded_bit = (code_bit == 3 ? 15 : 6 + code_bit) + 16 * half;
  const int word_bit = (decoded_bit - pair_rotation(slot) + 32) % 32;
  const bool spread = slot % 4 == 3;
  const bool second_word = spread ? ((kSpreadMask >> word_bit) & 1u) == 0 : step % 2 == 1;
  const int word = step / 2 * 2 + (second_word ? 1 : 0);
  return {(warp * 32 + lane) * 16 + word * 4 + word_bit / 8, word_bit % 8};
}

/// Lowest bit of the re-encoded scale of (row, k-step) in its 32-bit word, and the word's byte offset in the
/// unit. The byte wraps around the word's end for the upper row of odd k-steps.
struct ScalePosition {
  int word_byte = 0;
  int bit = 0;
};

FOURFOLD_HOST_DEVICE constexpr ScalePosition scale_position(int row, int step) {
  const int warp = row / 16, upper_row = row % 16 / 8, g = row % 8;
  return {kUnitCodeBytes + (warp * 8 + g) * 8 + step / 2 * 4, 4 + 16 * upper_row + 8 * (step % 2)};
}

FOURFOLD_HOST_DEVICE constexpr uint32_t rotate_left(uint32_t word, int bits) {
  return bits == 0 ? word : (word << bits) | (word >> (32 - bits));
}

/// How an e4m3 block scale is stored: as a byte with a 5-bit exponent and 3 bits of mantissa, value
/// 2^(exponent - 22) x (1 + mantissa / 8), normalised, so that one mask and one or make a bf16 of it. What
/// has no such form goes into the block's codes: a zero scale zeroes them, a negative one flips their signs.
/// NaN becomes exponent 31, which decodes to a NaN and so gives NaN results, whatever the codes are. All 256
/// values of a scale therefore survive exactly.
struct PackedScale {
  uint8_t byte = 0;
  uint8_t code_and = 0xF;  ///< the block's codes are ANDed with this,
  uint8_t code_xor = 0;    ///< then XORed with this
};

inline constexpr uint8_t kPackedNanScale = 0xFF;

FOURFOLD_HOST_DEVICE constexpr PackedScale pack_scale(uint8_t e4m3) {
  const int exponent = (e4m3 >> 3) & 15, mantissa = e4m3 & 7;
  const uint8_t flip = (e4m3 & 0x80u) ? 8 : 0;
  if ((e4m3 & 0x7Fu) == 0x7Fu) return {kPackedNanScale, 0xF, 0};
  if ((e4m3 & 0x7Fu) == 0) return {0, 0, 0};
  if (exponent > 0) return {static_cast<uint8_t>((exponent - 7 + 22) << 3 | mantissa), 0xF, flip};
  // Subnormal: mantissa x 2^-9, normalised.
  const int shift = mantissa >= 4 ? 1 : mantissa >= 2 ? 2 : 3;
  const int normal = (mantissa << shift) & 7;
  return {static_cast<uint8_t>((-6 - shift + 22) << 3 | normal), 0xF, flip};
}

}  // namespace fourfold::sm90
