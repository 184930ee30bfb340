// Comparison metrics, accumulated in float64.
#include "fourfold/comparison.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "base/avx2.h"
#include "base/fail.h"

namespace fourfold {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <class T>
Comparison compare_rows(MatrixView<const T> reference, MatrixView<const T> candidate,
                        std::span<const int32_t> group_offsets) {
  if (reference.rows != candidate.rows || reference.cols != candidate.cols) {
    reject("compare", shape_text(reference.rows, reference.cols), shape_text(candidate.rows, candidate.cols));
  }
  ErrorSums total, group_sums;
  WorstPart worst_row, worst_group;
  size_t group = 0;
  const auto close_groups_ending_at = [&](int64_t row) {
    while (group + 1 < group_offsets.size() && group_offsets[group + 1] <= row) {
      if (group_offsets[group + 1] > group_offsets[group]) {
        worst_group.offer(static_cast<int64_t>(group), group_sums.relative_l2());
      }
      group_sums = {};
      ++group;
    }
  };
  for (int64_t row = 0; row < reference.rows; ++row) {
    close_groups_ending_at(row);
    ErrorSums sums;
    for (int64_t col = 0; col < reference.cols; ++col) {
      sums.add(static_cast<float>(reference(row, col)), static_cast<float>(candidate(row, col)));
    }
    worst_row.offer(row, sums.relative_l2());
    group_sums += sums;
    total += sums;
  }
  close_groups_ending_at(reference.rows);
  return {total.cosine(),   total.norm_ratio(), total.relative_l2(), worst_row.index,
          worst_row.rel_l2, worst_group.index,  worst_group.rel_l2};
}

constexpr size_t kApart = 8;  // sums of every eighth value, side by side

FOURFOLD_INLINE ErrorSums sums_of(std::span<const float> references, std::span<const float> candidates) {
  double reference_sums[kApart] = {}, candidate_sums[kApart] = {}, products[kApart] = {},
         differences[kApart] = {};
  const size_t count = references.size();
  const float *reference = references.data(), *candidate = candidates.data();
  const auto add = [&](size_t part) __attribute__((always_inline)) {
    const double a = reference[part], b = candidate[part];
    reference_sums[part] += a * a;
    candidate_sums[part] += b * b;
    products[part] += a * b;
    differences[part] += (b - a) * (b - a);
  };
  for (size_t i = 0; i + kApart <= count; i += kApart, reference += kApart, candidate += kApart) {
    for (size_t part = 0; part < kApart; ++part) add(part);
  }
  for (size_t part = 0; part < count % kApart; ++part) add(part);
  ErrorSums sums;
  for (size_t part = 0; part < kApart; ++part) {
    sums += ErrorSums{reference_sums[part], candidate_sums[part], products[part], differences[part]};
  }
  return sums;
}

/// The same where both are the same finite values.
FOURFOLD_INLINE ErrorSums sums_of_same(std::span<const float> values) {
  double squares[kApart] = {};
  const size_t count = values.size();
  const float* value = values.data();
  for (size_t i = 0; i + kApart <= count; i += kApart, value += kApart) {
    for (size_t part = 0; part < kApart; ++part) squares[part] += double{value[part]} * value[part];
  }
  for (size_t part = 0; part < count % kApart; ++part) squares[part] += double{value[part]} * value[part];
  double sum = 0.0;
  for (const double part : squares) sum += part;
  return {sum, sum, sum, 0.0};
}

#if FOURFOLD_HAS_AVX2_LOOPS
FOURFOLD_AVX2_LOOP ErrorSums sums_of_avx2(std::span<const float> references,
                                          std::span<const float> candidates) {
  return sums_of(references, candidates);
}
FOURFOLD_AVX2_LOOP ErrorSums sums_of_same_avx2(std::span<const float> values) {
  return sums_of_same(values);
}
#endif

/// As many values of both.
ErrorSums sums_of_pairs(std::span<const float> references, std::span<const float> candidates) {
#if FOURFOLD_HAS_AVX2_LOOPS
  if (has_avx2()) return sums_of_avx2(references, candidates);
#endif
  return sums_of(references, candidates);
}

ErrorSums sums_of_equals(std::span<const float> values) {
#if FOURFOLD_HAS_AVX2_LOOPS
  if (has_avx2()) return sums_of_same_avx2(values);
#endif
  return sums_of_same(values);
}

}  // namespace

void ErrorSums::add(double reference, double candidate) {
  reference_squared += reference * reference;
  candidate_squared += candidate * candidate;
  product += reference * candidate;
  difference_squared += (candidate - reference) * (candidate - reference);
}

void ErrorSums::add(std::span<const float> references, std::span<const float> candidates) {
  if (references.size() != candidates.size()) {
    reject("compare: values", std::to_string(references.size()), static_cast<int64_t>(candidates.size()));
  }
  if (references.empty()) return;
  if (std::memcmp(references.data(), candidates.data(), references.size_bytes()) == 0) {
    const ErrorSums sums = sums_of_equals(references);
    if (std::isfinite(sums.product)) {
      *this += sums;
      return;
    }
  }
  *this += sums_of_pairs(references, candidates);
}

ErrorSums& ErrorSums::operator+=(const ErrorSums& other) {
  reference_squared += other.reference_squared;
  candidate_squared += other.candidate_squared;
  product += other.product;
  difference_squared += other.difference_squared;
  return *this;
}

double ErrorSums::cosine() const {
  if (!std::isfinite(reference_squared) || !std::isfinite(candidate_squared)) return kNan;
  if (reference_squared == 0.0 || candidate_squared == 0.0) return reference_squared == candidate_squared;
  return product / std::sqrt(reference_squared * candidate_squared);  // exactly 1 for equal tensors
}

double ErrorSums::norm_ratio() const {
  if (reference_squared == 0.0 && candidate_squared == 0.0) return 1.0;
  return std::sqrt(candidate_squared) / std::sqrt(reference_squared);
}

double ErrorSums::relative_l2() const {
  if (std::isnan(difference_squared)) return kNan;
  if (reference_squared == 0.0) return difference_squared == 0.0 ? 0.0 : kInfinity;
  return std::sqrt(difference_squared) / std::sqrt(reference_squared);
}

void WorstPart::offer(int64_t part, double part_rel_l2) {
  const double rank = std::isnan(part_rel_l2) ? kInfinity : part_rel_l2;
  const double best = std::isnan(rel_l2) ? kInfinity : rel_l2;
  if (index < 0 || rank > best) *this = {part, part_rel_l2};
}

Comparison compare(MatrixView<const Bf16> reference, MatrixView<const Bf16> candidate,
                   std::span<const int32_t> group_offsets) {
  return compare_rows(reference, candidate, group_offsets);
}

Comparison compare(MatrixView<const float> reference, MatrixView<const float> candidate,
                   std::span<const int32_t> group_offsets) {
  return compare_rows(reference, candidate, group_offsets);
}

}  // namespace fourfold
