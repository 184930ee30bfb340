// Codes of staged activations as floats, with AVX-512.
#include <immintrin.h>

#include "cpu/row_functions.h"
#include "cpu/targets.h"

namespace fourfold::cpu::avx512 {

FOURFOLD_AVX512 void decode_nvfp4(const uint8_t* codes, const float* scales, int64_t cols, float* out) {
  const __m512 table = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f,
                                      -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
  for (int64_t block = 0; block < cols / kBlockDepth; ++block) {
    const __m128i pairs =
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + block * (kBlockDepth / 2)));
    // A look-up takes the low four bits of a lane.
    const __m512i words = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(pairs, _mm_srli_epi16(pairs, 4)));
    _mm512_storeu_ps(out + block * kBlockDepth,
                     _mm512_mul_ps(_mm512_permutexvar_ps(words, table), _mm512_set1_ps(scales[block])));
  }
}

}  // namespace fourfold::cpu::avx512
