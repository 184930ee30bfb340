#include "tools/calibration.h"

#include <cmath>

#include "fourfold/quantize.h"

namespace fourfold {
namespace {

float larger(float a, float b) {
  return std::isnan(a) || a > b ? a : b;
}

void add_rows(ExpertAmax& amax, MatrixView<const Bf16> x, MatrixView<const Bf16> intermediate) {
  amax.rows += x.rows;
  amax.x = larger(amax.x, absolute_maximum(x));
  amax.intermediate = larger(amax.intermediate, absolute_maximum(intermediate));
}

}  // namespace

void LayerAmax::add(const LayerTrace& run) {
  const std::vector<int32_t>& offsets = run.permutation.group_offsets;
  const MatrixView<const Bf16> x(run.staged_x.values.data(), run.rows, run.hidden);
  for (size_t expert = 0; expert < experts_.size(); ++expert) {
    const int64_t first = offsets[expert], rows = offsets[expert + 1] - first;
    add_rows(experts_[expert], x.rows_from(first, rows), run.activation_view().rows_from(first, rows));
  }
  if (!run.shared) return;
  if (!shared_) shared_.emplace();
  add_rows(*shared_, {run.shared->staged_x.values.data(), run.tokens, run.hidden},
           run.shared_activation_view());
}

}  // namespace fourfold
