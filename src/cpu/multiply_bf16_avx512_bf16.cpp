// bf16 products with AVX512-BF16.
//
// vdpbf16ps adds the products of two neighbouring k to float32 sums of 16 rows of a panel. Codes are bf16
// exactly, so a table look-up is all that decoding takes; the block's scale comes when its 16 products are
// added:
//
//   block = x0 w0 + x1 w1 + ... + x15 w15      8 vdpbf16ps, from zero
//   sum   = fma(block, scale, sum)
//
// One row's sums run block after block whatever the number of rows, and whether weights are decoded first, so
// that its bits do not depend on the rows beside it. Up to kDirectRows rows decode as they go; more meet
// codes decoded once, a few chunks at a time, so that they stay in the first-level cache.
//
// The instruction takes subnormal operands for zero and makes subnormal sums zero: activations come divided
// by a power of two, so that what is lost is below 2^-126 of their largest (operands.h).
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "cpu/block_scales_avx512.h"
#include "cpu/kernels.h"
#include "cpu/prefetch.h"
#include "cpu/targets.h"

namespace fourfold::cpu::avx512_bf16 {
namespace {

constexpr int kDirectRows = 6;         // 12 sums in registers, and 12 of the block
constexpr int kRowsAtATime = 7;        // against decoded codes
constexpr int64_t kDecodedChunks = 4;  // 16 KB of codes and 2 KB of scales
constexpr int kPairsPerBlock = kBlockDepth / 2;

/// Values x 256 as bf16, for scales x kScaleUnit; a look-up takes the low five bits of a lane, of which the
/// fifth belongs to the next code, so the table comes twice.
FOURFOLD_AVX512_BF16 FOURFOLD_INLINE __m512i value_table() {
  constexpr auto kSign = static_cast<int16_t>(0x8000);
  return _mm512_broadcast_i64x4(
      _mm256_setr_epi16(0x0000, 0x4300, 0x4380, 0x43C0, 0x4400, 0x4440, 0x4480, 0x44C0,  //
                        kSign, kSign | 0x4300, kSign | 0x4380, kSign | 0x43C0, kSign | 0x4400, kSign | 0x4440,
                        kSign | 0x4480, kSign | 0x44C0));
}

/// Words of 8 codes a row -> k = 2i and 2i + 1 of every row.
FOURFOLD_AVX512_BF16 FOURFOLD_INLINE __m512i decode_pair(__m512i words, int i, __m512i table) {
  return _mm512_permutexvar_epi16(_mm512_srli_epi32(words, static_cast<unsigned>(4 * i)), table);
}

/// x[0] and x[1] in every lane.
FOURFOLD_AVX512_BF16 FOURFOLD_INLINE __m512bh broadcast_pair(const Bf16* x) {
  int32_t pair = 0;
  std::memcpy(&pair, x, sizeof(pair));
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}

/// kRows rows on their way along K.
template <int kRows>
struct Sums {
  __m512 panels[kRows][2];

  FOURFOLD_AVX512_BF16 FOURFOLD_INLINE void zero() {
    for (auto& row : panels) row[0] = row[1] = _mm512_setzero_ps();
  }
  FOURFOLD_AVX512_BF16 FOURFOLD_INLINE void load(const float* from) {
    for (int row = 0; row < kRows; ++row) {
      for (int panel = 0; panel < 2; ++panel) {
        panels[row][panel] = _mm512_loadu_ps(from + row * kPairRows + panel * kPanelRows);
      }
    }
  }
  FOURFOLD_AVX512_BF16 FOURFOLD_INLINE void store(float* to) const {
    for (int row = 0; row < kRows; ++row) {
      for (int panel = 0; panel < 2; ++panel) {
        _mm512_storeu_ps(to + row * kPairRows + panel * kPanelRows, panels[row][panel]);
      }
    }
  }
  FOURFOLD_AVX512_BF16 FOURFOLD_INLINE void add_products(const Bf16* x, int64_t stride, __m512i first,
                                                         __m512i second) {
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const __m512bh pair = broadcast_pair(x + row * stride);
      panels[row][0] = _mm512_dpbf16_ps(panels[row][0], reinterpret_cast<__m512bh>(first), pair);
      panels[row][1] = _mm512_dpbf16_ps(panels[row][1], reinterpret_cast<__m512bh>(second), pair);
    }
  }
  FOURFOLD_AVX512_BF16 FOURFOLD_INLINE void add_scaled(const Sums& block, __m512 first, __m512 second) {
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      panels[row][0] = _mm512_fmadd_ps(block.panels[row][0], first, panels[row][0]);
      panels[row][1] = _mm512_fmadd_ps(block.panels[row][1], second, panels[row][1]);
    }
  }
};

template <int kRows>
FOURFOLD_AVX512_BF16 void multiply_direct(const uint8_t* pair, int64_t chunks, const Bf16* x, float* out) {
  const PrefetchPlan plan = prefetch_plan();
  const int64_t stride = chunks * kChunkDepth;
  const __m512i table = value_table();
  Sums<kRows> sums;
  sums.zero();
  for (int64_t chunk = 0; chunk < chunks; ++chunk, pair += kPairChunkBytes) {
    prefetch_ahead(pair, plan);
    const uint8_t* const other = pair + kPanelChunkBytes;
    for (int block = 0; block < kBlocksPerChunk; ++block, x += kBlockDepth) {
      Sums<kRows> products;
      products.zero();
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int64_t at = block * kBlockBytes + half * kHalfBytes;
        const __m512i first = _mm512_loadu_si512(pair + at), second = _mm512_loadu_si512(other + at);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          products.add_products(x + half * 8 + 2 * i, stride, decode_pair(first, i, table),
                                decode_pair(second, i, table));
        }
      }
      sums.add_scaled(products, avx512::load_scales(pair, block), avx512::load_scales(other, block));
    }
  }
  sums.store(out);
}

/// A block of both panels, decoded.
struct alignas(64) DecodedBlock {
  Bf16 values[kPairsPerBlock][2][kPanelRows][2];  // [pair of k][panel][row][k of the pair], x 1 / kScaleUnit
  float scales[2][kPanelRows];                    // x kScaleUnit
};
static_assert(kDecodedChunks * kBlocksPerChunk * sizeof(DecodedBlock) <= kKernelScratchBytes);

FOURFOLD_AVX512_BF16 void decode_chunk(const uint8_t* pair_chunk, DecodedBlock* out) {
  const __m512i table = value_table();
  for (int block = 0; block < kBlocksPerChunk; ++block, ++out) {
#pragma GCC unroll 2
    for (int panel = 0; panel < 2; ++panel) {
      const uint8_t* const from = pair_chunk + panel * kPanelChunkBytes;
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m512i words = _mm512_loadu_si512(from + block * kBlockBytes + half * kHalfBytes);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          _mm512_store_si512(out->values[half * 4 + i][panel], decode_pair(words, i, table));
        }
      }
      _mm512_store_ps(out->scales[panel], avx512::load_scales(from, block));
    }
  }
}

template <int kRows>
FOURFOLD_AVX512_BF16 void multiply_decoded(const DecodedBlock* blocks, int64_t count, const Bf16* x,
                                           int64_t stride, float* out) {
  Sums<kRows> sums;
  sums.load(out);
  for (int64_t block = 0; block < count; ++block, ++blocks, x += kBlockDepth) {
    Sums<kRows> products;
    products.zero();
#pragma GCC unroll 8
    for (int i = 0; i < kPairsPerBlock; ++i) {
      products.add_products(x + 2 * i, stride, _mm512_load_si512(blocks->values[i][0]),
                            _mm512_load_si512(blocks->values[i][1]));
    }
    sums.add_scaled(products, _mm512_load_ps(blocks->scales[0]), _mm512_load_ps(blocks->scales[1]));
  }
  sums.store(out);
}

using MultiplyDirect = void (*)(const uint8_t*, int64_t, const Bf16*, float*);
constexpr MultiplyDirect kMultiplyDirect[kDirectRows + 1] = {
    nullptr,
    multiply_direct<1>,
    multiply_direct<2>,
    multiply_direct<3>,
    multiply_direct<4>,
    multiply_direct<5>,
    multiply_direct<6>,
};

using MultiplyDecoded = void (*)(const DecodedBlock*, int64_t, const Bf16*, int64_t, float*);
constexpr MultiplyDecoded kMultiplyDecoded[kRowsAtATime + 1] = {
    nullptr,
    multiply_decoded<1>,
    multiply_decoded<2>,
    multiply_decoded<3>,
    multiply_decoded<4>,
    multiply_decoded<5>,
    multiply_decoded<6>,
    multiply_decoded<7>,
};

}  // namespace

void multiply_bf16(const uint8_t* pair, int64_t chunks, const Bf16* rows, int64_t row_count,
                   std::byte* scratch, float* sums) {
  if (row_count <= kDirectRows) {
    if (row_count > 0) kMultiplyDirect[row_count](pair, chunks, rows, sums);
    return;
  }
  auto* const decoded = reinterpret_cast<DecodedBlock*>(scratch);
  const int64_t stride = chunks * kChunkDepth;
  const PrefetchPlan plan = prefetch_plan();
  std::fill_n(sums, row_count * kPairRows, 0.0f);
  for (int64_t first = 0; first < chunks; first += kDecodedChunks) {
    const int64_t count = std::min(kDecodedChunks, chunks - first);
    for (int64_t chunk = 0; chunk < count; ++chunk) {
      const uint8_t* const at = pair + (first + chunk) * kPairChunkBytes;
      prefetch_ahead(at, plan);
      decode_chunk(at, decoded + chunk * kBlocksPerChunk);
    }
    // Groups of nearly equal size: a last one of a row or two would wait for every sum.
    const int64_t groups = (row_count + kRowsAtATime - 1) / kRowsAtATime;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t row = group * row_count / groups, next = (group + 1) * row_count / groups;
      kMultiplyDecoded[next - row](decoded, count * kBlocksPerChunk,
                                   rows + row * stride + first * kChunkDepth, stride, sums + row * kPairRows);
    }
  }
}

}  // namespace fourfold::cpu::avx512_bf16
