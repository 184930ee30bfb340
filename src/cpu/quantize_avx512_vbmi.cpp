// The quantizer of nvfp4 activations, with AVX-512 VBMI: sixteen blocks of a row at a time, from registers.
#include <immintrin.h>

#include "cpu/row_functions.h"
#include "cpu/row_loops.h"
#include "cpu/targets.h"

namespace fourfold::cpu::avx512_vbmi {
namespace {

constexpr int kBlocks = 16;  // one a lane
constexpr int kValues = kBlocks * kBlockDepth;

FOURFOLD_AVX512_VBMI FOURFOLD_INLINE __m512i magnitudes_of(const float* block) {
  return _mm512_and_si512(_mm512_loadu_si512(block), _mm512_set1_epi32(0x7FFFFFFF));
}

/// The largest magnitude of each of the blocks; NaN, whose bits are larger than infinity's, where there is
/// one.
FOURFOLD_AVX512_VBMI FOURFOLD_INLINE __m512i largest_magnitudes(const float* x) {
  // A step of a transposition each time, and the larger of both halves: in the end a lane is a block.
  __m512i pairs[8], quads[4], octets[2];
  for (int i = 0; i < 8; ++i) {
    const __m512i a = magnitudes_of(x + 2 * i * kBlockDepth),
                  b = magnitudes_of(x + (2 * i + 1) * kBlockDepth);
    pairs[i] = _mm512_max_epu32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i a = pairs[2 * i], b = pairs[2 * i + 1];
    quads[i] = _mm512_max_epu32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  }
  for (int i = 0; i < 2; ++i) {
    const __m512i a = quads[2 * i], b = quads[2 * i + 1];
    octets[i] = _mm512_max_epu32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
  }
  return _mm512_max_epu32(_mm512_shuffle_i32x4(octets[0], octets[1], 0x88),
                          _mm512_shuffle_i32x4(octets[0], octets[1], 0xDD));
}

// A value v of a block, divided by its scale, becomes a number below 128, from which a table has the code:
// the sum of 4 |v| rounded down and rounded up (63 from 7.875 on), and 64 if it is negative. Codes change at
// 0.25, 0.75, 1.25, 1.75, 2.5, 3.5 and 5: the sum says on which side of them v lies, or that it is one.
constexpr float kLargest = 31.5f;  // of 4 |v|
constexpr int kIndices = 64;       // of one sign

struct CodeTable {
  alignas(64) uint8_t codes[2 * kIndices] = {};
};
constexpr CodeTable kCodes = [] {
  CodeTable table;
  for (int index = 0; index < kIndices; ++index) {
    // An odd index is any number between its neighbours; the one in their middle has the same code.
    const uint8_t code = encode_e2m1(static_cast<float>(index) / 8.0f);
    table.codes[index] = code;
    table.codes[kIndices + index] = code | 8;
  }
  return table;
}();

FOURFOLD_AVX512_VBMI FOURFOLD_INLINE __m512i index_of(__m512 four_v) {
  const __m512i bits = _mm512_castps_si512(four_v);
  const __m512 magnitude = _mm512_min_ps(
      _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF))), _mm512_set1_ps(kLargest));
  const __m512i down = _mm512_cvt_roundps_epi32(magnitude, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const __m512i up = _mm512_cvt_roundps_epi32(magnitude, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
  constexpr int kOrAnd = 0xF8;  // a | (b & c)
  return _mm512_ternarylogic_epi32(_mm512_add_epi32(down, up), _mm512_srli_epi32(bits, 25),
                                   _mm512_set1_epi32(kIndices), kOrAnd);
}

/// Codes of four blocks.
FOURFOLD_AVX512_VBMI FOURFOLD_INLINE void write_codes(const float* x, const float* four_reciprocals,
                                                      uint8_t* codes) {
  __m512i indices[4];
  for (int block = 0; block < 4; ++block) {
    indices[block] = index_of(
        _mm512_mul_ps(_mm512_loadu_ps(x + block * kBlockDepth), _mm512_set1_ps(four_reciprocals[block])));
  }
  // In 32-bit lane 4j + b: the values 4j to 4j + 3 of block b.
  const __m512i bytes = _mm512_packus_epi16(_mm512_packus_epi32(indices[0], indices[1]),
                                            _mm512_packus_epi32(indices[2], indices[3]));
  const __m512i single = _mm512_permutex2var_epi8(_mm512_load_si512(kCodes.codes), bytes,
                                                  _mm512_load_si512(kCodes.codes + kIndices));
  const __m512i pairs = _mm512_maddubs_epi16(single, _mm512_set1_epi16(0x1001));  // of 16-bit lanes
  alignas(32) static constexpr uint8_t kOrder[32] = {0,  2,  16, 18, 32, 34, 48, 50, 4,  6,  20,
                                                     22, 36, 38, 52, 54, 8,  10, 24, 26, 40, 42,
                                                     56, 58, 12, 14, 28, 30, 44, 46, 60, 62};
  const __m512i order = _mm512_castsi256_si512(_mm256_load_si256(reinterpret_cast<const __m256i*>(kOrder)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes),
                      _mm512_castsi512_si256(_mm512_permutexvar_epi8(order, pairs)));
}

}  // namespace

FOURFOLD_AVX512_VBMI int64_t quantize_nvfp4(const float* x, int64_t cols, float global, uint8_t* codes,
                                            uint8_t* scales) {
  int64_t done = 0;
  for (; done + kValues <= cols; done += kValues) {
    alignas(64) float amax[kBlocks], four_reciprocals[kBlocks];
    alignas(64) uint32_t scale_codes[kBlocks];
    _mm512_store_si512(amax, largest_magnitudes(x + done));
    for (int block = 0; block < kBlocks; ++block) {
      const uint32_t scale = loops::encode_block_scale(amax[block], global);
      scale_codes[block] = scale;
      // Exact, or infinite: nothing is rounded that the reference does not round.
      four_reciprocals[block] = 4.0f * loops::reciprocal_of(loops::decode_positive_e4m3(scale), global);
    }
    constexpr int kNanOrInfinity = 0x01 | 0x08 | 0x10 | 0x80;
    if (_mm512_fpclass_ps_mask(_mm512_load_ps(four_reciprocals), kNanOrInfinity) != 0) return done;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(scales + done / kBlockDepth),
                     _mm512_cvtepi32_epi8(_mm512_load_si512(scale_codes)));
    for (int block = 0; block < kBlocks; block += 4) {
      const int64_t first = done + block * kBlockDepth;
      write_codes(x + first, four_reciprocals + block, codes + first / 2);
    }
  }
  return done;
}

}  // namespace fourfold::cpu::avx512_vbmi
