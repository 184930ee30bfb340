#include "tools/input_scale_check.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "fourfold/block_scaled.h"
#include "fourfold/comparison.h"
#include "fourfold/quantize.h"
#include "fourfold/reference.h"

namespace fourfold {
namespace {

/// Adds one term of a staged row, dequantized, to `out` [cols].
void add_term(const MatrixView<uint8_t>& codes, const MatrixView<uint8_t>& scales, int64_t row, float global,
              std::vector<float>& term, std::vector<float>& out) {
  const auto cols = static_cast<int64_t>(out.size());
  const BlockScaledView view{QuantFormat::kNvfp4,
                             1,
                             cols,
                             codes.rows_from(row, 1),
                             scales.row(row),
                             cols / 16,
                             ScaleLayout::kRowMajor,
                             {global, GlobalScaleKind::kMultiplier}};
  dequantize_row(view, 0, term.data());
  for (size_t i = 0; i < out.size(); ++i) out[i] += term[i];
}

/// Errors of one staged row.
struct RowLoss {
  double relative_l2 = 0.0;  ///< infinity for a row that is not finite
  double noise = 0.0;        ///< squared error
  double clipped = 0.0;      ///< squared excess over what the scale can hold
};

RowLoss row_loss(MatrixView<const Bf16> rows, int64_t row, const StagedActivations& staged,
                 ActivationFormat format) {
  std::vector<float> term(static_cast<size_t>(rows.cols)), values(term.size(), 0.0f);
  const float global = staged.row_scales[static_cast<size_t>(row)];
  add_term(staged.codes, staged.scales, row, global, term, values);
  if (format == ActivationFormat::kNvfp4x2) {
    add_term(staged.residual_codes, staged.residual_scales, row, global, term, values);
  }
  const double terms = format == ActivationFormat::kNvfp4x2 ? 2.0 : 1.0;  // each holds up to 2688 x scale
  ErrorSums sums;
  RowLoss loss;
  for (int64_t col = 0; col < rows.cols; ++col) {
    const auto x = static_cast<double>(static_cast<float>(rows(row, col)));
    sums.add(x, values[static_cast<size_t>(col)]);
    const double excess = std::max(0.0, std::abs(x) - terms * double{kNvfp4Range} * global);
    loss.clipped += excess * excess;
  }
  loss.noise = sums.difference_squared;
  loss.relative_l2 =
      std::isfinite(sums.relative_l2()) ? sums.relative_l2() : std::numeric_limits<double>::infinity();
  return loss;
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

/// found / due, where something over nothing is infinitely worse and nothing over nothing is equal. Rows that
/// are not finite on either side say nothing about a scale.
double ratio_of(double found, double due) {
  if (found == due || !std::isfinite(due)) return 1.0;
  return due > 0.0 ? found / due : std::numeric_limits<double>::infinity();
}

}  // namespace

double ScaleLoss::severity() const {
  return std::max(median_ratio, std::sqrt(1.0 + clipped_over_noise));
}

ScaleLoss worst_scale_loss(MatrixView<const Bf16> rows, const StagedBuffers& staged,
                           const LayerOptions& options, std::span<const int32_t> group_offsets) {
  const ActivationFormat format = options.activations;
  StagedBuffers by_token(format, rows.rows, rows.cols);
  reference::activation_scales(ScalePolicy::kDynamicToken, rows, group_offsets, {},
                               by_token.views.row_scales);
  reference::stage(format, rows, by_token.views, options.activation_rule);

  ScaleLoss worst;
  for (size_t expert = 0; expert + 1 < group_offsets.size(); ++expert) {
    std::vector<double> found, due;
    double clipped = 0.0, noise = 0.0;
    for (int64_t row = group_offsets[expert]; row < group_offsets[expert + 1]; ++row) {
      const RowLoss with_scale = row_loss(rows, row, staged.views, format);
      const RowLoss by_token_loss = row_loss(rows, row, by_token.views, format);
      found.push_back(with_scale.relative_l2);
      due.push_back(by_token_loss.relative_l2);
      clipped += with_scale.clipped;
      noise += by_token_loss.noise;
    }
    if (found.empty()) continue;
    const ScaleLoss loss{static_cast<int64_t>(expert), ratio_of(median(found), median(due)),
                         clipped == 0.0 ? 0.0 : ratio_of(clipped, noise)};
    if (worst.expert < 0 || loss.severity() > worst.severity()) worst = loss;
  }
  return worst;
}

}  // namespace fourfold
