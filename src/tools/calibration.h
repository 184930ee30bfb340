// What calibration looks for: the largest magnitudes that an expert's GEMMs get to see.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "tools/layer_trace.h"

namespace fourfold {

/// Of the rows that went to one expert.
struct ExpertAmax {
  int64_t rows = 0;
  float x = 0.0f;  ///< of what gate and up multiply; with the routing weight where it is on the input
  float intermediate = 0.0f;  ///< of what down multiplies
};

/// One layer's, over any number of runs. NaN and infinity stay.
class LayerAmax {
 public:
  explicit LayerAmax(int64_t experts) : experts_(static_cast<size_t>(experts)) {}

  /// Of a run with bf16 activations.
  void add(const LayerTrace& run);

  const std::vector<ExpertAmax>& experts() const { return experts_; }  ///< [E]
  const std::optional<ExpertAmax>& shared() const { return shared_; }

 private:
  std::vector<ExpertAmax> experts_;
  std::optional<ExpertAmax> shared_;
};

}  // namespace fourfold
