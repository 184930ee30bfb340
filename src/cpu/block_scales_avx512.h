// Block scales of a panel as float32, for the kernels with AVX-512.
#pragma once

#include <immintrin.h>

#include "cpu/panel_layout.h"
#include "cpu/targets.h"

namespace fourfold::cpu::avx512 {

/// The 16 rows' scales x kScaleUnit (operands.h): without its sign an e4m3's bits, shifted by 7, are an fp16
/// of its value x 2^-8.
FOURFOLD_AVX512 FOURFOLD_INLINE __m512 load_scales(const uint8_t* panel_chunk, int block) {
  const auto* const scales = reinterpret_cast<const __m128i*>(panel_chunk + scale_offset(0, block));
  return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(scales)), 7));
}

}  // namespace fourfold::cpu::avx512
