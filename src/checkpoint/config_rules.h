// config.json held against the tensors of the layers that were looked at.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/layer_survey.h"
#include "fourfold/inspection.h"

namespace fourfold {

/// Collects layer by layer, so that what is wrong in all layers is one finding.
class ConfigRules {
 public:
  explicit ConfigRules(const ModelConfig& config) : config_(config) {}

  /// `scheme`: of the routed experts; empty where none could be read.
  void compare(const LayerSurvey& survey, const std::string& scheme);
  std::vector<Finding> findings() const;

 private:
  void note(const std::string& key, const std::string& found, int64_t layer);
  void compare_shared(const LayerSurvey& survey);
  void compare_quantization(std::vector<Finding>& findings) const;

  const ModelConfig& config_;
  std::vector<std::pair<std::pair<std::string, std::string>, std::vector<int64_t>>> disagreements_;
  std::vector<Finding> shared_;  // missing shared experts
  int64_t layers_ = 0;
  std::string schemes_;  // of all layers
};

}  // namespace fourfold
