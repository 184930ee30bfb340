#include "checkpoint/config_rules.h"

#include <algorithm>
#include <cctype>

#include "base/fail.h"

namespace fourfold {
namespace {

std::string lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return text;
}

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

void ConfigRules::note(const std::string& key, const std::string& found, int64_t layer) {
  const auto what = std::pair(key, found);
  for (auto& [known, layers] : disagreements_) {
    if (known == what) return layers.push_back(layer);
  }
  disagreements_.push_back({what, {layer}});
}

void ConfigRules::compare(const LayerSurvey& survey, const std::string& scheme) {
  ++layers_;
  schemes_ += scheme + " ";
  const auto compare = [&](const char* key, std::optional<int64_t> claimed, int64_t found) {
    if (!claimed || found == 0 || *claimed == found) return;
    note(key, fmt::format("says {}, the tensors say {}", *claimed, found), survey.layer);
  };
  compare("hidden size", config_.hidden, survey.hidden);
  compare("expert intermediate size", config_.intermediate, survey.intermediate);
  // A lost file may hold the last experts.
  if (survey.lost == 0) compare("number of experts", config_.experts, survey.experts);
  compare_shared(survey);
}

/// DeepSeek's n shared experts are stored as one of n times the size; Qwen and Nemotron-H give the size.
void ConfigRules::compare_shared(const LayerSurvey& survey) {
  std::optional<int64_t> claimed = config_.shared_intermediate;
  if (!claimed && config_.shared_experts && config_.intermediate)
    claimed = *config_.shared_experts * *config_.intermediate;
  if (!claimed || survey.lost > 0) return;
  if (*claimed > 0 && !survey.has_shared) {
    shared_.push_back({FindingKind::kMissingSharedExpert, survey.layer,
                       survey.block.prefix + (config_.shared_experts ? "shared_experts" : "shared_expert"),
                       "",
                       fmt::format("no tensors, and config.json speaks of intermediate size {}", *claimed),
                       "is a shard missing? the layer computed without it is another one"});
  } else if (survey.has_shared && survey.shared_intermediate > 0 && *claimed != survey.shared_intermediate) {
    note("shared expert's intermediate size",
         fmt::format("says {}, the tensors say {}", *claimed, survey.shared_intermediate), survey.layer);
  }
}

/// Over all layers: models leave some of them unquantized.
void ConfigRules::compare_quantization(std::vector<Finding>& findings) const {
  const std::string claim = lower(config_.quantization);
  const bool nvfp4 = contains(schemes_, "nvfp4"), mxfp4 = contains(schemes_, "mxfp4"),
             fp8 = contains(schemes_, "fp8");
  std::string found;
  if (contains(claim, "nvfp4") && !nvfp4) found = "the experts are not NVFP4";
  if (contains(claim, "mxfp4") && !mxfp4) found = "the experts are not MXFP4";
  if (nvfp4 && !contains(claim, "nvfp4")) found = "the experts are NVFP4";
  if (claim.empty() && (mxfp4 || fp8)) found = fmt::format("the experts are {}", mxfp4 ? "MXFP4" : "FP8");
  if (found.empty() || schemes_.find_first_not_of(' ') == std::string::npos) return;
  findings.push_back(
      {FindingKind::kConfigDisagrees, -1, "config.json: quantization", config_.file,
       fmt::format("says {}, and {}", claim.empty() ? "nothing" : "'" + config_.quantization + "'", found),
       "loaders choose by it: correct quantization_config, or hf_quant_config.json"});
}

std::vector<Finding> ConfigRules::findings() const {
  std::vector<Finding> findings;
  for (const auto& [what, layers] : disagreements_) {
    const bool everywhere = static_cast<int64_t>(layers.size()) == layers_;
    findings.push_back(
        {FindingKind::kConfigDisagrees, everywhere ? -1 : layers.front(), "config.json: " + what.first,
         config_.file,
         what.second + (everywhere ? "" : fmt::format(", in layers {}", fmt::join(layers, ", "))),
         "is it the config of another model? correct whichever is wrong"});
  }
  compare_quantization(findings);
  findings.insert(findings.end(), shared_.begin(), shared_.end());
  return findings;
}

}  // namespace fourfold
