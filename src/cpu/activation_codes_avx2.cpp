// Codes of staged activations as integers for byte products and as floats, with AVX2.
#include <immintrin.h>

#include "cpu/row_functions.h"
#include "cpu/targets.h"

namespace fourfold::cpu::avx2 {

FOURFOLD_AVX2 void make_int_blocks(const uint8_t* codes, const uint8_t* scales, int64_t cols, IntBlock* out) {
  const __m128i table =  // 2 x value + kWeightBias
      _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
  // int_position(), from where a block's even k are bytes 0-7 and its odd ones bytes 8-15.
  const __m128i order = _mm_setr_epi8(0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15);
  const __m128i nibble = _mm_set1_epi8(15), bias = _mm_set1_epi8(kWeightBias);
  const float* const values = e4m3_values();
  for (int64_t block = 0; block < cols / kBlockDepth; ++block) {
    const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + block * 8));
    const __m128i separate = _mm_unpacklo_epi64(pairs, _mm_srli_epi16(pairs, 4));
    const __m128i biased = _mm_shuffle_epi8(table, _mm_and_si128(separate, nibble));
    const __m128i halves = _mm_sad_epu8(biased, _mm_setzero_si128());
    const int32_t sum = _mm_cvtsi128_si32(halves) + _mm_extract_epi16(halves, 4) - kBlockDepth * kWeightBias;
    const __m128i ordered = _mm_shuffle_epi8(_mm_sub_epi8(biased, bias), order);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out[block].codes), ordered);
    out[block].start = kIntBias - kWeightBias * sum;
    out[block].scale = values[scales[block]] * kIntScale;
  }
}

FOURFOLD_AVX2 void decode_nvfp4(const uint8_t* codes, const float* scales, int64_t cols, float* out) {
  const __m256 magnitudes = _mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f);
  for (int64_t block = 0; block < cols / kBlockDepth; ++block, codes += kBlockDepth / 2, out += kBlockDepth) {
    const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
    const __m128i ordered = _mm_unpacklo_epi8(pairs, _mm_srli_epi16(pairs, 4));  // bits above a code are rest
    const __m256 scale = _mm256_set1_ps(scales[block]);
    for (int half = 0; half < 2; ++half) {
      const __m256i words = _mm256_cvtepu8_epi32(half == 0 ? ordered : _mm_unpackhi_epi64(ordered, ordered));
      const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(words, _mm256_set1_epi32(8)), 28);
      const __m256 value =
          _mm256_or_ps(_mm256_permutevar8x32_ps(magnitudes, words), _mm256_castsi256_ps(sign));
      _mm256_storeu_ps(out + half * 8, _mm256_mul_ps(value, scale));
    }
  }
}

}  // namespace fourfold::cpu::avx2
