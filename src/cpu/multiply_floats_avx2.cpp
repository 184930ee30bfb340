// float32 products with AVX2: weights decoded to floats, then fused multiply-adds.
#include <immintrin.h>

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/prefetch.h"
#include "cpu/targets.h"

namespace fourfold::cpu::avx2 {
namespace {

constexpr int kRowsAtATime = 3;  // 3 rows x 4 registers of sums

/// 8 codes in the low nibbles of 8 words -> values x 256.
FOURFOLD_AVX2 FOURFOLD_INLINE __m256 decode_codes(__m256i words) {
  const __m256 magnitudes = _mm256_setr_ps(0.0f, 128.0f, 256.0f, 384.0f, 512.0f, 768.0f, 1024.0f, 1536.0f);
  const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(words, 28), _mm256_set1_epi32(INT32_MIN));
  return _mm256_or_ps(_mm256_permutevar8x32_ps(magnitudes, words), _mm256_castsi256_ps(sign));
}

/// Half a panel's chunk into weights [64][32] from its first column on.
FOURFOLD_AVX2 void decode_half_panel(const uint8_t* panel_chunk, int half_panel, float* weights) {
  for (int block = 0; block < kBlocksPerChunk; ++block) {
    const uint8_t* const scales = panel_chunk + scale_offset(half_panel * 8, block);
    const __m128i bits = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales)));
    const __m256 scale = _mm256_cvtph_ps(_mm_slli_epi16(bits, 7));  // x 2^-8
    for (int half = 0; half < 2; ++half) {
      const uint8_t* const codes =
          panel_chunk + block * kBlockBytes + half * kHalfBytes + half_panel * (kHalfBytes / 2);
      __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
      for (int nibble = 0; nibble < 8; ++nibble) {
        const int k = block * kBlockDepth + half * 8 + k_of_nibble(nibble);
        _mm256_storeu_ps(weights + k * kPairRows, _mm256_mul_ps(decode_codes(words), scale));
        words = _mm256_srli_epi32(words, 4);
      }
    }
  }
}

template <int kRows>
FOURFOLD_AVX2 void multiply_rows(const float* weights, int64_t depth, const float* rows, int64_t row_stride,
                                 float* out) {
  __m256 sums[kRows][4];
  for (int row = 0; row < kRows; ++row) {
    for (int i = 0; i < 4; ++i) sums[row][i] = _mm256_loadu_ps(out + row * kPairRows + i * 8);
  }
  for (int64_t k = 0; k < depth; ++k, weights += kPairRows) {
#pragma GCC unroll 3
    for (int row = 0; row < kRows; ++row) {
      const __m256 activation = _mm256_set1_ps(rows[row * row_stride + k]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        sums[row][i] = _mm256_fmadd_ps(activation, _mm256_loadu_ps(weights + i * 8), sums[row][i]);
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int i = 0; i < 4; ++i) _mm256_storeu_ps(out + row * kPairRows + i * 8, sums[row][i]);
  }
}

using MultiplyRows = void (*)(const float*, int64_t, const float*, int64_t, float*);
constexpr MultiplyRows kMultiplyRows[kRowsAtATime + 1] = {nullptr, multiply_rows<1>, multiply_rows<2>,
                                                          multiply_rows<3>};

}  // namespace

void decode_floats(const uint8_t* pair, int64_t chunks, float* weights) {
  const PrefetchPlan plan = prefetch_plan();
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    prefetch_ahead(pair + chunk * kPairChunkBytes, plan);
    for (int half_panel = 0; half_panel < 4; ++half_panel) {
      decode_half_panel(pair + chunk * kPairChunkBytes + half_panel / 2 * kPanelChunkBytes, half_panel % 2,
                        weights + chunk * kChunkDepth * kPairRows + half_panel * 8);
    }
  }
}

void multiply_floats(const float* weights, int64_t depth, const float* rows, int64_t row_stride,
                     int64_t row_count, float* sums) {
  for (int64_t row = 0; row < row_count; row += kRowsAtATime) {
    const int64_t count = std::min<int64_t>(kRowsAtATime, row_count - row);
    kMultiplyRows[count](weights, depth, rows + row * row_stride, row_stride, sums + row * kPairRows);
  }
}

}  // namespace fourfold::cpu::avx2
