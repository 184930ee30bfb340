// How packed weights lie in memory: one layout for every kernel.
//
// A panel is 16 rows of a weight; a chunk is 64 values along K. A panel's chunk holds its codes and then its
// scales, 4.5 bits a value:
//
//   512 B codes   [block 0-3][half 0-1][row 0-15] words of 4 bytes: the 8 codes of a row's half block
//    64 B scales  [block 0-3][row 0-15] e4m3
//
// Two panels make a pair, the unit of work: gate and up of the same 16 channels, or 32 neighbouring rows.
// Their chunks alternate, so that a kernel reads one stream:
//
//   pair 0: | chunk 0, panel 0 | chunk 0, panel 1 | chunk 1, panel 0 | ...   then pair 1 ...
//
// In a word, nibble 4j + i holds k = 2i + j:
//
//   nibble        7 6 5 4 3 2 1 0
//   k of the 8    7 5 3 1 6 4 2 0
//
// A shift by 4i leaves codes k = 2i and 2i + 1 in the low nibbles of the word's 16-bit halves, so that one
// table look-up on 16-bit lanes gives the pairs that AMX multiplies. The low nibbles of the four bytes are
// k = 0, 4, 1, 5 and the high ones 2, 6, 3, 7: activations for byte products are laid out alike (operands.h).
#pragma once

#include <cstdint>

namespace fourfold::cpu {

inline constexpr int kPanelRows = 16;
inline constexpr int kPairRows = 2 * kPanelRows;
inline constexpr int kChunkDepth = 64;
inline constexpr int kBlockDepth = 16;  // of NVFP4
inline constexpr int kBlocksPerChunk = kChunkDepth / kBlockDepth;
inline constexpr int kHalfBytes = kPanelRows * 4;  // one half block of all rows
inline constexpr int kBlockBytes = 2 * kHalfBytes;
inline constexpr int kScalesOffset = kBlocksPerChunk * kBlockBytes;
inline constexpr int kPanelChunkBytes = kScalesOffset + kBlocksPerChunk * kPanelRows;
inline constexpr int kPairChunkBytes = 2 * kPanelChunkBytes;
static_assert(kPanelChunkBytes == 576);

/// Nibble of a word that holds the `k`th of its 8 codes.
constexpr int nibble_of(int k) {
  return 4 * (k % 2) + k / 2;
}
/// The reverse.
constexpr int k_of_nibble(int nibble) {
  return 2 * (nibble % 4) + nibble / 4;
}

/// Byte of the word with code (row, k) in a panel's chunk.
constexpr int word_offset(int row, int k) {
  return k / 8 * kHalfBytes + row * 4;
}
/// Byte of the scale of (row, block) in a panel's chunk.
constexpr int scale_offset(int row, int block) {
  return kScalesOffset + block * kPanelRows + row;
}

constexpr int64_t chunks_of(int64_t depth) {
  return (depth + kChunkDepth - 1) / kChunkDepth;
}
constexpr int64_t pair_bytes(int64_t depth) {
  return chunks_of(depth) * kPairChunkBytes;
}

/// Eight codes as a checkpoint stores them (even k in the low nibble) -> a packed word.
constexpr uint32_t pack_word(uint32_t codes) {
  const auto gather = [](uint32_t nibbles) {  // low nibbles of four bytes -> 16 bits
    nibbles = (nibbles | nibbles >> 4) & 0x00FF00FFu;
    return (nibbles | nibbles >> 8) & 0xFFFFu;
  };
  return gather(codes & 0x0F0F0F0Fu) | gather(codes >> 4 & 0x0F0F0F0Fu) << 16;
}

/// The code of `k` (0-7) in a packed word.
constexpr uint32_t code_in_word(uint32_t word, int k) {
  return word >> (4 * nibble_of(k)) & 0xFu;
}

}  // namespace fourfold::cpu
