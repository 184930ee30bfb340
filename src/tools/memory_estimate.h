// How much memory each backend's form of a layer takes, without making it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "fourfold/expert_weights.h"

namespace fourfold {

struct MemoryEstimate {
  std::string backend;
  std::optional<int64_t> bytes;  ///< of weights, biases left out; absent: it can't run them
  std::string why_not;
  bool is_compiled_in = false;
};

/// Prepared weights of a layer of `experts` experts like those of `weights`, and its shared expert, for every
/// backend that the project has, compiled in or not. Workspaces come on top: MoeLayer::plan() says how much.
std::vector<MemoryEstimate> estimate_memory(const ExpertWeights& weights, int64_t experts);

}  // namespace fourfold
