// Sums of a pair on their way out, with AVX-512: the same bits as the plain loops of row_functions.cpp, from
// registers, and a row's 32 columns of bf16 as the one line that they are.
#include <immintrin.h>

#include "cpu/activation_loops.h"
#include "cpu/bf16_avx512.h"
#include "cpu/row_functions.h"
#include "cpu/targets.h"

namespace fourfold::cpu::avx512 {
namespace {

static_assert(kPanelRows == 16);

/// A row of both panels.
struct PanelValues {
  __m512 of[2];
};

/// alpha * sum + bias in float32.
FOURFOLD_AVX512 FOURFOLD_INLINE PanelValues finish_row(const PairSums& sums, int64_t row) {
  const float* const first = sums.sums + row * sums.terms * kPairRows;
  const __m512 factor = _mm512_set1_ps(sums.row_factors != nullptr ? sums.row_factors[row] : 1.0f);
  const float row_scale = sums.row_scales != nullptr ? sums.row_scales[row] : 1.0f;
  PanelValues values;
  for (int panel = 0; panel < 2; ++panel) {
    __m512 total = _mm512_loadu_ps(first + panel * kPanelRows);
    if (sums.terms == 2) {
      total = _mm512_add_ps(total, _mm512_loadu_ps(first + kPairRows + panel * kPanelRows));
    }
    const __m512 alpha = _mm512_set1_ps(row_scale * sums.globals[panel]);
    values.of[panel] = _mm512_mul_ps(alpha, _mm512_mul_ps(total, factor));
    if (sums.biases[panel] != nullptr) {
      values.of[panel] = _mm512_add_ps(values.of[panel], _mm512_loadu_ps(sums.biases[panel]));
    }
  }
  return values;
}

/// Rounded to bf16: the upper halves of lanes. The lower ones are anything.
FOURFOLD_AVX512 FOURFOLD_INLINE __m512i round_to_upper_halves(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));  // quiet
}

FOURFOLD_AVX512 FOURFOLD_INLINE __mmask16 mask_of(int columns) {
  return static_cast<__mmask16>((1u << columns) - 1);
}

/// Where rows of 2 x 16 bf16 go, one next to the other or not.
struct Targets {
  Bf16* to[2];
  int64_t stride;
  __mmask16 masks[2];
  bool is_line;

  FOURFOLD_AVX512 FOURFOLD_INLINE void store(int64_t row, __m512i values) const {
    if (is_line) return _mm512_storeu_si512(to[0] + row * stride, values);
    _mm256_mask_storeu_epi16(to[0] + row * stride, masks[0], _mm512_castsi512_si256(values));
    if (masks[1] == 0) return;
    _mm256_mask_storeu_epi16(to[1] + row * stride, masks[1], _mm512_extracti64x4_epi64(values, 1));
  }
};

FOURFOLD_AVX512 FOURFOLD_INLINE Targets targets_of(const PairTargets& targets) {
  Targets out{{targets.h[0], targets.h[1]}, targets.h_stride, {}, false};
  for (int panel = 0; panel < 2; ++panel) {
    out.masks[panel] = targets.h[panel] == nullptr ? __mmask16{0} : mask_of(targets.columns[panel]);
  }
  out.is_line = out.masks[0] == 0xFFFF && out.masks[1] == 0xFFFF && out.to[1] == out.to[0] + kPanelRows;
  return out;
}

/// The activation of a panel's row, rounded to bf16 in upper halves.
template <ActivationKind kKind>
FOURFOLD_AVX512 FOURFOLD_INLINE __m512i activated(const ActivationFunction& function, __m512i gate,
                                                  __m512i up) {
  alignas(64) float gates[kPanelRows], ups[kPanelRows], results[kPanelRows];
  _mm512_store_si512(gates, gate);
  _mm512_store_si512(ups, up);
  for (int i = 0; i < kPanelRows; ++i) {  // vectorised
    results[i] = loops::activate<kKind>(gates[i], ups[i], function.alpha, function.beta, function.limit);
  }
  return round_to_upper_halves(_mm512_load_ps(results));
}

template <ActivationKind kKind>
FOURFOLD_AVX512 FOURFOLD_INLINE void activate_rows(const ActivationFunction& function, const PairSums& sums,
                                                   const PairTargets& h_targets, Bf16* out,
                                                   int64_t out_stride) {
  const ActivationFunction constants = function;  // which stores can't change
  const Targets h = targets_of(h_targets);
  const bool has_h = (h.masks[0] | h.masks[1]) != 0;
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  const Targets to = targets_of({{h_targets.columns[0], is_gated(kKind) ? 0 : h_targets.columns[1]},
                                 {out, out + kPanelRows},
                                 out_stride});
  for (int64_t row = 0; row < sums.rows; ++row) {
    const PanelValues finished = finish_row(sums, row);
    const __m512i first = _mm512_and_si512(round_to_upper_halves(finished.of[0]), upper);
    const __m512i second = _mm512_and_si512(round_to_upper_halves(finished.of[1]), upper);
    if (has_h) h.store(row, join_upper_halves(first, second));
    if constexpr (is_gated(kKind)) {
      to.store(row, join_upper_halves(activated<kKind>(constants, first, second), _mm512_setzero_si512()));
    } else {
      to.store(row, join_upper_halves(activated<kKind>(constants, first, first),
                                      activated<kKind>(constants, second, second)));
    }
  }
}

struct Activations {
  template <ActivationKind kKind>
  FOURFOLD_AVX512 static void of_rows(const ActivationFunction& function, const PairSums& sums,
                                      const PairTargets& targets, Bf16* out, int64_t out_stride) {
    activate_rows<kKind>(function, sums, targets, out, out_stride);
  }
};

/// kVectors x 16 columns from `col` on: their sums stay in registers for all terms.
template <int kVectors>
FOURFOLD_AVX512 FOURFOLD_INLINE void combine_columns(const Bf16* const* rows, const float* weights,
                                                     int64_t count, int64_t col, float* out) {
  __m512 sums[kVectors];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < count; ++k) {
    if (rows[k] == nullptr) continue;
    const auto* const values = reinterpret_cast<const __m256i*>(rows[k] + col);
    const __m512 weight = _mm512_set1_ps(weights[k]);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      sums[i] = _mm512_add_ps(sums[i], _mm512_mul_ps(weight, widen_bf16(_mm256_loadu_si256(values + i))));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) _mm512_storeu_ps(out + col + i * kPanelRows, sums[i]);
}

}  // namespace

FOURFOLD_AVX512 void store_bf16(const PairSums& sums, const PairTargets& targets) {
  const Targets to = targets_of(targets);
  for (int64_t row = 0; row < sums.rows; ++row) {
    const PanelValues values = finish_row(sums, row);
    to.store(row,
             join_upper_halves(round_to_upper_halves(values.of[0]), round_to_upper_halves(values.of[1])));
  }
}

FOURFOLD_AVX512 void activate(const ActivationFunction& function, const PairSums& sums,
                              const PairTargets& targets, Bf16* out, int64_t out_stride) {
  rows_of_kind<Activations>(function.kind)(function, sums, targets, out, out_stride);
}

FOURFOLD_AVX512 void combine(const Bf16* const* rows, const float* weights, int64_t count, int64_t cols,
                             float* out) {
  constexpr int kVectors = 4;
  int64_t col = 0;
  for (; col + kVectors * kPanelRows <= cols; col += kVectors * kPanelRows) {
    combine_columns<kVectors>(rows, weights, count, col, out);
  }
  for (; col < cols; col += kPanelRows) combine_columns<1>(rows, weights, count, col, out);
}

}  // namespace fourfold::cpu::avx512
