#include "tools/inspect_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <tuple>

#include "fourfold/model_family.h"
#include "fourfold/parallel_degrees.h"
#include "tools/inspect_layer_facts.h"
#include "tools/memory_estimate.h"
#include "tools/number_list.h"
#include "tools/terminal.h"

namespace fourfold {
namespace {

constexpr size_t kTensorsShown = 8;  // of a group of findings
constexpr size_t kFindingLineBytes = 700;

std::string size_text(int64_t bytes) {
  const auto value = static_cast<double>(bytes);
  return bytes >= 10'000'000'000 ? fmt::format("{:.1f} GB", value * 1e-9)
         : bytes >= 10'000'000   ? fmt::format("{:.1f} MB", value * 1e-6)
                                 : fmt::format("{:.1f} kB", value * 1e-3);
}

std::string percent(int64_t part, int64_t whole) {
  if (part == 0 || whole == 0) return "0";
  const double value = 100.0 * static_cast<double>(part) / static_cast<double>(whole);
  return value < 0.01 ? "<0.01%" : fmt::format("{:.2f}%", value);
}

void fact(std::string& text, const std::string& label, const std::string& value) {
  text += fmt::format("{:<12} {}\n", label, printable(value, kFindingLineBytes));
}

// ---- problems ----

std::string file_name(const std::string& file) {
  return file.empty() ? "" : fmt::format(" ({})", file.substr(file.rfind('/') + 1));
}

/// Findings of one kind in one layer with one remedy stand together.
std::string problems_text(const std::vector<Finding>& findings) {
  std::string text =
      bold(red(fmt::format("{} problem{}", findings.size(), findings.size() == 1 ? "" : "s"))) + "\n";
  for (size_t begin = 0; begin < findings.size();) {
    const Finding& first = findings[begin];
    size_t end = begin;
    while (end < findings.size() && findings[end].kind == first.kind && findings[end].layer == first.layer &&
           findings[end].remedy == first.remedy) {
      ++end;
    }
    text += bold(fmt::format("  {}, {}{}", to_string(first.kind),
                             first.layer < 0 ? "model" : fmt::format("layer {}", first.layer),
                             end - begin > 1 ? fmt::format(": {}", end - begin) : "")) +
            "\n";
    for (size_t i = begin; i < std::min(end, begin + kTensorsShown); ++i) {
      const std::string subject = findings[i].tensor.empty() ? findings[i].file : findings[i].tensor;
      text += fmt::format("    {}\n      {}\n",
                          printable(subject + (findings[i].tensor.empty() ? "" : file_name(findings[i].file)),
                                    kFindingLineBytes),
                          printable(findings[i].found, kFindingLineBytes));
    }
    if (end - begin > kTensorsShown) {
      text += fmt::format("    ... and {} more (--json FILE has all)\n", end - begin - kTensorsShown);
    }
    text += fmt::format("    -> {}\n", first.remedy);
    begin = end;
  }
  return text + "\n";
}

// ---- the model ----

std::string model_text(const std::string& path, const ModelInspection& model) {
  std::string text;
  const ModelConfig& config = model.config;
  fact(text, "model",
       fmt::format("{}: {}, {}", path, identity(config),
                   model.family.empty() ? "no known family" : "family " + model.family));
  fact(text, "files",
       fmt::format("{} with {} tensors, {}", model.files, model.tensors, size_text(model.bytes)));
  fact(text, "config",
       fmt::format("quantization: {}", config.quantization.empty() ? "none" : config.quantization));
  fact(text, "layers",
       fmt::format("{} with experts: {}{}", model.expert_layers.size(), format_list(model.expert_layers),
                   config.layers ? fmt::format("; {} in all", *config.layers) : ""));
  if (model.forced_scheme) {
    fact(text, "scheme",
         fmt::format("{}, whatever names and types say (--scheme)", to_string(*model.forced_scheme)));
  }
  if (model.codes_one_in > 1) {
    fact(text, "read",
         fmt::format("all block scales; of codes one run of rows in {} (--all-codes reads all)",
                     model.codes_one_in));
  }
  return text;
}

std::string degrees_text(const CutDegrees& degrees, int64_t block) {
  std::string text = format_list(degrees.clean);
  if (!degrees.padded.empty()) text += fmt::format(" (padded: {})", format_list(degrees.padded));
  if (!degrees.cuts_block.empty())
    text += fmt::format("; cut a block of {}: {}", block, format_list(degrees.cuts_block));
  if (!degrees.uneven.empty()) text += fmt::format("; uneven: {}", format_list(degrees.uneven));
  return text;
}

/// What layers have in common: printed once for all that are alike.
std::string shape_text_of(const LayerInspection& layer) {
  std::string text;
  fact(text, "experts",
       fmt::format("{} x {}, hidden {}, intermediate {}: {}", layer.experts,
                   layer.scheme.empty() ? "unreadable" : layer.scheme, layer.hidden, layer.intermediate,
                   generic_name(layer.naming, layer.layer)));
  if (!layer.shared_naming.empty()) {
    fact(text, "shared",
         fmt::format("{}, intermediate {}{}: {}", layer.shared_scheme, layer.shared_intermediate,
                     layer.shared_gate ? ", gated" : "", generic_name(layer.shared_naming, layer.layer)));
  }
  fact(text, "router",
       layer.router.empty() ? "none"
                            : fmt::format("{}{}", generic_name(layer.router, layer.layer),
                                          layer.router_rule.empty() ? "" : ": " + layer.router_rule));
  if (!layer.activation.empty()) fact(text, "activation", layer.activation);
  const int64_t block = block_along_intermediate(layer, false);
  fact(text, "tensor par.", degrees_text(tensor_parallel_degrees(layer.intermediate, block), block));
  if (layer.shared_intermediate > 0) {
    const int64_t own = block_along_intermediate(layer, true);
    fact(text, "  shared", degrees_text(tensor_parallel_degrees(layer.shared_intermediate, own), own));
  }
  fact(text, "expert par.", degrees_text(expert_parallel_degrees(layer.experts), 1));
  for (const MemoryEstimate& estimate : memory_of(layer)) {
    fact(text, "memory",
         fmt::format("{}: {}{}", estimate.backend,
                     estimate.bytes ? size_text(*estimate.bytes) + " a layer" : estimate.why_not,
                     estimate.is_compiled_in ? "" : " (not in this build)"));
  }
  return text;
}

std::string common_text(const ModelInspection& model) {
  std::vector<std::pair<std::string, std::vector<int64_t>>> shapes;
  for (const LayerInspection& layer : model.layers) {
    const std::string text = shape_text_of(layer);
    const auto it =
        std::find_if(shapes.begin(), shapes.end(), [&](const auto& known) { return known.first == text; });
    it == shapes.end() ? shapes.push_back({text, {layer.layer}}) : it->second.push_back(layer.layer);
  }
  std::string text;
  for (const auto& [shape, layers] : shapes) {
    text +=
        bold(fmt::format("\nlayer{} {}", layers.size() == 1 ? "" : "s", format_list(layers))) + "\n" + shape;
  }
  return text;
}

// ---- statistics ----

std::string float_text(const std::optional<float>& value) {
  return value ? fmt::format("{:.3g}", *value) : "-";
}

/// One line a layer, over its routed experts.
std::string table_text(const ModelInspection& model) {
  std::string text = "\n" +
                     bold(fmt::format("{:>6} {:>10} {:>16} {:>22} {:>8} {:>9} {:>8} {:>8} {:>21}", "layer",
                                      "bytes", "gate/up differ", "scales min/median/max", "at 448",
                                      "subnormal", "zero", "zero bl.", "input scales")) +
                     "\n";
  for (const LayerInspection& layer : model.layers) {
    const RoutedTotals totals = routed_totals(layer);
    const ScaleCounts& scales = totals.scales;
    const int64_t all = scales.total();
    const GateUpRatios& ratios = layer.gate_up;
    const std::string quantiles =
        all == 0 ? fmt::format("|w| up to {:.3g}", totals.values.largest)
                 : fmt::format("{}/{}/{}", float_text(scales.quantile(0)), float_text(scales.quantile(0.5)),
                               float_text(scales.quantile(1)));
    const InputScaleSummary& input = layer.input_scales;
    text += fmt::format(
        "{:>6} {:>10} {:>16} {:>22} {:>8} {:>9} {:>8} {:>8} {:>21}\n", layer.layer, size_text(layer.bytes),
        ratios.pairs == 0 ? "-"
                          : fmt::format("{}/{} x{:.3g}", ratios.different, ratios.pairs, ratios.largest),
        quantiles, percent(scales.saturated(), all), percent(scales.subnormal(), all),
        percent(scales.zero(), all), percent(totals.codes.zero_blocks, totals.codes.blocks),
        input.expected == 0 ? "-"
        : input.usable == 0 ? "none"
                            : fmt::format("{}/{} {}-{}", input.usable, input.expected,
                                          float_text(input.smallest), float_text(input.largest)));
  }
  return text;
}

std::string group_text(const MatrixGroup& group) {
  std::string text = fmt::format("\n{}: {} x {} [{}, {}], {}{}\n", group.role, group.matrices, group.format,
                                 group.rows, group.cols, size_text(group.bytes),
                                 group.unread > 0 ? fmt::format("; {} not read", group.unread) : "");
  if (group.values.values > 0) {
    return text + fmt::format("  values     largest {:.4g}, zeros {}, NaN or infinite {}\n",
                              group.values.largest, percent(group.values.zeros, group.values.values),
                              group.values.non_finite);
  }
  const ScaleCounts& scales = group.scales;
  const int64_t all = scales.total();
  if (all == 0) return text;
  text += fmt::format("  globals    {} to {}\n", float_text(group.smallest_global),
                      float_text(group.largest_global));
  text += "  scales    ";
  for (const auto& [name, part] : {std::pair("min", 0.0),
                                   {"1%", 0.01},
                                   {"25%", 0.25},
                                   {"median", 0.5},
                                   {"75%", 0.75},
                                   {"99%", 0.99},
                                   {"max", 1.0}}) {
    text += fmt::format(" {} {}", name, float_text(scales.quantile(part)));
  }
  text += fmt::format("\n             at 448 {}, subnormal {}, zero {}, negative {}, NaN {}\n",
                      percent(scales.saturated(), all), percent(scales.subnormal(), all),
                      percent(scales.zero(), all), scales.negative(), scales.nan());
  text += "  codes     ";
  for (uint8_t magnitude = 0; magnitude < 8; ++magnitude) {
    text += fmt::format(
        " {}: {}", decode_e2m1(magnitude),
        percent(group.codes.by_code[magnitude] + group.codes.by_code[magnitude | 8u], group.codes.total()));
  }
  return text + fmt::format("\n             zero blocks {}, lost to a zero scale {}\n",
                            percent(group.codes.zero_blocks, group.codes.blocks),
                            percent(group.codes.lost_blocks, group.codes.blocks));
}

std::string detail_text(const LayerInspection& layer) {
  std::string text;
  if (layer.gate_up.pairs > 0) {
    text += fmt::format(
        "\ngate/up: global scales differ in {} of {} experts, median ratio {:.3g}, largest {:.3g} (expert "
        "{})\n",
        layer.gate_up.different, layer.gate_up.pairs, layer.gate_up.median, layer.gate_up.largest,
        layer.gate_up.largest_expert);
  }
  for (const MatrixGroup& group : layer.groups) text += group_text(group);
  return text;
}

}  // namespace

std::string format_inspection(const std::string& path, const ModelInspection& model) {
  std::string text = model.findings.empty() ? "" : problems_text(model.findings);
  text += model_text(path, model) + common_text(model) + table_text(model);
  if (model.layers.size() == 1) text += detail_text(model.layers.front());
  return text + "\n" +
         (model.findings.empty() ? green("clean: nothing wrong was found")
                                 : red(fmt::format("{} problem{}: see the top", model.findings.size(),
                                                   model.findings.size() == 1 ? "" : "s"))) +
         "\n";
}

}  // namespace fourfold
