// layertest's result as a table for people and as JSON for programs.
#pragma once

#include <string>
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

std::string format_table(const LayertestSubject& subject, const LayertestReport& report);
/// The stable schema of docs/layertest.md.
std::string format_json(const LayertestSubject& subject, const LayertestReport& report);

}  // namespace fourfold
