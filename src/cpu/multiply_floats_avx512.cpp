// float32 products with AVX-512: weights decoded to floats, then fused multiply-adds.
//
// Decoding costs a shift, a table look-up and a multiplication for 16 values. 12 rows keep 24 sums in
// registers and use every decoded value 12 times.
#include <immintrin.h>

#include <algorithm>

#include "cpu/block_scales_avx512.h"
#include "cpu/kernels.h"
#include "cpu/prefetch.h"
#include "cpu/targets.h"

namespace fourfold::cpu::avx512 {
namespace {

constexpr int kRowsAtATime = 12;

/// Values x 256, for scales x 2^-8. A look-up takes the low four bits of a lane.
FOURFOLD_AVX512 FOURFOLD_INLINE __m512 value_table() {
  return _mm512_setr_ps(0.0f, 128.0f, 256.0f, 384.0f, 512.0f, 768.0f, 1024.0f, 1536.0f, -0.0f, -128.0f,
                        -256.0f, -384.0f, -512.0f, -768.0f, -1024.0f, -1536.0f);
}

/// The `nibble`th code of every row's word times its scale.
FOURFOLD_AVX512 FOURFOLD_INLINE __m512 decode_nibble(__m512i words, int nibble, __m512 table, __m512 scale) {
  const __m512i codes = _mm512_srli_epi32(words, static_cast<unsigned>(4 * nibble));
  return _mm512_mul_ps(_mm512_permutexvar_ps(codes, table), scale);
}

FOURFOLD_AVX512 FOURFOLD_INLINE void decode_panel(const uint8_t* panel_chunk, float* weights) {
  const __m512 table = value_table();
#pragma GCC unroll 4
  for (int block = 0; block < kBlocksPerChunk; ++block) {
    const __m512 scale = load_scales(panel_chunk, block);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512i words = _mm512_loadu_si512(panel_chunk + block * kBlockBytes + half * kHalfBytes);
#pragma GCC unroll 8
      for (int nibble = 0; nibble < 8; ++nibble) {
        const int k = block * kBlockDepth + half * 8 + k_of_nibble(nibble);
        _mm512_storeu_ps(weights + k * kPairRows, decode_nibble(words, nibble, table, scale));
      }
    }
  }
}

/// Sums of a block of K run over every fourth k, and are added as (0 + 1) + (2 + 3): what keeps one row's
/// additions from waiting for each other. Any number of rows sums in this order, so that a row's result does
/// not depend on how many there are.
constexpr int kSums = 4;

FOURFOLD_AVX512 FOURFOLD_INLINE void add_sums(const __m512 sums[kSums], float* to) {
  const __m512 sum = _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
  _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum));
}

/// One of the four sums after the other: all of them at once would not fit into registers.
template <int kRows>
FOURFOLD_AVX512 void multiply_rows(const float* weights, int64_t depth, const float* rows, int64_t row_stride,
                                   float* out) {
  __m512 parts[kRows][2][kSums];
  for (int part = 0; part < kSums; ++part) {
    __m512 sums[kRows][2];
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) sums[row][0] = sums[row][1] = _mm512_setzero_ps();
    for (int64_t k = part; k < depth; k += kSums) {
      const float* const at = weights + k * kPairRows;
      const __m512 first = _mm512_loadu_ps(at), second = _mm512_loadu_ps(at + kPanelRows);
#pragma GCC unroll 12
      for (int row = 0; row < kRows; ++row) {
        const __m512 activation = _mm512_set1_ps(rows[row * row_stride + k]);
        sums[row][0] = _mm512_fmadd_ps(activation, first, sums[row][0]);
        sums[row][1] = _mm512_fmadd_ps(activation, second, sums[row][1]);
      }
    }
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
      parts[row][0][part] = sums[row][0];
      parts[row][1][part] = sums[row][1];
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int panel = 0; panel < 2; ++panel) {
      add_sums(parts[row][panel], out + row * kPairRows + panel * kPanelRows);
    }
  }
}

FOURFOLD_AVX512 void multiply_single_row(const float* weights, int64_t depth, const float* row, float* out) {
  __m512 sums[2][kSums];
  for (auto& panel : sums) {
    for (__m512& sum : panel) sum = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < depth; k += kSums) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) {
      const __m512 activation = _mm512_set1_ps(row[k + i]);
      const float* const at = weights + (k + i) * kPairRows;
      sums[0][i] = _mm512_fmadd_ps(activation, _mm512_loadu_ps(at), sums[0][i]);
      sums[1][i] = _mm512_fmadd_ps(activation, _mm512_loadu_ps(at + kPanelRows), sums[1][i]);
    }
  }
  for (int panel = 0; panel < 2; ++panel) add_sums(sums[panel], out + panel * kPanelRows);
}

/// kFloatChunks of one panel against kRows rows: values go from their codes into the sums. Within a word
/// nibbles come in the order of their k, as far as every fourth k goes.
template <int kRows>
FOURFOLD_AVX512 FOURFOLD_INLINE void add_decoded(const uint8_t* panel, int64_t chunks, const float* rows,
                                                 int64_t row_stride, const PrefetchPlan* plan, float* out) {
  const __m512 table = value_table();
  __m512 sums[kRows][kSums];
  for (auto& row : sums) {
    for (__m512& sum : row) sum = _mm512_setzero_ps();
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk, panel += kPairChunkBytes, rows += kChunkDepth) {
    if (plan != nullptr) prefetch_ahead(panel, *plan);
    for (int block = 0; block < kBlocksPerChunk; ++block) {
      const __m512 scale = load_scales(panel, block);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m512i words = _mm512_loadu_si512(panel + block * kBlockBytes + half * kHalfBytes);
        const float* const at = rows + block * kBlockDepth + half * 8;
#pragma GCC unroll 8
        for (int nibble = 0; nibble < 8; ++nibble) {
          const __m512 weight = decode_nibble(words, nibble, table, scale);
          const int k = k_of_nibble(nibble);
#pragma GCC unroll 6
          for (int row = 0; row < kRows; ++row) {
            sums[row][k % kSums] =
                _mm512_fmadd_ps(_mm512_set1_ps(at[row * row_stride + k]), weight, sums[row][k % kSums]);
          }
        }
      }
    }
  }
  for (int row = 0; row < kRows; ++row) add_sums(sums[row], out + row * kPairRows);
}

template <int kRows>
FOURFOLD_AVX512 void multiply_few(const uint8_t* pair, int64_t chunks, const float* rows, float* out) {
  const PrefetchPlan plan = prefetch_plan();
  std::fill_n(out, kRows * kPairRows, 0.0f);
  for (int64_t chunk = 0; chunk < chunks; chunk += kFloatChunks) {
    const int64_t count = std::min(kFloatChunks, chunks - chunk);
    const uint8_t* const at = pair + chunk * kPairChunkBytes;
    const float* const x = rows + chunk * kChunkDepth;
    add_decoded<kRows>(at, count, x, chunks * kChunkDepth, &plan, out);
    add_decoded<kRows>(at + kPanelChunkBytes, count, x, chunks * kChunkDepth, nullptr, out + kPanelRows);
  }
}

using MultiplyFew = void (*)(const uint8_t*, int64_t, const float*, float*);
constexpr MultiplyFew kMultiplyFew[kFewFloatRows + 1] = {nullptr,         multiply_few<1>, multiply_few<2>,
                                                         multiply_few<3>, multiply_few<4>, multiply_few<5>,
                                                         multiply_few<6>};

using MultiplyRows = void (*)(const float*, int64_t, const float*, int64_t, float*);
constexpr MultiplyRows kMultiplyRows[kRowsAtATime + 1] = {
    nullptr,           multiply_rows<1>,  multiply_rows<2>, multiply_rows<3>, multiply_rows<4>,
    multiply_rows<5>,  multiply_rows<6>,  multiply_rows<7>, multiply_rows<8>, multiply_rows<9>,
    multiply_rows<10>, multiply_rows<11>, multiply_rows<12>};

}  // namespace

FOURFOLD_AVX512 void decode_floats(const uint8_t* pair, int64_t chunks, float* weights) {
  const PrefetchPlan plan = prefetch_plan();
  for (int64_t chunk = 0; chunk < chunks; ++chunk, pair += kPairChunkBytes) {
    prefetch_ahead(pair, plan);
    float* const out = weights + chunk * kChunkDepth * kPairRows;
    decode_panel(pair, out);
    decode_panel(pair + kPanelChunkBytes, out + kPanelRows);
  }
}

void multiply_few_floats(const uint8_t* pair, int64_t chunks, const float* rows, int64_t row_count,
                         float* sums) {
  if (row_count > 0) kMultiplyFew[row_count](pair, chunks, rows, sums);
}

void multiply_floats(const float* weights, int64_t depth, const float* rows, int64_t row_stride,
                     int64_t row_count, float* sums) {
  if (row_count == 1 && depth % kSums == 0) return multiply_single_row(weights, depth, rows, sums);
  for (int64_t row = 0; row < row_count; row += kRowsAtATime) {
    const int64_t count = std::min<int64_t>(kRowsAtATime, row_count - row);
    kMultiplyRows[count](weights, depth, rows + row * row_stride, row_stride, sums + row * kPairRows);
  }
}

}  // namespace fourfold::cpu::avx512
