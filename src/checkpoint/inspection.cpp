// Layer by layer: survey, count on all cores, judge, try the loader.
#include "fourfold/inspection.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <map>
#include <set>

#include "base/fail.h"
#include "checkpoint/config_rules.h"
#include "checkpoint/finding_text.h"
#include "checkpoint/layer_survey.h"
#include "checkpoint/weight_rules.h"
#include "fourfold/model_family.h"

namespace fourfold {
namespace {

SliceCounts count_slice(const MatrixSlice& slice, RowSample sample) {
  SliceCounts counts;
  if (const auto* blocks = std::get_if<BlockScaledView>(&slice.weight)) {
    counts.scales = count_scales(slice.scale_type, slice.scales);
    counts.codes = slice.is_transposed ? count_transposed_codes(slice.packed, slice.scales, sample)
                                       : count_codes(*blocks, sample);
  } else if (const auto* fp8 = std::get_if<Fp8View>(&slice.weight)) {
    counts.values = count_values(*fp8, sample);
  } else {
    counts.values = count_values(std::get<DenseView>(slice.weight), sample);
  }
  return counts;
}

/// Counts of every slice of every matrix; all cores.
std::vector<std::vector<SliceCounts>> count_all(const std::vector<SurveyedMatrix>& matrices,
                                                RowSample sample) {
  std::vector<std::vector<SliceCounts>> counts(matrices.size());
  std::vector<std::pair<size_t, size_t>> tasks;
  for (size_t matrix = 0; matrix < matrices.size(); ++matrix) {
    counts[matrix].resize(matrices[matrix].slices.size());
    for (size_t slice = 0; slice < matrices[matrix].slices.size(); ++slice) tasks.emplace_back(matrix, slice);
  }
#pragma omp parallel for schedule(dynamic)
  for (size_t task = 0; task < tasks.size(); ++task) {
    const auto [matrix, slice] = tasks[task];
    counts[matrix][slice] = count_slice(matrices[matrix].slices[slice], sample);
  }
  return counts;
}

std::string scheme_of(const LayerSurvey& survey, bool shared) {
  std::set<std::string> formats;
  for (const SurveyedMatrix& matrix : survey.matrices) {
    if (matrix.is_shared == shared && !matrix.slices.empty())
      formats.emplace(format_name(matrix.slices.front().weight));
  }
  if (formats.empty()) return "";
  std::string scheme =
      formats.size() == 1 ? *formats.begin() : fmt::format("mixed: {}", fmt::join(formats, ", "));
  if (survey.is_fused && !shared) scheme += survey.is_transposed ? " (fused, transposed)" : " (fused)";
  return scheme;
}

std::vector<MatrixGroup> group(const LayerSurvey& survey,
                               const std::vector<std::vector<SliceCounts>>& counts) {
  std::vector<MatrixGroup> groups;
  for (size_t i = 0; i < survey.matrices.size(); ++i) {
    const SurveyedMatrix& matrix = survey.matrices[i];
    auto it = std::find_if(groups.begin(), groups.end(),
                           [&](const MatrixGroup& known) { return known.role == matrix.role; });
    if (it == groups.end()) {
      it = groups.insert(it, MatrixGroup{});
      it->role = matrix.role;
    }
    it->bytes += matrix.bytes;
    if (matrix.slices.empty()) {
      ++it->unread;
      continue;
    }
    const std::string format(format_name(matrix.slices.front().weight));
    it->format = it->format.empty() || it->format == format ? format : "mixed";
    it->rows = matrix.rows;
    it->cols = matrix.cols;
    it->matrices += static_cast<int64_t>(matrix.slices.size());
    for (const SliceCounts& slice : counts[i]) {
      if (slice.scales.total() > 0) it->scales.add(slice.scales);
      it->codes.add(slice.codes);
      it->values.add(slice.values);
    }
    for (const float global : matrix.globals) {
      it->smallest_global = std::min(it->smallest_global.value_or(global), global);
      it->largest_global = std::max(it->largest_global.value_or(global), global);
    }
  }
  return groups;
}

GateUpRatios ratios_of(const LayerSurvey& survey) {
  std::map<int64_t, float> gates;
  for (const SurveyedMatrix& matrix : survey.matrices) {
    if (matrix.role == "gate" && matrix.is_nvfp4()) gates[matrix.expert] = matrix.globals.front();
  }
  GateUpRatios ratios;
  std::vector<double> all;
  for (const SurveyedMatrix& matrix : survey.matrices) {
    const auto gate = gates.find(matrix.expert);
    if (matrix.role != "up" || !matrix.is_nvfp4() || gate == gates.end()) continue;
    const double a = gate->second, b = matrix.globals.front();
    const double ratio = std::max(a, b) / std::min(a, b);
    if (!std::isfinite(ratio)) continue;
    all.push_back(ratio);
    ratios.different += a != b;
    if (ratios.largest_expert < 0 || ratio > ratios.largest) {
      ratios.largest = ratio;
      ratios.largest_expert = matrix.expert;
    }
  }
  ratios.pairs = static_cast<int64_t>(all.size());
  if (all.empty()) return ratios;
  const auto middle = all.begin() + static_cast<int64_t>(all.size() / 2);
  std::nth_element(all.begin(), middle, all.end());
  ratios.median = *middle;
  return ratios;
}

InputScaleSummary input_scales_of(const LayerSurvey& survey) {
  InputScaleSummary summary;
  for (const SurveyedMatrix& matrix : survey.matrices) {
    if (!matrix.is_nvfp4() || matrix.is_shared) continue;
    summary.expected += std::max<int64_t>(1, static_cast<int64_t>(matrix.input_scales.size()));
    for (const float scale : matrix.input_scales) {
      if (!is_usable_input_scale(scale)) continue;
      ++summary.usable;
      summary.smallest = std::min(summary.smallest.value_or(scale), scale);
      summary.largest = std::max(summary.largest.value_or(scale), scale);
    }
  }
  return summary;
}

/// Whether the loader would refuse because of this finding.
bool stops_loading(const Finding& finding) {
  switch (finding.kind) {
    case FindingKind::kDamagedFile:
    case FindingKind::kMissingTensor:
    case FindingKind::kBadTensor:
    case FindingKind::kUnknownTensor:
    case FindingKind::kNanScale:
    case FindingKind::kBadScale:
      return true;
    default:
      return false;
  }
}

class ModelInspector {
 public:
  ModelInspector(const std::filesystem::path& path, const InspectOptions& options) : options_(options) {
    std::vector<CheckpointDamage> damage;
    checkpoint_ = Checkpoint::open(path, damage);
    config_is_damaged_ = std::any_of(damage.begin(), damage.end(), [&](const CheckpointDamage& d) {
      return d.file == checkpoint_->config().file;
    });
    add_damage(damage);
  }

  ModelInspection run() {
    describe_model();
    choose_layers();
    choose_sample();
    find_rules();
    add_routers_without_experts();
    ConfigRules config_rules(checkpoint_->config());
    std::vector<Finding> of_layers;
    for (size_t i = 0; i < layers_.size(); ++i) {
      options_.progress(fmt::format("layer {}: {} of {}", layers_[i], i + 1, layers_.size()));
      const LayerSurvey survey = survey_layer(*checkpoint_, layers_[i], options_.scheme);
      if (!config_is_damaged_) config_rules.compare(survey, scheme_of(survey, false));
      inspect_layer(survey, of_layers);
    }
    add_uncalibrated_layers(of_layers);
    const std::vector<Finding> of_config = config_rules.findings();
    result_.findings.insert(result_.findings.end(), of_config.begin(), of_config.end());
    result_.findings.insert(result_.findings.end(), of_layers.begin(), of_layers.end());
    std::stable_sort(result_.findings.begin(), result_.findings.end(),
                     [](const Finding& a, const Finding& b) {
                       return std::pair(a.layer, a.kind) < std::pair(b.layer, b.kind);
                     });
    return std::move(result_);
  }

 private:
  void add_damage(const std::vector<CheckpointDamage>& damage) {
    for (const CheckpointDamage& entry : damage) {
      result_.findings.push_back({FindingKind::kDamagedFile, -1, entry.tensor, entry.file, entry.message,
                                  "download the file again and compare its checksum"});
    }
    const size_t lost = checkpoint_->lost().size();
    if (lost == 0 || damage.empty()) return;
    result_.findings.front().found +=
        fmt::format("; {} tensor{} of the index can't be looked at, '{}' among them", lost,
                    lost == 1 ? "" : "s", *checkpoint_->lost().begin());
  }

  void describe_model() {
    result_.config = checkpoint_->config();
    result_.forced_scheme = options_.scheme;
    result_.family = family_name(checkpoint_->config());
    result_.tensors = static_cast<int64_t>(checkpoint_->tensors().size());
    std::set<std::string_view> files;
    for (const auto& [name, tensor] : checkpoint_->tensors()) {
      result_.bytes += tensor->bytes;
      files.insert(tensor->file);
    }
    result_.files = static_cast<int64_t>(files.size());
  }

  void choose_layers() {
    result_.expert_layers = layers_with_experts(*checkpoint_);
    std::vector<int64_t> wanted = options_.layers.empty() ? result_.expert_layers : options_.layers;
    if (wanted.empty()) wanted = {0};  // for the message that says what was looked for
    for (const int64_t layer : wanted) {
      try {
        find_block(*checkpoint_, layer);
        layers_.push_back(layer);
      } catch (const Error&) {
        if (result_.findings.empty()) throw;  // else it may be in a file that can't be read
      }
    }
  }

  void choose_sample() {
    int64_t bytes = 0;
    for (const int64_t layer : layers_) {
      for (const Tensor* tensor : tensors_under(*checkpoint_, find_block(*checkpoint_, layer).prefix)) {
        bytes += tensor->bytes;
      }
    }
    result_.codes_one_in = bytes <= options_.most_unsampled_bytes ? 1 : kSampledOneIn;
  }

  void find_rules() {
    try {
      rules_ = rules_of(checkpoint_->config());
    } catch (const Error& error) {
      if (config_is_damaged_) return;
      result_.findings.push_back({FindingKind::kConfigDisagrees, -1, "config.json: family",
                                  checkpoint_->config().file, error.what(),
                                  "what the layers compute is not known: correct config.json"});
    }
    if (!rules_ || !rules_->router || rules_->router->top_k > 0) return;
    result_.findings.push_back(
        {FindingKind::kConfigDisagrees, -1, "config.json: num_experts_per_tok", checkpoint_->config().file,
         "missing: how many experts a token goes to is not known", "add it, as the model's original has it"});
  }

  /// A layer whose router is there, and whose experts are not.
  void add_routers_without_experts() {
    if (!options_.layers.empty() || !checkpoint_->lost().empty()) return;
    const std::set<int64_t> known(layers_.begin(), layers_.end());
    for (const auto& [name, tensor] : checkpoint_->tensors()) {
      for (const std::string_view before : kBeforeLayer) {
        if (!name.starts_with(before)) continue;
        const std::string_view rest = std::string_view(name).substr(before.size());
        const auto layer = leading_number(rest, '.');
        if (!layer || known.contains(*layer)) continue;
        for (const BlockNames& names : kBlockNames) {
          for (const std::string_view router : kRouters) {
            if (rest.substr(rest.find('.')) != std::string(names.block) + std::string(router) + "weight")
              continue;
            result_.findings.push_back({FindingKind::kMissingTensor, *layer,
                                        fmt::format("{}{}{}{}", before, *layer, names.block, kExperts), "",
                                        fmt::format("no experts, and a router '{}'", name),
                                        "is a shard missing? download or convert again"});
          }
        }
      }
    }
  }

  /// NVFP4 layers without any input scale, in a model that has them elsewhere.
  void add_uncalibrated_layers(std::vector<Finding>& findings) const {
    const auto is_nvfp4 = [](const LayerInspection& layer) { return layer.input_scales.expected > 0; };
    const bool any = std::any_of(result_.layers.begin(), result_.layers.end(),
                                 [](const LayerInspection& layer) { return layer.input_scales.usable > 0; });
    for (const LayerInspection& layer : result_.layers) {
      const bool has_own = std::any_of(findings.begin(), findings.end(), [&](const Finding& finding) {
        return finding.layer == layer.layer && (finding.kind == FindingKind::kMissingInputScale ||
                                                finding.kind == FindingKind::kBadInputScale);
      });
      if (!any || !is_nvfp4(layer) || layer.input_scales.usable > 0 || has_own) continue;
      findings.push_back({FindingKind::kMissingInputScale, layer.layer, layer.naming, "",
                          "no input scale in the whole layer, while other layers have them",
                          "calibrate again, or run with dynamic activation scales"});
    }
  }

  void inspect_layer(const LayerSurvey& survey, std::vector<Finding>& findings) {
    const auto counts = count_all(survey.matrices, {result_.codes_one_in});
    const size_t first = findings.size();
    findings.insert(findings.end(), survey.findings.begin(), survey.findings.end());
    for (size_t i = 0; i < counts.size(); ++i)
      judge_matrix(survey.matrices[i], counts[i], survey.layer, findings);
    judge_input_scales(survey, findings);

    LayerInspection layer;
    layer.layer = survey.layer;
    layer.scheme = scheme_of(survey, false);
    layer.naming = survey.naming;
    layer.experts = survey.experts;
    layer.hidden = survey.hidden;
    layer.intermediate = survey.intermediate;
    layer.shared_scheme = scheme_of(survey, true);
    layer.shared_naming = survey.shared_naming;
    layer.shared_intermediate = survey.shared_intermediate;
    layer.shared_gate = survey.shared_gate;
    layer.groups = group(survey, counts);
    layer.gate_up = ratios_of(survey);
    layer.input_scales = input_scales_of(survey);
    for (const MatrixGroup& matrices : layer.groups) layer.bytes += matrices.bytes;
    if (rules_) layer.activation = describe(rules_->activation);
    inspect_router(survey, layer, findings);
    const bool explained = survey.lost > 0 || std::any_of(findings.begin() + static_cast<int64_t>(first),
                                                          findings.end(), stops_loading);
    try_loader(survey, layer, explained, findings);
    result_.layers.push_back(std::move(layer));
  }

  const Tensor* find_router(const std::string& prefix) const {
    for (const std::string_view child : kRouters) {
      if (const Tensor* weight = checkpoint_->find(prefix + std::string(child) + "weight")) return weight;
    }
    return nullptr;
  }

  void inspect_router(const LayerSurvey& survey, LayerInspection& layer,
                      std::vector<Finding>& findings) const {
    const std::string& prefix = survey.block.prefix;
    const Tensor* weight = find_router(prefix);
    if (weight == nullptr) {
      if (survey.lost > 0) return;
      findings.push_back(
          {FindingKind::kMissingRouter, survey.layer, prefix + std::string(kRouters[0]) + "weight", "",
           fmt::format("none, and no '{}{}weight' either", prefix, kRouters[1]),
           "is a shard missing? without a router the layer runs on routings that the caller brings"});
      return;
    }
    layer.router = weight->name.substr(0, weight->name.rfind('.'));
    for (const Tensor* tensor : tensors_under(*checkpoint_, layer.router + ".")) {
      judge_router_tensor(*tensor, survey.layer, findings);
    }
    if (!rules_ || !rules_->router) return;
    layer.router_rule = describe_router(*rules_, checkpoint_->find(layer.router + ".tid2eid") != nullptr);
    layer.top_k = rules_->router->top_k;
    if (survey.experts == 0 || survey.hidden == 0 || survey.lost > 0 || layer.top_k == 0) return;
    try {
      std::string why_not;
      load_router(*checkpoint_, survey.layer, survey.experts, survey.hidden, *rules_->router,
                  rules_->router_bias, why_not);
    } catch (const Error& error) {
      findings.push_back(finding_of(error, *checkpoint_, survey.layer, FindingKind::kBadTensor));
      if (findings.back().tensor.empty()) findings.back().tensor = layer.router;
    }
  }

  static void judge_router_tensor(const Tensor& tensor, int64_t layer, std::vector<Finding>& findings) {
    const auto type = dense_type(tensor.dtype);
    const int64_t elements = tensor.elements();
    if (!type || elements == 0) return;
    const ValueCounts counts = count_values(DenseView{*type, tensor.data, 1, elements, tensor.bytes, {}});
    if (counts.non_finite == 0) return;
    findings.push_back({FindingKind::kNonFiniteWeights, layer, tensor.name, tensor.file,
                        fmt::format("{} of {} values are NaN or infinite", counts.non_finite, counts.values),
                        kConvertAgain});
  }

  /// Whether the library runs what was inspected; what it refuses for a reason of its own is a finding.
  void try_loader(const LayerSurvey& survey, LayerInspection& layer, bool explained,
                  std::vector<Finding>& findings) const {
    try {
      // Of transposed tensors the loader makes copies: one expert tells as much.
      const std::vector<int64_t> experts =
          survey.is_transposed ? std::vector<int64_t>{0} : std::vector<int64_t>{};
      // Layers of no four-bit codes have no use for a scheme, and the loader refuses it.
      const bool has_codes =
          std::any_of(survey.matrices.begin(), survey.matrices.end(), [](const SurveyedMatrix& matrix) {
            return !matrix.slices.empty() &&
                   std::holds_alternative<BlockScaledView>(matrix.slices.front().weight);
          });
      ExpertLayer loaded = load_experts(checkpoint_, survey.layer, experts, {},
                                        has_codes ? options_.scheme : std::optional<WeightScheme>());
      if (rules_) layer_config(loaded, *rules_);
      layer.loaded = std::move(loaded);
    } catch (const Error& error) {
      if (explained || (!rules_ && survey.is_fused)) return;
      findings.push_back(finding_of(error, *checkpoint_, survey.layer, FindingKind::kRefused));
      if (findings.back().tensor.empty()) findings.back().tensor = survey.naming;
    }
  }

  const InspectOptions& options_;
  std::shared_ptr<const Checkpoint> checkpoint_;
  bool config_is_damaged_ = false;
  std::vector<int64_t> layers_;
  std::optional<LayerRules> rules_;
  ModelInspection result_;
};

}  // namespace

ModelInspection inspect_model(const std::filesystem::path& path, const InspectOptions& options) {
  return ModelInspector(path, options).run();
}

}  // namespace fourfold
