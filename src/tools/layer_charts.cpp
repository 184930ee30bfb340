#include "tools/layer_charts.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "fourfold/comparison.h"
#include "fourfold/weight_statistics.h"
#include "tools/expert_matrices.h"

namespace fourfold {
namespace {

constexpr int64_t kMostPoints = 1024;

ErrorSums sums_of_rows(MatrixView<const Bf16> reference, MatrixView<const Bf16> candidate, int64_t first,
                       int64_t end) {
  ErrorSums sums;
  for (int64_t row = first; row < end; ++row) {
    for (int64_t col = 0; col < reference.cols; ++col) {
      sums.add(static_cast<double>(static_cast<float>(reference(row, col))),
               static_cast<double>(static_cast<float>(candidate(row, col))));
    }
  }
  return sums;
}

}  // namespace

void Histogram::add(double value) {
  if (value == 0.0) {
    ++zeros;
  } else if (!std::isfinite(value) || value < 0.0) {
    ++not_finite;
  } else {
    const double bin = std::floor((std::log(value) / std::log(base) - first) / step + 1e-9);
    ++counts[static_cast<size_t>(std::clamp(bin, 0.0, static_cast<double>(counts.size() - 1)))];
  }
}

ExpertErrors expert_errors(const std::string& comparison, const LayerTrace& reference,
                           const LayerTrace& candidate, const std::vector<int64_t>& expert_ids) {
  ExpertErrors errors{comparison, {"l1", "activation", "l2"}, expert_ids, {}, {}};
  const auto& offsets = reference.permutation.group_offsets;
  for (size_t expert = 0; expert < expert_ids.size(); ++expert) {
    const int64_t first = offsets[expert], end = offsets[expert + 1];
    errors.rows.push_back(end - first);
    for (const auto view : {&LayerTrace::h_view, &LayerTrace::activation_view, &LayerTrace::z_view}) {
      errors.rel_l2.push_back(
          sums_of_rows((reference.*view)(), (candidate.*view)(), first, end).relative_l2());
    }
  }
  return errors;
}

Histogram token_errors(const std::string& comparison, const LayerTrace& reference,
                       const LayerTrace& candidate) {
  Histogram histogram{comparison, 10.0, -6.0, 0.25, std::vector<int64_t>(28)};
  for (int64_t token = 0; token < reference.tokens; ++token) {
    histogram.add(sums_of_rows(reference.y_view(), candidate.y_view(), token, token + 1).relative_l2());
  }
  return histogram;
}

TokenScatter worst_token(const LayerTrace& reference, const LayerTrace& candidate) {
  TokenScatter scatter;
  scatter.columns = reference.hidden;
  scatter.token = std::max<int64_t>(0, compare(reference.y_view(), candidate.y_view()).worst_row);
  const int64_t step = (reference.hidden + kMostPoints - 1) / kMostPoints;
  for (int64_t col = 0; col < reference.hidden; col += step) {
    scatter.reference.push_back(static_cast<float>(reference.y_view()(scatter.token, col)));
    scatter.candidate.push_back(static_cast<float>(candidate.y_view()(scatter.token, col)));
  }
  return scatter;
}

std::vector<Histogram> block_scale_histograms(const ExpertWeights& weights) {
  std::vector<Histogram> histograms;
  for (const auto& [name, member] : kExpertMatrices) {
    // From the smallest subnormal, 2^-9, to 448.
    Histogram histogram{name, 2.0, -9.0, 1.0, std::vector<int64_t>(18)};
    std::vector<ScaleCounts> of_expert(weights.experts.size());
#pragma omp parallel for schedule(static)
    for (size_t e = 0; e < of_expert.size(); ++e) {
      const WeightView& weight = weights.experts[e].*member;
      if (is_stored_as(weight, QuantFormat::kNvfp4))
        of_expert[e] = count_scales(std::get<BlockScaledView>(weight));
    }
    ScaleCounts all;
    for (const ScaleCounts& counts : of_expert) all.add(counts);
    const std::array<int64_t, 256>& codes = all.by_byte;
    histogram.zeros = codes[0];
    for (size_t code = 1; code < codes.size(); ++code) {
      if (code > kE4m3MaxCode) {
        histogram.not_finite += codes[code];
      } else {
        // Exponents 1 to 15 are 2^-6 to 2^8; subnormals are code x 2^-9.
        const size_t exponent = code >> 3;
        const size_t bin = exponent > 0 ? exponent + 2 : code >= 4 ? 2 : code >= 2 ? 1 : 0;
        histogram.counts[bin] += codes[code];
      }
    }
    if (all.total() > 0) histograms.push_back(std::move(histogram));
  }
  return histograms;
}

}  // namespace fourfold
