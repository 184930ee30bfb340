// Byte products with AVX2: vpmaddubsw on 8 rows of a panel at a time.
//
// A pair's sums of two products are below 2 * 24 * 12 = 576 and those of a block below 2304: 16 bits hold
// them, so that one vpmaddwd a block widens. The rest is as with AVX-512 (multiply_ints_avx512.cpp).
#include <immintrin.h>

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/prefetch.h"
#include "cpu/targets.h"

namespace fourfold::cpu::avx2 {
namespace {

constexpr int kHalfPanel = kPanelRows / 2;
constexpr int kRowsAtATime = 4;

/// Decoded block of half a panel.
struct Block {
  __m256i weights[4];  // 2 x value + kWeightBias, 4 k of 8 rows each
  __m256 scale;        // x kScaleUnit
  __m256 bias;         // kFloatBias x scale
};

FOURFOLD_AVX2 FOURFOLD_INLINE void decode(const uint8_t* panel_chunk, int block, int half_panel, Block& out) {
  const __m256i table = _mm256_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0,  //
                                         12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
  const __m256i nibble = _mm256_set1_epi8(15);
  const uint8_t* const codes = panel_chunk + block * kBlockBytes + half_panel * (kHalfBytes / 2);
  const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + kHalfBytes));
  out.weights[0] = _mm256_shuffle_epi8(table, _mm256_and_si256(first, nibble));
  out.weights[1] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(first, 4), nibble));
  out.weights[2] = _mm256_shuffle_epi8(table, _mm256_and_si256(second, nibble));
  out.weights[3] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(second, 4), nibble));
  const uint8_t* const scales = panel_chunk + scale_offset(half_panel * kHalfPanel, block);
  const __m128i bits = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales)));
  out.scale = _mm256_cvtph_ps(_mm_slli_epi16(bits, 7));
  out.bias = _mm256_mul_ps(out.scale, _mm256_set1_ps(kFloatBias));
}

FOURFOLD_AVX2 FOURFOLD_INLINE __m256i broadcast_word(const int8_t* codes) {
  int32_t word = 0;
  __builtin_memcpy(&word, codes, sizeof(word));
  return _mm256_set1_epi32(word);
}

FOURFOLD_AVX2 FOURFOLD_INLINE __m256 add_block(const Block& weights, const IntBlock& activations,
                                               __m256 sum) {
  __m256i pairs[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    pairs[i] = _mm256_maddubs_epi16(weights.weights[i], broadcast_word(activations.codes + 4 * i));
  }
  const __m256i all =
      _mm256_add_epi16(_mm256_add_epi16(pairs[0], pairs[1]), _mm256_add_epi16(pairs[2], pairs[3]));
  const __m256i bits =
      _mm256_add_epi32(_mm256_madd_epi16(all, _mm256_set1_epi16(1)), _mm256_set1_epi32(activations.start));
  const __m256 scaled = _mm256_fmsub_ps(_mm256_castsi256_ps(bits), weights.scale, weights.bias);
  return _mm256_fmadd_ps(scaled, _mm256_set1_ps(activations.scale), sum);
}

/// kRows rows against half a panel.
template <int kRows>
FOURFOLD_AVX2 void multiply_half_panel(const uint8_t* panel, int half_panel, int64_t chunks,
                                       const IntBlock* rows, float* out) {
  __m256 sums[kRows];
  for (__m256& sum : sums) sum = _mm256_setzero_ps();
  const int64_t stride = chunks * kBlocksPerChunk;
  const PrefetchPlan plan = prefetch_plan();
  for (int64_t chunk = 0; chunk < chunks; ++chunk, panel += kPairChunkBytes) {
    if (half_panel == 0) prefetch_ahead(panel, plan);  // the other halves find it in the cache
    for (int block = 0; block < kBlocksPerChunk; ++block) {
      Block decoded;
      decode(panel, block, half_panel, decoded);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        sums[row] = add_block(decoded, rows[row * stride + chunk * kBlocksPerChunk + block], sums[row]);
      }
    }
  }
  for (int row = 0; row < kRows; ++row) _mm256_storeu_ps(out + row * kPairRows, sums[row]);
}

using MultiplyHalfPanel = void (*)(const uint8_t*, int, int64_t, const IntBlock*, float*);
constexpr MultiplyHalfPanel kMultiplyHalfPanel[kRowsAtATime + 1] = {
    nullptr, multiply_half_panel<1>, multiply_half_panel<2>, multiply_half_panel<3>, multiply_half_panel<4>};

}  // namespace

void multiply_ints(const uint8_t* pair, int64_t chunks, const IntBlock* rows, int64_t row_count,
                   std::byte* /*scratch*/, float* sums) {
  for (int64_t row = 0; row < row_count; row += kRowsAtATime) {
    const int64_t count = std::min<int64_t>(kRowsAtATime, row_count - row);
    for (int half_panel = 0; half_panel < 4; ++half_panel) {
      kMultiplyHalfPanel[count](pair + half_panel / 2 * kPanelChunkBytes, half_panel % 2, chunks,
                                rows + row * chunks * kBlocksPerChunk,
                                sums + row * kPairRows + half_panel * kHalfPanel);
    }
  }
}

}  // namespace fourfold::cpu::avx2
