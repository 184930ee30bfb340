// Codes of activations as integers for byte products, with AVX2.
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

}  // namespace fourfold::cpu::avx2
