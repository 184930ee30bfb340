#include "tools/report_page.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "tools/exit_codes.h"
#include "tools/report_charts.h"
#include "tools/report_parts.h"

namespace fourfold {
namespace {

std::string verdict_sentence(const LayertestReport& report) {
  if (report.verdict == "fine") return "Nothing exceeds its limit.";
  if (report.verdict == "kernel") return "The backend computes something else than what is specified.";
  if (report.verdict == "checkpoint") return "The checkpoint lost more than its conversion should.";
  return "Quantizing activations with these input scales loses too much.";
}

std::string stage_rows(const std::string& comparison, const ComparisonReport& report) {
  if (report.stages.empty()) {
    return report.left_out.empty() ? ""
                                   : fmt::format(
                                         "<tr><th class=\"text\" scope=\"row\">{}</th><td class=\"wide "
                                         "quiet\" colspan=\"7\">{}</td></tr>\n",
                                         comparison, html_text(report.left_out));
  }
  std::string text;
  const auto index = [](int64_t value) { return value < 0 ? std::string("–") : std::to_string(value); };
  for (const StageReport& stage : report.stages) {
    const bool is_over = stage.limit && !(stage.rel_l2 <= *stage.limit);
    text += fmt::format("<tr{}>", is_over || !std::isfinite(stage.rel_l2) ? " class=\"bad\"" : "");
    if (&stage == &report.stages.front()) {
      text += fmt::format("<th class=\"text\" scope=\"rowgroup\" rowspan=\"{}\">{}</th>",
                          report.stages.size(), comparison);
    }
    text += fmt::format(
        "<td "
        "class=\"text\">{}</td><td>{:.6f}</td><td>{:.4f}</td><td>{:.3e}</td><td>{}</td><td>{}</td><td>{}</"
        "td></tr>\n",
        kStageNames[static_cast<size_t>(stage.stage)], stage.cosine, stage.norm_ratio, stage.rel_l2,
        stage.limit ? fmt::format("{:.1e}", *stage.limit) : "–",
        index(stage.rel_l2 == 0.0 ? -1 : stage.worst_token),
        index(stage.rel_l2 == 0.0 ? -1 : stage.worst_expert));
  }
  return text;
}

std::string stage_table(const LayertestReport& report) {
  ComparisonReport end_to_end;
  end_to_end.stages = report.kernel_end_to_end;
  return "<div class=\"scroll\"><table><thead><tr><th class=\"text\" scope=\"col\">comparison</th><th "
         "class=\"text\" "
         "scope=\"col\">stage</th><th scope=\"col\">cosine</th><th scope=\"col\">norm ratio</th><th "
         "scope=\"col\">relative L2</th><th scope=\"col\">limit</th><th scope=\"col\">worst token</th><th "
         "scope=\"col\">worst expert</th></tr></thead>\n<tbody>" +
         stage_rows("checkpoint", report.checkpoint) + "</tbody><tbody>" +
         stage_rows("activations", report.activations) + "</tbody><tbody>" +
         stage_rows("kernel", report.kernel_stages) + "</tbody><tbody>" +
         stage_rows("kernel, end to end", end_to_end) + "</tbody></table></div>\n";
}

std::string charts(const LayertestReport& report, const char* heading) {
  const LayerCharts& drawn = report.charts;
  const auto head = [&](const char* text) { return fmt::format("<{0}>{1}</{0}>\n", heading, text); };
  std::string text = head("Errors by expert and stage");
  for (const ExpertErrors& errors : drawn.expert_errors) {
    const bool is_kernel = errors.comparison == "kernel";
    text += figure(
        errors.comparison + (is_kernel ? ": each stage fed with the backend's own previous output" : ""),
        heat_map_svg(errors, is_kernel ? std::optional(kKernelLimit) : std::nullopt));
  }
  text += head("Distributions") + distributions(drawn);
  if (drawn.worst_token) {
    const TokenScatter& scatter = *drawn.worst_token;
    text += head("The worst token") + "<div class=\"single\">" +
            figure(fmt::format("Token {}: {} of {} columns of the output; on the diagonal both agree",
                               scatter.token, scatter.reference.size(), scatter.columns),
                   scatter_svg(scatter)) +
            "</div>\n";
  }
  return text;
}

/// The report of a layer, below its heading.
std::string layer_body(const LayerResult& result, const char* heading) {
  const auto& [subject, report] = result;
  const auto head = [&](const char* text) { return fmt::format("<{0}>{1}</{0}>\n", heading, text); };
  std::string text = verdict_banner(report.verdict == "fine", report.verdict, verdict_sentence(report));
  if (!report.findings.empty()) text += head("Findings") + list_of(report.findings);
  text += explanations_table(report.explanations, heading);
  text += head("Stage by stage") + stage_table(report) +
          "<p class=\"quiet\">A row in red exceeds its limit. Limits are on relative L2.</p>\n";
  text += charts(report, heading);
  return text + head("What was tested") + facts_list(subject.facts, subject.notes);
}

std::string overview_row(const ModelRow& row) {
  if (!row.result) {
    return fmt::format(
        "<tr class=\"bad\"><td>{}</td><td class=\"text\">not read</td><td class=\"wide\" "
        "colspan=\"5\">{}</td></tr>\n",
        row.layer, html_text(row.error));
  }
  const LayertestReport& report = row.result->report;
  const auto worst = worst_figure(report);
  return fmt::format(
      "<tr{}><td><a href=\"#layer-{}\">{}</a></td><td class=\"text\">{}</td><td "
      "class=\"text\">{}</td><td>{}</td><td>{}</td><td>{:.6f}</td><td>{}</td></tr>\n",
      report.findings.empty() ? "" : " class=\"bad\"", row.layer, row.layer, html_text(report.verdict),
      worst ? html_text(worst->name) : "nothing has a limit",
      worst ? fmt::format("{:.3e}", worst->value) : "–", worst ? fmt::format("{:.3g}", worst->share()) : "–",
      report.activations.stages.back().cosine, report.findings.size());
}

std::string overview(const ModelReport& report) {
  std::vector<LayerShare> shares;
  for (const ModelRow& row : report.rows) {
    if (!row.result) continue;
    const auto worst = worst_figure(row.result->report);
    shares.push_back({row.layer, worst ? worst->share() : 0.0, !row.result->report.findings.empty()});
  }
  std::string text = "<h2>Layers</h2>\n";
  if (!shares.empty()) {
    text += figure("How much of its limit each layer uses in what comes nearest to it; 1 is the limit",
                   layer_overview_svg(shares));
  }
  text +=
      "<div class=\"scroll\"><table><thead><tr><th class=\"text\" scope=\"col\">layer</th><th class=\"text\" "
      "scope=\"col\">verdict</th><th class=\"text\" "
      "scope=\"col\">worst</th><th scope=\"col\">value</th><th scope=\"col\">of its limit</th><th "
      "scope=\"col\">out cosine</th><th scope=\"col\">findings</th></tr></thead><tbody>\n";
  for (const ModelRow* row : worst_first(report)) text += overview_row(*row);
  text += "</tbody></table></div>\n";
  std::vector<std::string> remarks;
  for (const std::string& damage : report.damage) remarks.push_back("damage: " + damage);
  for (const SkippedLayer& skipped : report.skipped) {
    remarks.push_back(fmt::format("layer {} was skipped: {}", skipped.layer, skipped.reason));
  }
  return remarks.empty() ? text : text + list_of(remarks);
}

}  // namespace

std::string format_html(const LayerResult& result) {
  const std::string title =
      fmt::format("layertest: {}, layer {}", result.subject.model, result.subject.layer);
  return page(title,
              fmt::format("<h1>{}</h1>\n", html_text(title)) + layer_body(result, "h2") + machine_footer());
}

std::string format_model_html(const ModelReport& report) {
  const std::string title = fmt::format("layertest: {}, {} layers", report.model, report.rows.size());
  const int64_t fine = std::count_if(report.rows.begin(), report.rows.end(), [](const ModelRow& row) {
    return row.result && row.result->report.findings.empty();
  });
  std::string body =
      fmt::format("<h1>{}</h1>\n<p class=\"quiet\">{}</p>\n", html_text(title), html_text(report.directory));
  body += verdict_banner(exit_code_of(report) == kExitFine, verdict_of(report),
                         fmt::format("{} of {} layers are fine.", fine, report.rows.size()));
  body += overview(report);
  for (const ModelRow* row : worst_first(report)) {
    if (!row->result) continue;
    body +=
        fmt::format("<section class=\"layer\" id=\"layer-{}\"><h2>Layer {}</h2>\n", row->layer, row->layer) +
        layer_body(*row->result, "h3") + "</section>\n";
  }
  return page(title, body + machine_footer());
}

}  // namespace fourfold
