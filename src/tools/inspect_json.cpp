// The inspection as JSON; docs/inspect.md is its schema.
#include <nlohmann/json.hpp>

#include "fourfold/parallel_degrees.h"
#include "tools/inspect_layer_facts.h"
#include "tools/inspect_report.h"
#include "tools/json_number.h"

namespace fourfold {
namespace {

using Json = nlohmann::ordered_json;

Json optional_number(const std::optional<float>& value) {
  return value ? json_number(double{*value}) : Json(nullptr);
}

template <class T>
Json count_or_null(const std::optional<T>& value) {
  return value ? Json(*value) : Json(nullptr);
}

Json text_or_null(const std::string& text) {
  return text.empty() ? Json(nullptr) : Json(text);
}

Json finding_json(const Finding& finding) {
  return {{"kind", to_string(finding.kind)},
          {"layer", finding.layer < 0 ? Json(nullptr) : Json(finding.layer)},
          {"tensor", text_or_null(finding.tensor)},
          {"file", text_or_null(finding.file)},
          {"found", finding.found},
          {"remedy", finding.remedy}};
}

Json scales_json(const ScaleCounts& scales) {
  if (scales.total() == 0) return nullptr;
  return {{"type", scales.type == ScaleType::kE4m3 ? "e4m3" : "e8m0"},
          {"total", scales.total()},
          {"nan", scales.nan()},
          {"negative", scales.negative()},
          {"zero", scales.zero()},
          {"subnormal", scales.subnormal()},
          {"saturated", scales.saturated()},
          {"smallest", optional_number(scales.quantile(0.0))},
          {"median", optional_number(scales.quantile(0.5))},
          {"largest", optional_number(scales.quantile(1.0))},
          {"by_byte", scales.by_byte}};
}

Json group_json(const MatrixGroup& group) {
  Json codes = nullptr, values = nullptr;
  if (group.codes.blocks > 0) {
    codes = {{"total", group.codes.total()},
             {"by_code", group.codes.by_code},
             {"blocks", group.codes.blocks},
             {"zero_blocks", group.codes.zero_blocks},
             {"lost_blocks", group.codes.lost_blocks}};
  }
  if (group.values.values > 0) {
    values = {{"total", group.values.values},
              {"zeros", group.values.zeros},
              {"non_finite", group.values.non_finite},
              {"largest", json_number(double{group.values.largest})}};
  }
  return {{"role", group.role},
          {"format", text_or_null(group.format)},
          {"rows", group.rows},
          {"cols", group.cols},
          {"matrices", group.matrices},
          {"unread", group.unread},
          {"bytes", group.bytes},
          {"smallest_global", optional_number(group.smallest_global)},
          {"largest_global", optional_number(group.largest_global)},
          {"scales", scales_json(group.scales)},
          {"codes", codes},
          {"values", values}};
}

Json degrees_json(const CutDegrees& degrees) {
  return {{"clean", degrees.clean},
          {"padded", degrees.padded},
          {"cuts_block", degrees.cuts_block},
          {"uneven", degrees.uneven}};
}

Json parallel_json(const LayerInspection& layer) {
  Json json = {{"tensor", degrees_json(tensor_parallel_degrees(layer.intermediate,
                                                               block_along_intermediate(layer, false)))},
               {"shared", nullptr},
               {"expert", degrees_json(expert_parallel_degrees(layer.experts))}};
  if (layer.shared_intermediate > 0) {
    json["shared"] = degrees_json(
        tensor_parallel_degrees(layer.shared_intermediate, block_along_intermediate(layer, true)));
  }
  return json;
}

Json layer_json(const LayerInspection& layer) {
  Json json = {{"layer", layer.layer},
               {"scheme", text_or_null(layer.scheme)},
               {"naming", layer.naming},
               {"experts", layer.experts},
               {"hidden", layer.hidden},
               {"intermediate", layer.intermediate},
               {"activation", text_or_null(layer.activation)},
               {"bytes", layer.bytes},
               {"loads", layer.loaded.has_value()}};
  json["shared"] = nullptr;
  if (!layer.shared_naming.empty()) {
    json["shared"] = {{"scheme", text_or_null(layer.shared_scheme)},
                      {"naming", layer.shared_naming},
                      {"intermediate", layer.shared_intermediate},
                      {"gate", layer.shared_gate}};
  }
  json["router"] = nullptr;
  if (!layer.router.empty()) {
    json["router"] = {{"name", layer.router},
                      {"rule", text_or_null(layer.router_rule)},
                      {"top_k", layer.top_k > 0 ? Json(layer.top_k) : Json(nullptr)}};
  }
  json["gate_up"] = nullptr;
  if (layer.gate_up.pairs > 0) {
    json["gate_up"] = {{"pairs", layer.gate_up.pairs},
                       {"different", layer.gate_up.different},
                       {"median", json_number(layer.gate_up.median)},
                       {"largest", json_number(layer.gate_up.largest)},
                       {"largest_expert", layer.gate_up.largest_expert}};
  }
  json["input_scales"] = nullptr;
  if (layer.input_scales.expected > 0) {
    json["input_scales"] = {{"usable", layer.input_scales.usable},
                            {"expected", layer.input_scales.expected},
                            {"smallest", optional_number(layer.input_scales.smallest)},
                            {"largest", optional_number(layer.input_scales.largest)}};
  }
  json["matrices"] = Json::array();
  for (const MatrixGroup& group : layer.groups) json["matrices"].push_back(group_json(group));
  json["parallel"] = parallel_json(layer);
  json["memory"] = Json::array();
  for (const MemoryEstimate& estimate : memory_of(layer)) {
    json["memory"].push_back({{"backend", estimate.backend},
                              {"bytes", count_or_null(estimate.bytes)},
                              {"why_not", text_or_null(estimate.why_not)},
                              {"compiled_in", estimate.is_compiled_in}});
  }
  return json;
}

}  // namespace

std::string format_inspection_json(const std::string& path, const ModelInspection& model) {
  Json json = {{"version", FOURFOLD_VERSION},
               {"model", path},
               {"verdict", model.findings.empty() ? "clean" : "problems"}};
  json["findings"] = Json::array();
  for (const Finding& finding : model.findings) json["findings"].push_back(finding_json(finding));
  json["family"] = text_or_null(model.family);
  json["config"] = {{"model_type", text_or_null(model.config.model_type)},
                    {"architecture", text_or_null(model.config.architecture)},
                    {"quantization", text_or_null(model.config.quantization)},
                    {"layers", count_or_null(model.config.layers)},
                    {"hidden", count_or_null(model.config.hidden)},
                    {"intermediate", count_or_null(model.config.intermediate)},
                    {"experts", count_or_null(model.config.experts)},
                    {"top_k", count_or_null(model.config.top_k)}};
  json["files"] = model.files;
  json["tensors"] = model.tensors;
  json["bytes"] = model.bytes;
  json["expert_layers"] = model.expert_layers;
  json["codes_one_in"] = model.codes_one_in;
  json["forced_scheme"] = model.forced_scheme ? Json(to_string(*model.forced_scheme)) : Json(nullptr);
  json["layers"] = Json::array();
  for (const LayerInspection& layer : model.layers) json["layers"].push_back(layer_json(layer));
  return json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace fourfold
