#include "tools/input_scale_check.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "fourfold/block_scaled.h"
#include "fourfold/comparison.h"
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

/// Relative L2 of every staged row; infinity for rows that are not finite.
std::vector<double> row_errors(MatrixView<const Bf16> rows, const StagedActivations& staged,
                               ActivationFormat format) {
  std::vector<double> errors;
  std::vector<float> term(static_cast<size_t>(rows.cols));
  for (int64_t row = 0; row < rows.rows; ++row) {
    std::vector<float> values(term.size(), 0.0f);
    const float global = staged.row_scales[static_cast<size_t>(row)];
    add_term(staged.codes, staged.scales, row, global, term, values);
    if (format == ActivationFormat::kNvfp4x2) {
      add_term(staged.residual_codes, staged.residual_scales, row, global, term, values);
    }
    ErrorSums sums;
    for (int64_t col = 0; col < rows.cols; ++col) {
      sums.add(static_cast<float>(rows(row, col)), values[static_cast<size_t>(col)]);
    }
    const double error = sums.relative_l2();
    errors.push_back(std::isfinite(error) ? error : std::numeric_limits<double>::infinity());
  }
  return errors;
}

double median(std::span<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace

ScaleLoss worst_scale_loss(MatrixView<const Bf16> rows, const StagedBuffers& staged, ActivationFormat format,
                           std::span<const int32_t> group_offsets) {
  StagedBuffers by_token(format, rows.rows, rows.cols);
  reference::activation_scales(ScalePolicy::kDynamicToken, rows, group_offsets, {},
                               by_token.views.row_scales);
  reference::stage(format, rows, by_token.views);
  std::vector<double> found = row_errors(rows, staged.views, format),
                      due = row_errors(rows, by_token.views, format);

  ScaleLoss worst;
  for (size_t expert = 0; expert + 1 < group_offsets.size(); ++expert) {
    const auto begin = static_cast<size_t>(group_offsets[expert]);
    const size_t count = static_cast<size_t>(group_offsets[expert + 1]) - begin;
    if (count == 0) continue;
    const ScaleLoss loss{static_cast<int64_t>(expert), median(std::span(found).subspan(begin, count)),
                         median(std::span(due).subspan(begin, count))};
    if (worst.expert < 0 || loss.ratio() > worst.ratio()) worst = loss;
  }
  return worst;
}

}  // namespace fourfold
