// bf16 in and out of float32 lanes, with AVX-512.
#pragma once

#include <immintrin.h>

#include "cpu/targets.h"

namespace fourfold::cpu::avx512 {

FOURFOLD_AVX512 FOURFOLD_INLINE __m512 widen_bf16(__m256i values) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

/// The upper halves of all lanes, `second`'s behind `first`'s.
FOURFOLD_AVX512 FOURFOLD_INLINE __m512i join_upper_halves(__m512i first, __m512i second) {
  const __m512i odd_halves =
      _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33,  //
                       31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(first, odd_halves, second);
}

}  // namespace fourfold::cpu::avx512
