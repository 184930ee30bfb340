#include "tools/inspect_layer_facts.h"

#include <fmt/format.h>

namespace fourfold {

RoutedTotals routed_totals(const LayerInspection& layer) {
  RoutedTotals totals;
  for (const MatrixGroup& group : layer.groups) {
    if (group.role.starts_with("shared")) continue;
    if (group.scales.total() > 0) totals.scales.add(group.scales);
    totals.codes.add(group.codes);
    totals.values.add(group.values);
  }
  return totals;
}

int64_t block_along_intermediate(const LayerInspection& layer, bool shared) {
  constexpr int64_t kFp8Tile = 128;  // of DeepSeek's weights
  for (const MatrixGroup& group : layer.groups) {
    if (group.role != (shared ? "shared down" : "down")) continue;
    if (group.format == traits_of(QuantFormat::kMxfp4).name) return traits_of(QuantFormat::kMxfp4).block_size;
    if (group.format == traits_of(QuantFormat::kNvfp4).name || group.format == "mixed")
      return traits_of(QuantFormat::kNvfp4).block_size;
    if (group.format == "fp8") return kFp8Tile;
  }
  return 1;
}

std::vector<MemoryEstimate> memory_of(const LayerInspection& layer) {
  if (!layer.loaded) return {};
  return estimate_memory(layer.loaded->weights, layer.experts);
}

std::string generic_name(const std::string& name, int64_t layer) {
  const std::string number = fmt::format("layers.{}.", layer);
  const size_t at = name.find(number);
  return at == std::string::npos ? name : name.substr(0, at) + "layers.L." + name.substr(at + number.size());
}

}  // namespace fourfold
