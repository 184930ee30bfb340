#include "checkpoint/moe_names.h"

#include <algorithm>
#include <charconv>
#include <map>
#include <set>

#include "base/fail.h"

namespace fourfold {

std::optional<int64_t> leading_number(std::string_view text, char stop) {
  const size_t digits = text.find_first_not_of("0123456789");
  if (digits == 0 || digits == std::string_view::npos || digits > 9 || text[digits] != stop)
    return std::nullopt;
  if (text[0] == '0' && digits > 1) return std::nullopt;
  int64_t number = 0;
  std::from_chars(text.data(), text.data() + digits, number);
  return number;
}

std::vector<const Tensor*> tensors_under(const Checkpoint& checkpoint, std::string_view prefix) {
  const auto& tensors = checkpoint.tensors();
  std::vector<const Tensor*> found;
  for (auto it = tensors.lower_bound(prefix); it != tensors.end() && it->first.starts_with(prefix); ++it) {
    found.push_back(it->second);
  }
  return found;
}

namespace {

/// The block's own names of an expert's linears, or the other ones that are in use, if those are what
/// `tensors` are called: llm-compressor writes Mixtral's block with gate_proj, up_proj and down_proj.
BlockNames names_in_use(const std::vector<const Tensor*>& tensors, const BlockNames& usual) {
  const auto has = [&](std::string_view linear) {
    const std::string infix = fmt::format(".{}.", linear);
    return std::any_of(tensors.begin(), tensors.end(),
                       [&](const Tensor* tensor) { return tensor->name.find(infix) != std::string::npos; });
  };
  if (has(usual.up) || has(usual.down)) return usual;
  for (const BlockNames& other : kBlockNames) {
    if (has(other.up) || has(other.down)) return {usual.block, other.gate, other.up, other.down};
  }
  return usual;
}

}  // namespace

MoeBlock find_block(const Checkpoint& checkpoint, int64_t layer) {
  for (const std::string_view before : kBeforeLayer) {
    for (const BlockNames& names : kBlockNames) {
      const std::string prefix = fmt::format("{}{}{}", before, layer, names.block);
      const auto tensors = tensors_under(checkpoint, prefix + std::string(kExperts));
      if (!tensors.empty()) return {prefix, names_in_use(tensors, names)};
    }
  }
  const std::vector<int64_t> others = layers_with_experts(checkpoint);
  const auto example = [&](size_t before, size_t block) {
    return fmt::format("{}{}{}{}0.{}.weight", kBeforeLayer[before], layer, kBlockNames[block].block, kExperts,
                       kBlockNames[block].gate);
  };
  fail(ErrorCode::kNotFound, "{}: layer {}: expected expert tensors such as '{}' or '{}', found {}",
       checkpoint.path().string(), layer, example(0, 0), example(1, 2),
       others.empty() ? "no experts in any layer"
                      : fmt::format("experts in layers {}", fmt::join(others, ", ")));
}

namespace {

struct LayerOfTensor {
  int64_t layer = 0;
  bool is_of_expert = false;
};

/// nullopt for tensors outside of layers.
std::optional<LayerOfTensor> layer_of(std::string_view name) {
  for (const std::string_view before : kBeforeLayer) {
    if (!name.starts_with(before)) continue;
    const std::string_view rest = name.substr(before.size());
    const auto layer = leading_number(rest, '.');
    if (!layer) continue;
    const std::string_view in_layer = rest.substr(rest.find('.'));
    const bool is_of_expert =
        std::any_of(kBlockNames.begin(), kBlockNames.end(), [&](const BlockNames& names) {
          return in_layer.starts_with(names.block) &&
                 in_layer.substr(names.block.size()).starts_with(kExperts);
        });
    return LayerOfTensor{*layer, is_of_expert};
  }
  return std::nullopt;
}

}  // namespace

std::vector<int64_t> layers_with_experts(const Checkpoint& checkpoint) {
  std::set<int64_t> layers;
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    const auto of = layer_of(name);
    if (of && of->is_of_expert) layers.insert(of->layer);
  }
  return {layers.begin(), layers.end()};
}

CheckpointLayers list_layers(const Checkpoint& checkpoint) {
  std::map<int64_t, bool> has_experts;
  const auto add = [&](std::string_view name) {
    if (const auto of = layer_of(name)) has_experts[of->layer] |= of->is_of_expert;
  };
  for (const auto& [name, tensor] : checkpoint.tensors()) add(name);
  for (const std::string& name : checkpoint.lost()) add(name);
  CheckpointLayers layers;
  for (const auto& [layer, with] : has_experts) (with ? layers.with_experts : layers.dense).push_back(layer);
  return layers;
}

}  // namespace fourfold
