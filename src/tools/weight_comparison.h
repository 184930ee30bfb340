// What a checkpoint's weights lost, and what they had to lose.
#pragma once

#include <string>
#include <vector>

#include "fourfold/comparison.h"
#include "fourfold/expert_weights.h"
#include "tools/layertest.h"

namespace fourfold {

inline constexpr int64_t kSharedExpert = -1;

/// One matrix of one expert.
struct MatrixLoss {
  std::string name;    ///< e.g. "layers.0.ffn.experts.3 up"
  int64_t expert = 0;  ///< index in the layer, or kSharedExpert
  ErrorSums sums;      ///< original against dequantized
  double limit = 0.0;  ///< on the relative L2
  ExactBlocks blocks;  ///< MXFP4 originals alone
};

struct WeightComparison {
  std::vector<MatrixLoss> matrices;
  ErrorSums total;
  double limit = 0.0;  ///< on the relative L2 of all weights together
  ExactBlocks blocks;
  bool has_blocks = false;
  /// Every value of both layers is the same, those of biases and of the shared expert's gate too.
  bool identical = false;
};

/// A matrix may lose a tenth more than this library's own quantization of the same original by ModelOpt's
/// rule, or, from MXFP4, than the lossless cast: what a sound converter reaches, measured on the same data. A
/// matrix that is not NVFP4 afterwards may lose rounding alone where it keeps its format, and anything where
/// it does not. The shared expert is compared where both have one.
WeightComparison compare_weights(const ExpertWeights& original, const ExpertWeights& nvfp4);

/// Sums over all values of all matrices, dequantized.
ErrorSums compare_values(const ExpertWeights& reference, const ExpertWeights& candidate);

}  // namespace fourfold
