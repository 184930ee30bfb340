// Activations as the kernels read them. Which form a group of rows takes follows from the instruction set,
// the activation format and the number of rows (kernels.h).
#pragma once

#include <cstdint>

#include "cpu/panel_layout.h"

namespace fourfold::cpu {

enum class OperandForm : uint8_t {
  kInts,      ///< NVFP4 as integers: IntBlock [row][block]
  kFloats,    ///< float32 [row][K padded to chunks]
  kBf16Rows,  ///< bf16 [row][K padded to chunks], bf16 rows divided by a power of two
  kTiles,     ///< bf16 tiles of 16 rows x 32 k: [row / 16][k / 32][term][row % 16][k % 32]
};

/// A block of 16 activations for byte products. A weight's byte is 2 x its e2m1 value + 12, from 0 to 24;
/// an activation's is 2 x its value, from -12 to 12. The sum of their products over a block is exact:
///
///   sum (2w + 12) * 2a  =  4 sum w*a  +  12 sum 2a
///
/// `start` takes the second term away before it comes, and makes the integer a float: added to the bits of
/// 1.5 * 2^23, an integer below 2^22 in magnitude is the bits of 1.5 * 2^23 plus itself.
struct IntBlock {
  int8_t codes[kBlockDepth];  ///< 2 x value, in the order of int_position()
  int32_t start;              ///< kIntBias - 12 * (sum of codes)
  float scale;                ///< e4m3 value * kIntScale
};
static_assert(sizeof(IntBlock) == 24);

inline constexpr int kWeightBias = 12;
inline constexpr float kFloatBias = 12582912.0f;  // 1.5 * 2^23
inline constexpr int32_t kIntBias = __builtin_bit_cast(int32_t, kFloatBias);
// A weight's scale is read as the fp16 number with its bits, e4m3 value * 2^-8; the doubled codes make 4.
inline constexpr float kScaleUnit = 0x1p-8f;
inline constexpr float kIntScale = 1.0f / kScaleUnit / 4.0f;

/// Where the `k`th of a block lies in IntBlock::codes: as the bytes of a packed word come out of it, the low
/// nibbles of the four bytes first, then the high ones.
constexpr int int_position(int k) {
  const int nibble = nibble_of(k % 8);
  return k / 8 * 8 + nibble % 2 * 4 + nibble / 2;
}

// Tiles multiply bf16 weights of value * 2^-112 (tile_multiply.inc): activations come 2^112 times as large.
inline constexpr int kTileExponent = 112;
inline constexpr float kTileScale = 0x1p112f;  // 2^kTileExponent
inline constexpr int kTileRows = 16;
inline constexpr int kTileDepth = 32;
inline constexpr int kTileBytes = kTileRows * kTileDepth * 2;

/// Bytes of one row.
constexpr int64_t operand_row_bytes(OperandForm form, int64_t depth) {
  const int64_t chunks = chunks_of(depth);
  switch (form) {
    case OperandForm::kInts:
      return chunks * kBlocksPerChunk * static_cast<int64_t>(sizeof(IntBlock));
    case OperandForm::kFloats:
      return chunks * kChunkDepth * 4;
    case OperandForm::kBf16Rows:
    case OperandForm::kTiles:
      return chunks * kChunkDepth * 2;
  }
  return 0;
}

}  // namespace fourfold::cpu
