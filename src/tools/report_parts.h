// Parts that pages are made of: each returns HTML, with text that comes from outside escaped.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "tools/layer_charts.h"
#include "tools/layertest.h"

namespace fourfold {

/// A whole page. `body` is HTML.
std::string page(const std::string& title, const std::string& body);
std::string verdict_banner(bool is_fine, const std::string& verdict, const std::string& sentence);
std::string list_of(const std::vector<std::string>& lines);
/// Nothing where there are none. `heading`: "h2" or "h3".
std::string explanations_table(const std::vector<ReportedExplanation>& explanations, const char* heading);
std::string figure(const std::string& caption, const std::string& svg);
/// Errors by token and block scales, as far as they are there.
std::string distributions(const LayerCharts& drawn);
std::string facts_list(const std::vector<std::pair<std::string, std::string>>& facts,
                       const std::vector<std::string>& notes);
std::string machine_footer();

}  // namespace fourfold
