#include "checkpoint/quantization_claim.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <nlohmann/json.hpp>
#include <variant>

#include "base/fail.h"
#include "checkpoint/strict_json.h"

namespace fourfold {
namespace {

/// Formats of four bits that `text` mentions: "W4A8_MXFP4_FP8", "nvfp4-pack-quantized".
void add_formats(const std::string& text, std::set<std::string>& formats) {
  std::string lower = text;
  std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
  for (const char* format : {"nvfp4", "mxfp4"}) {
    if (lower.find(format) != std::string::npos) formats.insert(format);
  }
}

/// Each of compressed-tensors' and ModelOpt's config_groups, which may have a format and a group size of its
/// own.
void add_groups(const nlohmann::json& object, QuantizationClaim& claim) {
  const auto groups = object.find("config_groups");
  if (groups == object.end() || !groups->is_object()) return;
  for (const auto& [name, group] : groups->items()) {
    if (!group.is_object()) continue;
    add_formats(string_in(group, "format"), claim.formats);
    const auto weights = group.find("weights");
    if (weights == group.end() || !weights->is_object()) continue;
    const auto size = weights->find("group_size");
    if (size != weights->end() && size->is_number_unsigned()) claim.group_sizes.insert(size->get<uint64_t>());
  }
}

/// ModelOpt's MIXED_PRECISION, which names an algorithm for every layer: those of experts.
void add_layers(const nlohmann::json& object, QuantizationClaim& claim) {
  const auto layers = object.find("quantized_layers");
  if (layers == object.end() || !layers->is_object()) return;
  std::set<std::string> algorithms;
  for (const auto& [name, layer] : layers->items()) {
    if (!layer.is_object() || name.find("expert") == std::string::npos) continue;
    algorithms.insert(string_in(layer, "quant_algo"));
    const auto size = layer.find("group_size");
    if (size != layer.end() && size->is_number_unsigned()) claim.group_sizes.insert(size->get<uint64_t>());
  }
  for (const std::string& algorithm : algorithms) {
    if (!algorithm.empty()) claim.text += " " + algorithm;
    add_formats(algorithm, claim.formats);
  }
}

/// Whether `pattern`, in which * stands for any characters, is `name`. Never more than name x pattern steps.
bool is_glob_of(std::string_view pattern, std::string_view name) {
  size_t p = 0, n = 0, star = std::string_view::npos, resume = 0;
  while (n < name.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      resume = n;
    } else if (p < pattern.size() && pattern[p] == name[n]) {
      ++p, ++n;
    } else if (star != std::string_view::npos) {
      p = star + 1;
      n = ++resume;
    } else {
      return false;
    }
  }
  return pattern.find_first_not_of('*', p) == std::string_view::npos;
}

/// The entry of the config's list that leaves `module` out; nullptr where none does. Regular expressions
/// ("re:...") are not tried.
const std::string* ignoring_entry(const QuantizationClaim& claim, std::string_view module) {
  const auto names = [&](const std::string& entry) {
    return is_glob_of(entry, module) ||
           (module.size() > entry.size() && module.starts_with(entry) && module[entry.size()] == '.');
  };
  const auto it = std::find_if(claim.ignored.begin(), claim.ignored.end(), names);
  return it == claim.ignored.end() ? nullptr : &*it;
}

bool has_expressions(const QuantizationClaim& claim) {
  return std::any_of(claim.ignored.begin(), claim.ignored.end(),
                     [](const std::string& entry) { return entry.starts_with("re:"); });
}

const BlockScaledView* four_bit_matrix(const Expert& expert) {
  for (const WeightView* weight : {&expert.up, &expert.down, &expert.gate}) {
    if (const auto* view = std::get_if<BlockScaledView>(weight)) return view;
  }
  return nullptr;
}

std::string claim_text(const QuantizationClaim& claim) {
  return claim.text.empty() ? "none" : claim.text;
}

/// Who wrote the global scales, by the config and by the tensors.
void compare_writer(const QuantizationClaim& claim, const BlockScaledView& view,
                    std::vector<std::string>& notes) {
  if (view.format != QuantFormat::kNvfp4) return;
  const bool divides = view.global.kind == GlobalScaleKind::kDivisor;
  if (!claim.text.starts_with(divides ? "modelopt" : "compressed-tensors")) return;
  notes.push_back(fmt::format(
      "the config's quantization is '{}', the tensors' global scales are {}: by their names they {}",
      claim.text, divides ? "compressed-tensors'" : "ModelOpt's", divides ? "divide" : "multiply"));
}

void compare_group_size(const QuantizationClaim& claim, const BlockScaledView& view,
                        std::vector<std::string>& notes) {
  const auto block = static_cast<uint64_t>(traits_of(view.format).block_size);
  if (claim.group_sizes.empty() || claim.group_sizes.contains(block)) return;
  notes.push_back(
      fmt::format("the config's group size is {}, the tensors have one scale for {} codes: the "
                  "tensors are used",
                  fmt::join(claim.group_sizes, ", "), block));
}

}  // namespace

QuantizationClaim read_claim(const nlohmann::json& object) {
  QuantizationClaim claim;
  claim.text = string_in(object, "quant_method");
  add_formats(claim.text, claim.formats);
  for (const char* key : {"quant_algo", "moe_quant_algo", "format"}) {
    const std::string value = string_in(object, key);
    if (!value.empty()) claim.text += (claim.text.empty() ? "" : " ") + value;
    add_formats(value, claim.formats);
  }
  if (const auto size = object.find("group_size"); size != object.end() && size->is_number_unsigned()) {
    claim.group_sizes.insert(size->get<uint64_t>());
  }
  add_groups(object, claim);
  add_layers(object, claim);
  for (const char* key : {"ignore", "exclude_modules", "modules_to_not_convert"}) {
    const auto list = object.find(key);
    if (list == object.end() || !list->is_array()) continue;
    for (const nlohmann::json& entry : *list) {
      if (entry.is_string()) claim.ignored.push_back(entry.get<std::string>());
    }
  }
  return claim;
}

std::vector<std::string> compare_claim(const QuantizationClaim& claim, const ExpertLayer& layer,
                                       std::string_view up) {
  std::vector<std::string> notes;
  const auto module = [&](const Expert& expert) { return fmt::format("{}.{}", expert.name, up); };
  const std::vector<Expert>& experts = layer.weights.experts;
  const auto is_quantized = [](const Expert& expert) { return four_bit_matrix(expert) != nullptr; };
  const auto quantized = std::find_if(experts.begin(), experts.end(), is_quantized);
  const auto plain = std::find_if_not(experts.begin(), experts.end(), is_quantized);
  const auto other = [&] {
    notes.push_back(fmt::format("the config's quantization is '{}', the expert tensors are {}",
                                claim_text(claim), layer.scheme));
  };
  if (quantized != experts.end()) {
    const BlockScaledView& view = *four_bit_matrix(*quantized);
    // DeepSeek-V4's experts are MXFP4 and its config says "fp8".
    const bool is_told = claim.formats.contains(std::string(traits_of(view.format).name)) ||
                         (view.format == QuantFormat::kMxfp4 && claim.formats.empty() && claim.text == "fp8");
    if (!is_told) {
      other();
      return notes;
    }
    compare_writer(claim, view, notes);
    compare_group_size(claim, view, notes);
    if (const std::string* entry = ignoring_entry(claim, module(*quantized))) {
      notes.push_back(
          fmt::format("the config leaves '{}' out of quantization, the tensors of {} are {}: the "
                      "tensors are used",
                      *entry, quantized->name, traits_of(view.format).name));
    }
  }
  if (plain == experts.end() || claim.formats.empty() || has_expressions(claim)) return notes;
  if (ignoring_entry(claim, module(*plain)) == nullptr) other();
  return notes;
}

}  // namespace fourfold
