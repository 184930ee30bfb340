// The tile kernel with its tile instructions in plain C++, by the operation sections of the Intel SDM, and
// its products of fp16 in float32: for tests, on any CPU with AVX-512.
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/prefetch.h"
#include "cpu/targets.h"

namespace fourfold::cpu::amx {

#define FOURFOLD_TILES_TARGET FOURFOLD_AVX512
#include "cpu/tile_multiply.inc"

namespace {

struct TileData {
  alignas(64) std::byte bytes[kTileRows][64];
};
thread_local TileData registers[8];

/// A bf16 in the upper half of a word. TDPBF16PS treats subnormal inputs as zero.
FOURFOLD_AVX512 FOURFOLD_INLINE float widen(uint32_t word) {
  return std::bit_cast<float>((word & 0x7F800000u) == 0 ? 0u : word & 0xFFFF0000u);
}

FOURFOLD_AVX512 void multiply_emulated(TileData& c, const TileData& a, const TileData& b) {
  constexpr int kPairs = 16, kColumns = 16;
  for (int row = 0; row < kTileRows; ++row) {
    float even[kColumns] = {}, odd[kColumns] = {};
    for (int pair = 0; pair < kPairs; ++pair) {
      uint32_t left, right[kColumns];
      std::memcpy(&left, a.bytes[row] + 4 * pair, sizeof(left));
      std::memcpy(right, b.bytes[pair], sizeof(right));
      const float left_even = widen(left << 16), left_odd = widen(left);
      for (int column = 0; column < kColumns; ++column) {
        even[column] += left_even * widen(right[column] << 16);
        odd[column] += left_odd * widen(right[column]);
      }
    }
    float sums[kColumns];
    std::memcpy(sums, c.bytes[row], sizeof(sums));
    for (int column = 0; column < kColumns; ++column) sums[column] += even[column] + odd[column];
    std::memcpy(c.bytes[row], sums, sizeof(sums));
  }
}

struct EmulatedTiles {
  template <int kTile>
  static void zero() {
    std::memset(&registers[kTile], 0, sizeof(TileData));
  }
  template <int kTile>
  static void load(const void* from, int64_t stride_bytes) {
    for (int row = 0; row < kTileRows; ++row) {
      std::memcpy(registers[kTile].bytes[row], static_cast<const std::byte*>(from) + row * stride_bytes, 64);
    }
  }
  template <int kTile>
  static void load_once(const void* from, int64_t stride_bytes) {
    load<kTile>(from, stride_bytes);
  }
  template <int kTile>
  static void store(void* to, int64_t stride_bytes) {
    for (int row = 0; row < kTileRows; ++row) {
      std::memcpy(static_cast<std::byte*>(to) + row * stride_bytes, registers[kTile].bytes[row], 64);
    }
  }
  template <int kC, int kA, int kB>
  static void multiply() {
    multiply_emulated(registers[kC], registers[kA], registers[kB]);
  }
  FOURFOLD_AVX512 FOURFOLD_INLINE static __m512i multiply_halves(__m512i a, __m512i b) {
    const __m256i low = multiply_sixteen(_mm512_castsi512_si256(a), _mm512_castsi512_si256(b));
    const __m256i high = multiply_sixteen(_mm512_extracti64x4_epi64(a, 1), _mm512_extracti64x4_epi64(b, 1));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  template <int kCode>
  FOURFOLD_AVX512 FOURFOLD_INLINE static __m512i code_to_front(__m512i words) {
    return _mm512_srli_epi32(words, 4 * kCode);
  }
  FOURFOLD_AVX512 FOURFOLD_INLINE static __m512i shift_in_low_bits(__m512i bits, __m512i low_bits) {
    return _mm512_or_si512(_mm512_srli_epi16(bits, 3), _mm512_slli_epi16(low_bits, 13));
  }

 private:
  FOURFOLD_AVX512 FOURFOLD_INLINE static __m256i multiply_sixteen(__m256i a, __m256i b) {
    return _mm512_cvtps_ph(_mm512_mul_ps(_mm512_cvtph_ps(a), _mm512_cvtph_ps(b)), _MM_FROUND_TO_ZERO);
  }
};

}  // namespace

FOURFOLD_AVX512 void multiply_emulated_tiles(const uint8_t* pair, const NextTiles& next, int64_t chunks,
                                             const std::byte* tiles, int64_t row_tiles, int terms,
                                             std::byte* scratch, DecodedAhead& ahead, float* sums) {
  multiply_pair<EmulatedTiles>(pair, next, chunks, tiles, row_tiles, terms, scratch, ahead, sums);
}

}  // namespace fourfold::cpu::amx

namespace fourfold::cpu {

std::string why_no_emulated_tiles() {
  return why_not(Isa::kAvx512);
}

}  // namespace fourfold::cpu
