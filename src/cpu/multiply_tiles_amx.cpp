// The tile kernel on AMX.
#include <immintrin.h>

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/prefetch.h"
#include "cpu/targets.h"

namespace fourfold::cpu::amx {

#define FOURFOLD_TILES_TARGET FOURFOLD_AMX_VECTORS
#include "cpu/tile_multiply.inc"

namespace {

/// Operand of LDTILECFG (Intel SDM, volume 1, 18.3).
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

/// Instructions in assembly: g++ 12's intrinsics take tile numbers as literals alone, and its
/// _tile_loadconfig declares 8 of the 64 bytes that it reads, so that stores before it get lost.
struct HardwareTiles {
  template <int kTile>
  FOURFOLD_INLINE static void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  template <int kTile>
  FOURFOLD_INLINE static void load(const void* from, int64_t stride_bytes) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride_bytes), "i"(kTile) : "memory");
  }
  template <int kTile>
  FOURFOLD_INLINE static void load_once(const void* from, int64_t stride_bytes) {
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2"
                     :
                     : "r"(from), "r"(stride_bytes), "i"(kTile)
                     : "memory");
  }
  template <int kTile>
  FOURFOLD_INLINE static void store(void* to, int64_t stride_bytes) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride_bytes), "i"(kTile) : "memory");
  }
  /// C += A x B: rows of A, pairs of k; B holds pairs of k by columns.
  template <int kC, int kA, int kB>
  FOURFOLD_INLINE static void multiply() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
  FOURFOLD_AMX_VECTORS FOURFOLD_INLINE static __m512i multiply_halves(__m512i a, __m512i b) {
    return _mm512_castph_si512(_mm512_mul_round_ph(_mm512_castsi512_ph(a), _mm512_castsi512_ph(b),
                                                   _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC));
  }
  /// Not a shift: those wait for port 0, as multiplications do beside tile products; this takes port 5.
  template <int kCode>
  FOURFOLD_AMX_VECTORS FOURFOLD_INLINE static __m512i code_to_front(__m512i words) {
    constexpr int64_t kOffsets = 0x0101010101010101 * 4 * kCode + 0x3030202010100000;
    return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(kOffsets), words);
  }
  FOURFOLD_AMX_VECTORS FOURFOLD_INLINE static __m512i shift_in_low_bits(__m512i bits, __m512i low_bits) {
    return _mm512_shrdi_epi16(bits, low_bits, 3);
  }
};

}  // namespace

FOURFOLD_AMX_VECTORS void multiply_tiles(const uint8_t* pair, const NextTiles& next, int64_t chunks,
                                         const std::byte* tiles, int64_t row_tiles, int terms,
                                         std::byte* scratch, DecodedAhead& ahead, float* sums) {
  multiply_pair<HardwareTiles>(pair, next, chunks, tiles, row_tiles, terms, scratch, ahead, sums);
}

void begin_tiles() {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = kTileRows;
  }
  __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

void end_tiles() {
  __asm__ volatile("tilerelease");
}

}  // namespace fourfold::cpu::amx
