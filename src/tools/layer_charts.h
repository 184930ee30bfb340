// What a report draws of a layer: errors by expert and stage, distributions, and the worst token.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "fourfold/expert_weights.h"
#include "tools/layer_trace.h"

namespace fourfold {

/// Relative L2 of l1, activation and l2, expert by expert.
struct ExpertErrors {
  std::string comparison;  ///< "checkpoint", "activations" or "kernel"
  std::vector<std::string> stages;
  std::vector<int64_t> experts;  ///< numbers in the checkpoint
  std::vector<int64_t> rows;     ///< of each expert; without rows its errors are 0
  std::vector<double> rel_l2;    ///< [experts, stages]
};

/// Bin i counts values in [base^(first + i * step), base^(first + (i + 1) * step)); the outermost bins take
/// what lies beyond.
struct Histogram {
  std::string name;
  double base = 2.0, first = 0.0, step = 1.0;
  std::vector<int64_t> counts;
  int64_t zeros = 0;
  int64_t not_finite = 0;  ///< of block scales: NaN and negative ones

  void add(double value);
};

/// The output of one token, column by column.
struct TokenScatter {
  std::string reference_name, candidate_name;
  int64_t token = -1;
  int64_t columns = 0;  ///< of the output; evenly spaced ones are kept
  std::vector<float> reference, candidate;
};

struct LayerCharts {
  std::vector<ExpertErrors> expert_errors;
  std::vector<Histogram> block_scales;  ///< of gate, up and down
  std::vector<Histogram> errors;        ///< relative L2 of output rows: by token
  std::optional<TokenScatter> worst_token;
};

ExpertErrors expert_errors(const std::string& comparison, const LayerTrace& reference,
                           const LayerTrace& candidate, const std::vector<int64_t>& expert_ids);
/// Of `out`, a value a token.
Histogram token_errors(const std::string& comparison, const LayerTrace& reference,
                       const LayerTrace& candidate);
/// The token whose output has the largest relative L2.
TokenScatter worst_token(const LayerTrace& reference, const LayerTrace& candidate);
/// NVFP4 matrices of the routed experts; without any, empty.
std::vector<Histogram> block_scale_histograms(const ExpertWeights& weights);

}  // namespace fourfold
