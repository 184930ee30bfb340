// The tile kernel, over hardware tiles (multiply_tiles_amx.cpp) or emulated ones (emulated_tiles.cpp).
//
// Weights become bf16 exactly: a table gives a code's value x 256 as fp16; times the block scale, whose e4m3
// bits shifted by 7 are its value x 2^-8 as fp16, the product has at most 6 significant bits and lies between
// 2^-10 and 2688, so it is exact; shifted right by 3, with the copies of the sign masked away, its bits are
// those of a bf16 of value x 2^-112 (fp16's exponent counts from 15, bf16's from 127), at least 2^-122 and so
// not subnormal. Activations come times 2^112 (operands.h).
//
// A pair meets up to 8 row tiles at once. Weights are decoded a block of K at a time, into the half of a
// buffer that is not being multiplied; the decoding is cut in pieces that stand between the multiplications,
// so that the vector units decode the next block while the tile unit multiplies this one. The block's weights
// (64 KB) and the activations stream from the second-level cache:
//
//   for each block of 16 chunks:   for each two row tiles:   C00 C01 C10 C11 += A0 A1 (rows) x B0 B1 (panels)
//
// Sums wait in memory between blocks, those of one or two row tiles in their tiles.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/targets.h"

namespace fourfold::cpu::amx {

inline constexpr int64_t kTileChunks = 16;  // chunks a block
inline constexpr int kTilesPerChunk = kChunkDepth / kTileDepth;
inline constexpr int64_t kBufferBytes = kTileChunks * kTilesPerChunk * 2 * kTileBytes;  // [k / 32][panel]
static_assert(2 * kBufferBytes <= kKernelScratchBytes);

/// A block scale as fp16 in both halves of 16 words: [row] twice.
FOURFOLD_AVX512_FP16 FOURFOLD_INLINE __m512h spread_scales(const uint8_t* scales) {
  const __m512i words = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
  const __m512i bits = _mm512_slli_epi32(words, 7);
  return _mm512_castsi512_ph(_mm512_or_si512(bits, _mm512_slli_epi32(bits, 16)));
}

/// One panel's chunk -> its two tiles [k / 32][pair of k][row][2], which are `2 * kTileBytes` apart.
FOURFOLD_AVX512_FP16 FOURFOLD_INLINE void decode_tiles(const uint8_t* panel_chunk, std::byte* tiles) {
  // fp16 bits of 0, 0.5, 1, 1.5, 2, 3, 4, 6 times 256, then the same with the sign. A look-up takes the low
  // five bits of a lane; the fifth belongs to the next code, so the table comes twice.
  const __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16(
      0x0000, 0x5800, 0x5C00, 0x5E00, 0x6000, 0x6200, 0x6400, 0x6600,  //
      static_cast<int16_t>(0x8000), static_cast<int16_t>(0xD800), static_cast<int16_t>(0xDC00),
      static_cast<int16_t>(0xDE00), static_cast<int16_t>(0xE000), static_cast<int16_t>(0xE200),
      static_cast<int16_t>(0xE400), static_cast<int16_t>(0xE600)));
  const __m512i kept = _mm512_set1_epi16(static_cast<int16_t>(0x8FFF));
#pragma GCC unroll 4
  for (int block = 0; block < kBlocksPerChunk; ++block) {
    const __m512h scales = spread_scales(panel_chunk + scale_offset(0, block));
    std::byte* const tile = tiles + block / 2 * (2 * kTileBytes) + block % 2 * (kTileBytes / 2);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512i words = _mm512_loadu_si512(panel_chunk + block * kBlockBytes + half * kHalfBytes);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512i codes = _mm512_srli_epi32(words, static_cast<unsigned>(4 * i));
        const __m512h values = _mm512_castsi512_ph(_mm512_permutexvar_epi16(codes, table));
        const __m512i product = _mm512_castph_si512(_mm512_mul_ph(values, scales));
        _mm512_store_si512(tile + half * (kTileBytes / 4) + i * 64,
                           _mm512_and_si512(_mm512_srai_epi16(product, 3), kept));
      }
    }
  }
}

/// The pieces of decoding one block of a pair: one chunk of one panel each.
struct DecodeQueue {
  const uint8_t* pair = nullptr;
  std::byte* buffer = nullptr;
  int64_t pieces = 0, done = 0;

  FOURFOLD_AVX512_FP16 FOURFOLD_INLINE void decode_next() {
    const int64_t chunk = done / 2, panel = done % 2;
    decode_tiles(pair + chunk * kPairChunkBytes + panel * kPanelChunkBytes,
                 buffer + chunk * (kTilesPerChunk * 2 * kTileBytes) + panel * kTileBytes);
    const uint8_t* const ahead = pair + (done + 4 * kTileChunks) * kPanelChunkBytes;
    for (int64_t line = 0; line < kPanelChunkBytes; line += 64) _mm_prefetch(ahead + line, _MM_HINT_T1);
    ++done;
  }
};

/// Spreads the pieces of a queue evenly over `steps` steps.
struct Pace {
  int64_t pieces = 0, steps = 1, due = 0;

  FOURFOLD_AVX512_FP16 FOURFOLD_INLINE void step(DecodeQueue& queue) {
    due += pieces;
    while (due >= steps) {
      due -= steps;
      queue.decode_next();
    }
  }
};

template <class Tiles, bool kTwoRowTiles>
FOURFOLD_AVX512_FP16 FOURFOLD_INLINE void load_sums(const float* sums, bool is_first) {
  constexpr int64_t kStride = kPairRows * 4, kNextTile = kTileRows * kPairRows;
  if (is_first) {
    Tiles::template zero<0>();
    Tiles::template zero<1>();
    if constexpr (kTwoRowTiles) {
      Tiles::template zero<2>();
      Tiles::template zero<3>();
    }
    return;
  }
  Tiles::template load<0>(sums, kStride);
  Tiles::template load<1>(sums + kPanelRows, kStride);
  if constexpr (kTwoRowTiles) {
    Tiles::template load<2>(sums + kNextTile, kStride);
    Tiles::template load<3>(sums + kNextTile + kPanelRows, kStride);
  }
}

template <class Tiles, bool kTwoRowTiles>
FOURFOLD_AVX512_FP16 FOURFOLD_INLINE void store_sums(float* sums) {
  constexpr int64_t kStride = kPairRows * 4, kNextTile = kTileRows * kPairRows;
  Tiles::template store<0>(sums, kStride);
  Tiles::template store<1>(sums + kPanelRows, kStride);
  if constexpr (kTwoRowTiles) {
    Tiles::template store<2>(sums + kNextTile, kStride);
    Tiles::template store<3>(sums + kNextTile + kPanelRows, kStride);
  }
}

/// One or two row tiles against a decoded block of `depth` tiles. Tile registers: 0-3 sums, 4 and 5 weights,
/// 6 and 7 activations.
template <class Tiles, bool kTwoRowTiles>
FOURFOLD_AVX512_FP16 FOURFOLD_INLINE void multiply_block(const std::byte* weights, const std::byte* rows,
                                                         int64_t row_tile_bytes, int64_t depth, int terms,
                                                         Pace& pace, DecodeQueue& queue) {
  for (int64_t k = 0; k < depth; ++k, weights += 2 * kTileBytes) {
    Tiles::template load<4>(weights, 64);
    Tiles::template load<5>(weights + kTileBytes, 64);
    for (int term = 0; term < terms; ++term, rows += kTileBytes) {
      Tiles::template load<6>(rows, 64);
      Tiles::template multiply<0, 6, 4>();
      Tiles::template multiply<1, 6, 5>();
      if constexpr (kTwoRowTiles) {
        Tiles::template load<7>(rows + row_tile_bytes, 64);
        Tiles::template multiply<2, 7, 4>();
        Tiles::template multiply<3, 7, 5>();
      }
    }
    pace.step(queue);
  }
}

/// The blocks of K of a pair, and the half of the scratch that each is decoded into.
struct PairBlocks {
  const uint8_t* pair = nullptr;
  int64_t chunks = 0;
  std::byte* scratch = nullptr;

  FOURFOLD_AVX512_FP16 FOURFOLD_INLINE std::byte* weights(int64_t chunk) const {
    return scratch + chunk / kTileChunks % 2 * kBufferBytes;
  }
  FOURFOLD_AVX512_FP16 FOURFOLD_INLINE int64_t depth(int64_t chunk) const {  // in tiles
    return std::min(kTileChunks, chunks - chunk) * kTilesPerChunk;
  }
  /// What decodes the block that begins with `chunk`; no pieces behind the last.
  FOURFOLD_AVX512_FP16 FOURFOLD_INLINE DecodeQueue queue(int64_t chunk) const {
    const int64_t count = std::clamp<int64_t>(chunks - chunk, 0, kTileChunks);
    return {pair + chunk * kPairChunkBytes, weights(chunk), 2 * count, 0};
  }
};

/// One or two row tiles: their sums stay in tiles over all of K.
template <class Tiles, bool kTwoRowTiles>
FOURFOLD_AVX512_FP16 FOURFOLD_INLINE void multiply_few_rows(const PairBlocks& blocks, const std::byte* tiles,
                                                            int64_t row_tile_bytes, int terms, float* sums) {
  load_sums<Tiles, kTwoRowTiles>(sums, true);
  for (int64_t chunk = 0; chunk < blocks.chunks; chunk += kTileChunks) {
    const int64_t depth = blocks.depth(chunk);
    DecodeQueue queue = blocks.queue(chunk + kTileChunks);
    Pace pace{queue.pieces, depth};
    multiply_block<Tiles, kTwoRowTiles>(blocks.weights(chunk),
                                        tiles + chunk * kTilesPerChunk * terms * kTileBytes, row_tile_bytes,
                                        depth, terms, pace, queue);
  }
  store_sums<Tiles, kTwoRowTiles>(sums);
}

/// Any number of row tiles, two at a time; sums wait in memory between blocks.
template <class Tiles>
FOURFOLD_AVX512_FP16 FOURFOLD_INLINE void multiply_many_rows(const PairBlocks& blocks, const std::byte* tiles,
                                                             int64_t row_tiles, int64_t row_tile_bytes,
                                                             int terms, float* sums) {
  for (int64_t chunk = 0; chunk < blocks.chunks; chunk += kTileChunks) {
    const int64_t depth = blocks.depth(chunk);
    const std::byte* const weights = blocks.weights(chunk);
    const std::byte* const rows = tiles + chunk * kTilesPerChunk * terms * kTileBytes;
    DecodeQueue queue = blocks.queue(chunk + kTileChunks);
    Pace pace{queue.pieces, (row_tiles + 1) / 2 * depth};
    int64_t tile = 0;
    for (; tile + 2 <= row_tiles; tile += 2) {
      float* const out = sums + tile * kTileRows * kPairRows;
      load_sums<Tiles, true>(out, chunk == 0);
      multiply_block<Tiles, true>(weights, rows + tile * row_tile_bytes, row_tile_bytes, depth, terms, pace,
                                  queue);
      store_sums<Tiles, true>(out);
    }
    if (tile < row_tiles) {
      float* const out = sums + tile * kTileRows * kPairRows;
      load_sums<Tiles, false>(out, chunk == 0);
      multiply_block<Tiles, false>(weights, rows + tile * row_tile_bytes, row_tile_bytes, depth, terms, pace,
                                   queue);
      store_sums<Tiles, false>(out);
    }
  }
}

template <class Tiles>
FOURFOLD_AVX512_FP16 FOURFOLD_INLINE void multiply_pair(const uint8_t* pair, int64_t chunks,
                                                        const std::byte* tiles, int64_t row_tiles, int terms,
                                                        std::byte* scratch, float* sums) {
  const int64_t row_tile_bytes = chunks * kTilesPerChunk * terms * kTileBytes;
  const PairBlocks blocks{pair, chunks, scratch};
  DecodeQueue first = blocks.queue(0);
  while (first.done < first.pieces) first.decode_next();
  if (row_tiles == 1) return multiply_few_rows<Tiles, false>(blocks, tiles, row_tile_bytes, terms, sums);
  if (row_tiles == 2) return multiply_few_rows<Tiles, true>(blocks, tiles, row_tile_bytes, terms, sums);
  multiply_many_rows<Tiles>(blocks, tiles, row_tiles, row_tile_bytes, terms, sums);
}

}  // namespace fourfold::cpu::amx
