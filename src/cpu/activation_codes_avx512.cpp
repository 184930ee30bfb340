// Codes of staged activations as floats and as rows of tiles, with AVX-512.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "cpu/bf16_avx512.h"
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

/// A table for 32 codes, 16 of each block: bf16 bits of value x scale x kTileScale, the second block's behind
/// the first's. Exact: a product has at most 6 significant bits.
FOURFOLD_AVX512 static __m512i tile_values(float first_scale, float second_scale) {
  constexpr float kUnit = kTileScale;
  const __m512 magnitudes = _mm512_setr_ps(
      0.0f, 0.5f * kUnit, kUnit, 1.5f * kUnit, 2.0f * kUnit, 3.0f * kUnit, 4.0f * kUnit, 6.0f * kUnit, 0.0f,
      0.5f * kUnit, kUnit, 1.5f * kUnit, 2.0f * kUnit, 3.0f * kUnit, 4.0f * kUnit, 6.0f * kUnit);
  // Upper halves of floats: eight magnitudes of a block, and again, for the negative codes.
  const __m512i upper_halves = _mm512_setr_epi32(
      0x00030001, 0x00070005, 0x000B0009, 0x000F000D, 0x00030001, 0x00070005, 0x000B0009, 0x000F000D,
      0x00130011, 0x00170015, 0x001B0019, 0x001F001D, 0x00130011, 0x00170015, 0x001B0019, 0x001F001D);
  const auto minus = static_cast<int>(0x80008000u);
  const __m512i signs =
      _mm512_setr_epi32(0, 0, 0, 0, minus, minus, minus, minus, 0, 0, 0, 0, minus, minus, minus, minus);
  const __m512 scales = _mm512_mask_mov_ps(_mm512_set1_ps(first_scale), 0xFF00, _mm512_set1_ps(second_scale));
  const __m512i products = _mm512_castps_si512(_mm512_mul_ps(magnitudes, scales));
  return _mm512_or_si512(_mm512_permutexvar_epi16(upper_halves, products), signs);
}

/// Sixteen bytes of codes, of two blocks -> 16-bit lanes with an index into their table.
FOURFOLD_AVX512 static __m512i table_indices(__m128i codes) {
  const __m512i words = _mm512_cvtepu8_epi32(codes);  // k = 2i in the low half, and 2i + 1 with it
  const __m512i both = _mm512_or_si512(words, _mm512_slli_epi32(words, 12));
  const __m512i second_block = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  return _mm512_or_si512(_mm512_and_si512(both, _mm512_set1_epi16(15)), second_block);
}

FOURFOLD_AVX512 void write_nvfp4_tiles(const uint8_t* codes, const uint8_t* scales, int64_t cols,
                                       int64_t stride, Bf16* out, const Bf16* ask_for) {
  static_assert(kTileDepth == 2 * kBlockDepth);
  const float* const values = e4m3_values();
  int64_t k = 0;
  for (; k + kTileDepth <= cols; k += kTileDepth, codes += kBlockDepth, scales += 2, out += stride) {
    __builtin_prefetch(ask_for, 1, 2);
    ask_for += stride;
    const __m128i two_blocks = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(table_indices(two_blocks),
                                                      tile_values(values[scales[0]], values[scales[1]])));
  }
  if (k < cols) {  // a single block, then zeros
    const __m128i block = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
    _mm512_storeu_si512(out,
                        _mm512_permutexvar_epi16(table_indices(block), tile_values(values[scales[0]], 0.0f)));
    k += kTileDepth;
    out += stride;
  }
  for (; k < chunks_of(cols) * kChunkDepth; k += kTileDepth, out += stride) {
    std::memset(static_cast<void*>(out), 0, kTileDepth * sizeof(Bf16));
  }
}

/// The exponent of the largest finite value, 0 for zeros; that of subnormal ones is -126.
FOURFOLD_AVX512 static int largest_exponent(const Bf16* x, int64_t cols) {
  const __m512i magnitude = _mm512_set1_epi16(0x7FFF), infinity = _mm512_set1_epi16(0x7F80);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t k = 0; k < cols; k += kTileDepth) {
    const __mmask32 there = k + kTileDepth <= cols ? ~__mmask32{0} : __mmask32{0xFFFF};  // whole blocks
    const __m512i bits = _mm512_and_si512(_mm512_maskz_loadu_epi16(there, x + k), magnitude);
    largest = _mm512_mask_max_epu16(largest, _mm512_cmplt_epu16_mask(bits, infinity), largest, bits);
  }
  alignas(64) uint16_t lanes[32];
  _mm512_store_si512(lanes, largest);
  const int bits = *std::max_element(lanes, lanes + 32);
  return bits == 0 ? 0 : std::max(bits >> 7, 1) - 127;
}

/// Sixteen bf16 x factor x factor2, as float32.
FOURFOLD_AVX512 static __m512i scaled(__m256i values, __m512 factor, __m512 factor2) {
  return _mm512_castps_si512(_mm512_mul_ps(_mm512_mul_ps(widen_bf16(values), factor), factor2));
}

FOURFOLD_AVX512 int write_normalised_bf16(const Bf16* x, int64_t cols, int unit_exponent, int64_t stride,
                                          Bf16* out, const Bf16* ask_for) {
  const int exponent = largest_exponent(x, cols);
  // The factor may be beyond float32: in two parts.
  const int first = std::clamp(unit_exponent - exponent, -126, 127);
  const __m512 factor = _mm512_set1_ps(power_of_two(first));
  const __m512 factor2 = _mm512_set1_ps(power_of_two(unit_exponent - exponent - first));
  for (int64_t k = 0; k < chunks_of(cols) * kChunkDepth; k += kTileDepth, out += stride, ask_for += stride) {
    __builtin_prefetch(ask_for, 1, 2);
    const __mmask32 there = k + kTileDepth <= cols ? ~__mmask32{0} : k < cols ? __mmask32{0xFFFF} : 0;
    const __m512i bits = _mm512_maskz_loadu_epi16(there, x + k);
    _mm512_storeu_si512(out, join_upper_halves(scaled(_mm512_castsi512_si256(bits), factor, factor2),
                                               scaled(_mm512_extracti64x4_epi64(bits, 1), factor, factor2)));
  }
  return exponent;
}

}  // namespace fourfold::cpu::avx512
