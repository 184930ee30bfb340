#include "tools/report_charts.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "tools/report_page.h"

namespace fourfold {
namespace {

std::string open_svg(double width, double height, const std::string& label) {
  return fmt::format("<svg viewBox=\"0 0 {:g} {:g}\" role=\"img\" aria-label=\"{}\">\n", width, height,
                     html_text(label));
}

std::string text_at(double x, double y, const std::string& anchor, const std::string& text) {
  return fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"{}\">{}</text>\n", x, y, anchor,
                     html_text(text));
}

std::string line(double x1, double y1, double x2, double y2, const char* kind) {
  return fmt::format("<line x1=\"{:.1f}\" y1=\"{:.1f}\" x2=\"{:.1f}\" y2=\"{:.1f}\" class=\"{}\"/>\n", x1, y1,
                     x2, y2, kind);
}

// The colour of a cell: from 1e-4, invisible, to 1.
constexpr double kHeatDecades = 4.0;
double heat(double value) {
  return std::isfinite(value) ? std::clamp(std::log10(std::max(value, 1e-30)) / kHeatDecades + 1.0, 0.0, 1.0)
                              : 1.0;
}

}  // namespace

std::string heat_map_svg(const ExpertErrors& errors, std::optional<double> limit) {
  constexpr double kLeft = 80, kWidth = 900, kCell = 26, kTop = 4;
  const size_t experts = errors.experts.size(), stages = errors.stages.size();
  const double cell = std::min(40.0, (kWidth - kLeft) / static_cast<double>(std::max<size_t>(experts, 1)));
  const double bottom = kTop + kCell * static_cast<double>(stages);
  std::string svg = open_svg(kWidth, bottom + 62, "relative L2 by expert and stage, " + errors.comparison);
  for (size_t stage = 0; stage < stages; ++stage) {
    const double y = kTop + kCell * static_cast<double>(stage);
    svg += text_at(kLeft - 8, y + kCell * 0.65, "end", errors.stages[stage]);
    for (size_t expert = 0; expert < experts; ++expert) {
      const double value = errors.rel_l2[expert * stages + stage];
      const bool is_empty = errors.rows[expert] == 0, is_over = limit && !(value <= *limit);
      const bool is_bad = is_over || !std::isfinite(value);
      svg += fmt::format(
          "<rect x=\"{:.2f}\" y=\"{:.1f}\" width=\"{:.2f}\" height=\"{:.1f}\" class=\"{}\" "
          "fill-opacity=\"{:.2f}\">"
          "<title>expert {}, {}: {}</title></rect>\n",
          kLeft + cell * static_cast<double>(expert), y, std::max(cell - (cell > 6 ? 1.0 : 0.0), 0.5),
          kCell - 1,
          is_empty ? "none"
          : is_bad ? "bad"
                   : "a",
          is_bad ? 1.0 : std::max(heat(value), 0.06), errors.experts[expert], html_text(errors.stages[stage]),
          is_empty ? "no rows" : fmt::format("{:.3g} over {} rows", value, errors.rows[expert]));
    }
  }
  const auto every = static_cast<size_t>(std::ceil(28.0 / cell));
  for (size_t expert = 0; expert < experts; expert += every) {
    svg += text_at(kLeft + cell * (static_cast<double>(expert) + 0.5), bottom + 13, "middle",
                   std::to_string(errors.experts[expert]));
  }
  svg += text_at(kLeft, bottom + 29, "start", "expert");
  for (int step = 0; step <= 8; ++step) {  // the legend
    svg += fmt::format(
        "<rect x=\"{}\" y=\"{:.1f}\" width=\"22\" height=\"10\" class=\"a\" fill-opacity=\"{:.2f}\"/>\n",
        kLeft + 60 + 22 * step, bottom + 40, std::max(step / 8.0, 0.06));
  }
  svg += text_at(kLeft, bottom + 49, "start", "1e-4");
  svg += text_at(kLeft + 266, bottom + 49, "start", "1   relative L2, logarithmic");
  if (limit) {
    svg +=
        fmt::format("<rect x=\"560\" y=\"{:.1f}\" width=\"22\" height=\"10\" class=\"bad\"/>\n", bottom + 40);
    svg +=
        text_at(588, bottom + 49, "start", fmt::format("above the limit of {:g}, NaN or infinity", *limit));
  }
  return svg + "</svg>\n";
}

std::string histogram_svg(const std::vector<Histogram>& histograms, const std::string& counted,
                          const std::string& axis) {
  constexpr double kWidth = 440, kLeft = 48, kBottom = 180, kTop = 26;
  constexpr const char* kClasses[] = {"a", "b", "c"};
  const size_t bins = histograms.front().counts.size();
  int64_t most = 1;
  for (const Histogram& one : histograms) {
    for (const int64_t count : one.counts) most = std::max(most, count);
  }
  std::string svg = open_svg(kWidth, 222, "histogram: " + axis);
  const double bin = (kWidth - kLeft - 8) / static_cast<double>(bins),
               bar = bin / static_cast<double>(histograms.size()) * 0.9;
  for (size_t i = 0; i < histograms.size(); ++i) {
    const Histogram& one = histograms[i];
    const double x = kLeft + 4 + 120 * static_cast<double>(i);
    svg += fmt::format("<rect x=\"{:.1f}\" y=\"4\" width=\"10\" height=\"10\" class=\"{}\"/>\n", x,
                       kClasses[i % 3]);
    svg += text_at(x + 14, 13, "start", one.name);
    for (size_t b = 0; b < bins; ++b) {
      if (one.counts[b] == 0) continue;
      const double height =
          std::max(1.0, (kBottom - kTop) * static_cast<double>(one.counts[b]) / static_cast<double>(most));
      svg += fmt::format(
          "<rect x=\"{:.2f}\" y=\"{:.1f}\" width=\"{:.2f}\" height=\"{:.1f}\" class=\"{}\"><title>{}: {} "
          "from {:.3g}</title></rect>\n",
          kLeft + bin * static_cast<double>(b) + bar * static_cast<double>(i), kBottom - height, bar, height,
          kClasses[i % 3], html_text(one.name), one.counts[b],
          std::pow(one.base, one.first + one.step * static_cast<double>(b)));
    }
  }
  svg += line(kLeft, kBottom, kWidth - 8, kBottom, "axis") + line(kLeft, kTop, kLeft, kBottom, "axis");
  svg += text_at(kLeft - 4, kTop + 8, "end", std::to_string(most)) + text_at(kLeft - 4, kBottom, "end", "0");
  svg += fmt::format("<g transform=\"translate(12 {:.1f}) rotate(-90)\">{}</g>\n", (kTop + kBottom) / 2,
                     text_at(0, 0, "middle", counted));
  const Histogram& first = histograms.front();
  const auto every = static_cast<size_t>(first.base == 2.0 ? 3 : std::round(1.0 / first.step));
  for (size_t b = 0; b <= bins; b += every) {
    const double exponent = first.first + first.step * static_cast<double>(b);
    svg += text_at(
        kLeft + bin * static_cast<double>(b), kBottom + 14, b == bins ? "end" : "middle",
        first.base == 2.0 ? fmt::format("{:.3g}", std::exp2(exponent)) : fmt::format("1e{:g}", exponent));
  }
  svg += text_at((kLeft + kWidth) / 2, kBottom + 34, "middle", axis);
  return svg + "</svg>\n";
}

std::string scatter_svg(const TokenScatter& scatter) {
  constexpr double kSize = 400, kLeft = 56, kTop = 10, kPlot = 330;
  double most = 1e-30;
  for (const auto* values : {&scatter.reference, &scatter.candidate}) {
    for (const float value : *values) {
      if (std::isfinite(value)) most = std::max(most, std::abs(static_cast<double>(value)));
    }
  }
  const auto x_of = [&](double value) { return kLeft + kPlot * (0.5 + 0.49 * value / most); };
  const auto y_of = [&](double value) { return kTop + kPlot * (0.5 - 0.49 * value / most); };
  std::string svg = open_svg(kSize, kSize,
                             fmt::format("output of token {}: {} against {}", scatter.token,
                                         scatter.candidate_name, scatter.reference_name));
  svg += line(kLeft, kTop + kPlot, kLeft + kPlot, kTop + kPlot, "axis") +
         line(kLeft, kTop, kLeft, kTop + kPlot, "axis");
  svg += line(x_of(-most), y_of(-most), x_of(most), y_of(most), "diagonal");
  for (size_t i = 0; i < scatter.reference.size(); ++i) {
    const double x = static_cast<double>(scatter.reference[i]), y = static_cast<double>(scatter.candidate[i]);
    if (!std::isfinite(x) || !std::isfinite(y)) continue;
    svg += fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"2.2\" class=\"dot\"/>\n", x_of(x), y_of(y));
  }
  for (const double value : {-most, 0.0, most}) {
    svg += text_at(x_of(value), kTop + kPlot + 14, "middle", fmt::format("{:.3g}", value));
    svg += text_at(kLeft - 5, y_of(value) + 4, "end", fmt::format("{:.3g}", value));
  }
  svg += text_at(kLeft + kPlot / 2, kTop + kPlot + 34, "middle", scatter.reference_name);
  svg += fmt::format("<g transform=\"translate(12 {:.1f}) rotate(-90)\">{}</g>\n", kTop + kPlot / 2,
                     text_at(0, 0, "middle", scatter.candidate_name));
  return svg + "</svg>\n";
}

std::string layer_overview_svg(const std::vector<LayerShare>& layers) {
  constexpr double kWidth = 900, kLeft = 52, kTop = 10, kBottom = 170, kMost = 100.0, kLeast = 1e-3;
  const auto y_of = [&](double share) {
    const double value = std::isfinite(share) ? std::clamp(share, kLeast, kMost) : kMost;
    return kBottom - (kBottom - kTop) * std::log(value / kLeast) / std::log(kMost / kLeast);
  };
  std::string svg = open_svg(kWidth, 206, "share of its limit that each layer uses");
  const double slot = (kWidth - kLeft - 8) / static_cast<double>(std::max<size_t>(layers.size(), 1));
  for (size_t i = 0; i < layers.size(); ++i) {
    const LayerShare& one = layers[i];
    const double y = y_of(one.share), x = kLeft + slot * static_cast<double>(i);
    svg += fmt::format(
        "<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\" class=\"{}\"><title>layer {}: "
        "{:.3g} of its limit</title></rect>\n",
        x + 0.1 * slot, y, std::min(0.8 * slot, 60.0), std::max(kBottom - y, 1.0),
        one.has_finding ? "bad" : "a", one.layer, one.share);
  }
  const auto every = static_cast<size_t>(std::ceil(28.0 / slot));
  for (size_t i = 0; i < layers.size(); i += every) {
    svg += text_at(kLeft + slot * static_cast<double>(i) + 0.1 * slot + std::min(0.4 * slot, 30.0),
                   kBottom + 14, "middle", std::to_string(layers[i].layer));
  }
  for (const double share : {0.001, 0.01, 0.1, 1.0, 10.0, 100.0}) {
    svg += text_at(kLeft - 5, y_of(share) + 4, "end", fmt::format("{:g}", share));
  }
  svg += line(kLeft, kBottom, kWidth - 8, kBottom, "axis") +
         line(kLeft, y_of(1.0), kWidth - 8, y_of(1.0), "limit");
  svg += text_at((kLeft + kWidth) / 2, kBottom + 31, "middle", "layer");
  return svg + "</svg>\n";
}

}  // namespace fourfold
