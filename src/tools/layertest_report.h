// layertest's result as a table for people and as JSON for programs.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <utility>
#include <vector>

#include "tools/layertest.h"

namespace fourfold {

/// What was tested, for the report's head.
struct LayertestSubject {
  std::string model;  ///< e.g. "deepseek_v4"
  int64_t layer = 0;
  std::vector<std::pair<std::string, std::string>> facts;  ///< label, text: one line each
  std::vector<std::string> notes;
};

/// A tested layer: all that is reported of it.
struct LayerResult {
  LayertestSubject subject;
  LayertestReport report;
};

/// Input scales that were checked and have rows, each with what it scales: "x", "intermediate", "shared_x" or
/// "shared_intermediate".
std::vector<std::pair<std::string, InputScaleReport>> input_scales_of(const LayertestReport& report);

std::string format_table(const LayerResult& result);
nlohmann::ordered_json charts_json(const LayerCharts& charts);
nlohmann::ordered_json explanations_json(const std::vector<ReportedExplanation>& explanations);
/// The stable schema of docs/layertest.md.
nlohmann::ordered_json layer_json(const LayerResult& result);
std::string format_json(const LayerResult& result);

}  // namespace fourfold
