// Comparison metrics, accumulated in float64.
#include "fourfold/comparison.h"

#include <cmath>
#include <limits>
#include <string>

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
  constexpr size_t kApart = 8;
  double reference_sums[kApart] = {}, candidate_sums[kApart] = {}, products[kApart] = {},
         differences[kApart] = {};
  const auto add_at = [&](size_t i, size_t part) {
    const double reference = references[i], candidate = candidates[i], difference = candidate - reference;
    reference_sums[part] += reference * reference;
    candidate_sums[part] += candidate * candidate;
    products[part] += reference * candidate;
    differences[part] += difference * difference;
  };
  size_t i = 0;
  for (; i + kApart <= references.size(); i += kApart) {
    for (size_t part = 0; part < kApart; ++part) add_at(i + part, part);
  }
  for (size_t part = 0; i < references.size(); ++i, ++part) add_at(i, part);
  for (size_t part = 0; part < kApart; ++part) {
    *this += ErrorSums{reference_sums[part], candidate_sums[part], products[part], differences[part]};
  }
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
