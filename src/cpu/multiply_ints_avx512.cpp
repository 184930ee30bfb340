// Byte products with AVX-512 VNNI.
//
// A block of a panel is four registers of 16 rows x 4 k; a row of activations brings the 4 k that meet them
// as a broadcast word. Per row, block and panel: 4 vpdpbusd, then two fused operations instead of a
// conversion, a multiplication and a fused addition: the integer is born as a float (operands.h), so that
//   fmsub(bits, scale, kFloatBias * scale) = integer * scale, exactly
// and fma by the row's scale adds it. 6 operations on 2 ports, of which 4 multiply: two thirds of VNNI's peak
// is the most that this can reach.
//
// Up to kDirectRows rows decode as they go, and a few times as many do so in passes. More rows meet weights
// decoded once, a few chunks at a time so that they stay in the first-level cache.
#include <immintrin.h>

#include <algorithm>

#include "cpu/block_scales_avx512.h"
#include "cpu/kernels.h"
#include "cpu/prefetch.h"
#include "cpu/targets.h"

namespace fourfold::cpu::avx512 {
namespace {

constexpr int64_t kDirectRows = 8;     // 16 sums in registers, and 8 of weights
constexpr int kRowsAtATime = 6;        // against decoded weights: 12 sums in registers
constexpr int64_t kDecodedChunks = 8;  // 8 x 4 blocks of 768 bytes: 24 KB

/// Decoded block of one panel.
struct Block {
  __m512i weights[4];  // 2 x value + kWeightBias, 4 k of 16 rows each
  __m512 scale;        // x kScaleUnit
  __m512 bias;         // kFloatBias x scale; exact: 2 + 4 significant bits
};

/// Byte for every code, in each 128-bit lane.
FOURFOLD_AVX512 FOURFOLD_INLINE __m512i byte_table() {
  return _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
}

FOURFOLD_AVX512 FOURFOLD_INLINE void decode(const uint8_t* panel_chunk, int block, Block& out) {
  const __m512i table = byte_table(), nibble = _mm512_set1_epi8(15);
  const uint8_t* const codes = panel_chunk + block * kBlockBytes;
  const __m512i first = _mm512_loadu_si512(codes), second = _mm512_loadu_si512(codes + kHalfBytes);
  out.weights[0] = _mm512_shuffle_epi8(table, _mm512_and_si512(first, nibble));
  out.weights[1] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(first, 4), nibble));
  out.weights[2] = _mm512_shuffle_epi8(table, _mm512_and_si512(second, nibble));
  out.weights[3] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(second, 4), nibble));
  out.scale = load_scales(panel_chunk, block);
  out.bias = _mm512_mul_ps(out.scale, _mm512_set1_ps(kFloatBias));
}

/// sum + (block of weights x block of activations).
FOURFOLD_AVX512 FOURFOLD_INLINE __m512 add_block(const Block& weights, const __m512i words[4], __m512i start,
                                                 __m512 row_scale, __m512 sum) {
  __m512i bits = _mm512_dpbusd_epi32(start, weights.weights[0], words[0]);
  bits = _mm512_dpbusd_epi32(bits, weights.weights[1], words[1]);
  bits = _mm512_dpbusd_epi32(bits, weights.weights[2], words[2]);
  bits = _mm512_dpbusd_epi32(bits, weights.weights[3], words[3]);
  const __m512 scaled = _mm512_fmsub_ps(_mm512_castsi512_ps(bits), weights.scale, weights.bias);
  return _mm512_fmadd_ps(scaled, row_scale, sum);
}

FOURFOLD_AVX512 FOURFOLD_INLINE void add_block_to_pair(const Block& first, const Block& second,
                                                       const IntBlock& activations, __m512 sums[2]) {
  __m512i words[4];
  const int8_t* const codes = activations.codes;
  for (int i = 0; i < 4; ++i) {
    int32_t word = 0;
    __builtin_memcpy(&word, codes + 4 * i, sizeof(word));
    words[i] = _mm512_set1_epi32(word);
  }
  const __m512i start = _mm512_set1_epi32(activations.start);
  const __m512 scale = _mm512_set1_ps(activations.scale);
  sums[0] = add_block(first, words, start, scale, sums[0]);
  sums[1] = add_block(second, words, start, scale, sums[1]);
}

template <int kRows>
FOURFOLD_AVX512 void multiply_direct(const uint8_t* pair, int64_t chunks, const IntBlock* rows, float* out) {
  __m512 sums[kRows][2];
  for (auto& row : sums) row[0] = row[1] = _mm512_setzero_ps();
  const int64_t stride = chunks * kBlocksPerChunk;
  const PrefetchPlan plan = prefetch_plan();
  for (int64_t chunk = 0; chunk < chunks; ++chunk, pair += kPairChunkBytes) {
    prefetch_ahead(pair, plan);
#pragma GCC unroll 8
    for (int block = 0; block < kBlocksPerChunk; ++block) {
      Block first, second;
      decode(pair, block, first);
      decode(pair + kPanelChunkBytes, block, second);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        add_block_to_pair(first, second, rows[row * stride + chunk * kBlocksPerChunk + block], sums[row]);
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    _mm512_storeu_ps(out + row * kPairRows, sums[row][0]);
    _mm512_storeu_ps(out + row * kPairRows + kPanelRows, sums[row][1]);
  }
}

using MultiplyDirect = void (*)(const uint8_t*, int64_t, const IntBlock*, float*);
constexpr MultiplyDirect kMultiplyDirect[kDirectRows + 1] = {nullptr,
                                                             multiply_direct<1>,
                                                             multiply_direct<2>,
                                                             multiply_direct<3>,
                                                             multiply_direct<4>,
                                                             multiply_direct<5>,
                                                             multiply_direct<6>,
                                                             multiply_direct<7>,
                                                             multiply_direct<8>};

/// Blocks of both panels: scratch[block][panel].
FOURFOLD_AVX512 void decode_chunks(const uint8_t* pair, int64_t chunks, Block* blocks) {
  for (int64_t chunk = 0; chunk < chunks; ++chunk, pair += kPairChunkBytes) {
    for (int block = 0; block < kBlocksPerChunk; ++block) {
      decode(pair, block, *blocks++);
      decode(pair + kPanelChunkBytes, block, *blocks++);
    }
  }
}

/// kRows rows against `count` decoded blocks. `is_first`: sums start from zero, else from `out`.
template <int kRows>
FOURFOLD_AVX512 void multiply_decoded(const Block* blocks, int64_t count, const IntBlock* rows,
                                      int64_t stride, bool is_first, float* out) {
  const __mmask16 kept = is_first ? 0 : 0xFFFF;
  __m512 sums[kRows][2];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    sums[row][0] = _mm512_maskz_loadu_ps(kept, out + row * kPairRows);
    sums[row][1] = _mm512_maskz_loadu_ps(kept, out + row * kPairRows + kPanelRows);
  }
  for (int64_t block = 0; block < count; ++block) {
    const Block first = blocks[2 * block], second = blocks[2 * block + 1];
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      add_block_to_pair(first, second, rows[row * stride + block], sums[row]);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    _mm512_storeu_ps(out + row * kPairRows, sums[row][0]);
    _mm512_storeu_ps(out + row * kPairRows + kPanelRows, sums[row][1]);
  }
}

using MultiplyDecoded = void (*)(const Block*, int64_t, const IntBlock*, int64_t, bool, float*);
constexpr MultiplyDecoded kMultiplyDecoded[kRowsAtATime + 1] = {nullptr,
                                                                multiply_decoded<1>,
                                                                multiply_decoded<2>,
                                                                multiply_decoded<3>,
                                                                multiply_decoded<4>,
                                                                multiply_decoded<5>,
                                                                multiply_decoded<6>};

/// Passes that decode anew rather than decode once for all: where look-ups have execution units that products
/// can't use, as in Zen 4, decoding costs next to nothing (docs/cpu-tried.md).
int64_t most_direct_passes() {
  static const int64_t passes = [] {
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") ? 8 : 2;
  }();
  return passes;
}

/// Any number of rows, against weights decoded once.
void multiply_blocked(const uint8_t* pair, int64_t chunks, const IntBlock* rows, int64_t row_count,
                      Block* blocks, float* sums) {
  const int64_t stride = chunks * kBlocksPerChunk;
  const int64_t prefetched = kDecodedChunks * kPairChunkBytes * kRowsAtATime / row_count + 64;
  for (int64_t chunk = 0; chunk < chunks; chunk += kDecodedChunks) {
    const int64_t now = std::min(kDecodedChunks, chunks - chunk);
    decode_chunks(pair + chunk * kPairChunkBytes, now, blocks);
    const uint8_t* next = pair + (chunk + now) * kPairChunkBytes;
    for (int64_t row = 0; row < row_count; row += kRowsAtATime) {
      prefetch_to_second_level(next, prefetched);
      next += prefetched;
      const int64_t count = std::min<int64_t>(kRowsAtATime, row_count - row);
      kMultiplyDecoded[count](blocks, now * kBlocksPerChunk, rows + row * stride + chunk * kBlocksPerChunk,
                              stride, chunk == 0, sums + row * kPairRows);
    }
  }
}

}  // namespace

void multiply_ints(const uint8_t* pair, int64_t chunks, const IntBlock* rows, int64_t row_count,
                   std::byte* scratch, float* sums) {
  static_assert(kDecodedChunks * kBlocksPerChunk * 2 * static_cast<int64_t>(sizeof(Block)) <=
                kKernelScratchBytes);
  if (row_count > most_direct_passes() * kDirectRows) {
    return multiply_blocked(pair, chunks, rows, row_count, reinterpret_cast<Block*>(scratch), sums);
  }
  // In passes of about the same number of rows.
  int64_t row = 0;
  for (int64_t passes = (row_count + kDirectRows - 1) / kDirectRows; passes > 0; --passes) {
    const int64_t count = (row_count - row + passes - 1) / passes;
    kMultiplyDirect[count](pair, chunks, rows + row * chunks * kBlocksPerChunk, sums + row * kPairRows);
    row += count;
  }
}

}  // namespace fourfold::cpu::avx512
