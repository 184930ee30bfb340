// A few rows of a GEMM's operand, to be multiplied again by an oracle: in float64, from the weights as the
// checkpoint stores them. Host data alone.
#pragma once

#include <cstdint>
#include <vector>

#include "fourfold/expert_weights.h"

namespace fourfold {

/// Which GEMM of an expert.
enum class ExpertGemm : uint8_t {
  kGateUp,  ///< depth H; columns [0, I) are gate's, [I, 2I) up's
  kDown,    ///< depth I; columns [0, H)
};

/// Decoded rows and the experts that they belong to, in ascending order of expert.
struct SampledRows {
  int64_t rows = 0;
  int64_t depth = 0;
  int terms = 1;                   ///< 2 for nvfp4x2
  std::vector<float> values;       ///< [terms, rows, depth], without the global scale: exact
  std::vector<float> row_scales;   ///< [rows]: global scale of the activations
  std::vector<int32_t> expert_of;  ///< [rows], ascending
};

/// The weight that gives output column `column` of `gemm`, and the row of it that does.
struct WeightRow {
  const WeightView* weight = nullptr;
  int64_t row = 0;
};
inline WeightRow weight_row_of(const ExpertWeights& weights, int64_t expert, ExpertGemm gemm,
                               int64_t column) {
  const Expert& owner = weights.experts[static_cast<size_t>(expert)];
  if (gemm == ExpertGemm::kDown) return {&owner.down, column};
  if (column < weights.intermediate) return {&owner.gate, column};
  return {&owner.up, column - weights.intermediate};
}

}  // namespace fourfold
