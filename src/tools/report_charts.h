// Charts of the HTML report as inline SVG, coloured by the classes of page.css.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "tools/layer_charts.h"

namespace fourfold {

std::string heat_map_svg(const ExpertErrors& errors, std::optional<double> limit);
/// Bars of up to three histograms with the same bins, beside each other. `counted`: the unit of the counts.
std::string histogram_svg(const std::vector<Histogram>& histograms, const std::string& counted,
                          const std::string& axis);
std::string scatter_svg(const TokenScatter& scatter);

/// A layer of the overview: how much of its limit it uses.
struct LayerShare {
  int64_t layer = 0;
  double share = 0.0;
  bool has_finding = false;
};
std::string layer_overview_svg(const std::vector<LayerShare>& layers);

}  // namespace fourfold
