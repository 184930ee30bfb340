// What both forms of an inspection's report derive from a layer.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fourfold/inspection.h"
#include "tools/memory_estimate.h"

namespace fourfold {

/// Counts over all matrices of the routed experts.
struct RoutedTotals {
  ScaleCounts scales;
  CodeCounts codes;
  ValueCounts values;
};
RoutedTotals routed_totals(const LayerInspection& layer);

/// Block size of down along I, which tensor parallelism cuts; of the shared expert's down. 1: no blocks.
int64_t block_along_intermediate(const LayerInspection& layer, bool shared);

/// Empty where the layer could not be loaded.
std::vector<MemoryEstimate> memory_of(const LayerInspection& layer);

/// "model.layers.3.mlp" -> "model.layers.L.mlp", so that layers that are alike read alike.
std::string generic_name(const std::string& name, int64_t layer);

}  // namespace fourfold
