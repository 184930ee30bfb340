#include "reference/sampled_multiply.h"

#include "base/fail.h"
#include "base/thread_scratch.h"

namespace fourfold::reference {
namespace {

/// Rows [first, last) of one expert.
struct RowRange {
  int64_t expert = 0, first = 0, last = 0;
};

std::vector<RowRange> ranges_of_experts(const SampledRows& rows) {
  std::vector<RowRange> ranges;
  for (int64_t row = 0; row < rows.rows; ++row) {
    const int32_t expert = rows.expert_of[static_cast<size_t>(row)];
    if (ranges.empty() || ranges.back().expert != expert) ranges.push_back({expert, row, row});
    ranges.back().last = row + 1;
  }
  return ranges;
}

double dot(const SampledRows& rows, int64_t row, const float* weight) {
  double sum = 0.0;
  for (int term = 0; term < rows.terms; ++term) {
    const float* values = rows.values.data() + (term * rows.rows + row) * rows.depth;
    for (int64_t k = 0; k < rows.depth; ++k) sum += double{values[k]} * double{weight[k]};
  }
  return sum;
}

}  // namespace

std::vector<float> multiply_sampled(const ExpertWeights& weights, ExpertGemm gemm, const SampledRows& rows,
                                    std::span<const int64_t> columns) {
  for (const Expert& expert : weights.experts) {
    if (!expert.has_gate() || expert.gate_bias || expert.up_bias || expert.down_bias) {
      reject("sampled rows: " + expert.name, "gate, up and down without biases", "something else");
    }
  }
  const auto width = static_cast<int64_t>(columns.size());
  std::vector<float> out(static_cast<size_t>(rows.rows * width));
  const std::vector<RowRange> ranges = ranges_of_experts(rows);
  ThreadScratch scratch(rows.depth);
#pragma omp parallel
  {
    const std::span<float> weight = scratch.mine();
#pragma omp for collapse(2) schedule(static)
    for (size_t range = 0; range < ranges.size(); ++range) {
      for (int64_t c = 0; c < width; ++c) {
        const RowRange& group = ranges[range];
        const WeightRow source = weight_row_of(weights, group.expert, gemm, columns[static_cast<size_t>(c)]);
        decode_row(*source.weight, source.row, weight.data());
        const float global = global_multiplier(*source.weight);
        for (int64_t row = group.first; row < group.last; ++row) {
          const float alpha = rows.row_scales[static_cast<size_t>(row)] * global;
          out[static_cast<size_t>(row * width + c)] =
              alpha * static_cast<float>(dot(rows, row, weight.data()));
        }
      }
    }
  }
  return out;
}

}  // namespace fourfold::reference
