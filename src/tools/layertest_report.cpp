#include "tools/layertest_report.h"

#include <fmt/format.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "tools/json_number.h"
#include "tools/terminal.h"

namespace fourfold {
namespace {

using Json = nlohmann::ordered_json;

Json index_or_null(int64_t index) {
  return index < 0 ? Json(nullptr) : Json(index);
}

std::string_view name_of(const StageReport& stage) {
  return kStageNames[static_cast<size_t>(stage.stage)];
}

Json stages_json(const std::vector<StageReport>& stages) {
  Json json = Json::object();
  for (const StageReport& stage : stages) {
    json[std::string(name_of(stage))] = {
        {"cosine", json_number(stage.cosine)},
        {"norm_ratio", json_number(stage.norm_ratio)},
        {"rel_l2", json_number(stage.rel_l2)},
        {"worst_token", index_or_null(stage.worst_token)},
        {"worst_expert", index_or_null(stage.worst_expert)},
        {"limit", stage.limit ? json_number(*stage.limit) : Json(nullptr)},
    };
  }
  return json;
}

Json histograms_json(const std::vector<Histogram>& histograms) {
  Json json = Json::array();
  for (const Histogram& one : histograms) {
    json.push_back({{"name", one.name},
                    {"base", one.base},
                    {"first", one.first},
                    {"step", one.step},
                    {"counts", one.counts},
                    {"zeros", one.zeros},
                    {"not_finite", one.not_finite}});
  }
  return json;
}

template <class T>
Json numbers_json(const std::vector<T>& values) {
  Json json = Json::array();
  for (const T value : values) json.push_back(json_number(static_cast<double>(value)));
  return json;
}

/// Enough digits to see how far from 1 a cosine is.
std::string cosine_text(double cosine) {
  const double distance = std::abs(1.0 - cosine);
  if (cosine == 1.0) return "1";
  if (distance < 1e-12) return "1 - <1e-12";
  return distance < 1e-5 ? fmt::format("1 - {:.1e}", distance) : fmt::format("{:.6f}", cosine);
}

std::string table_rows(const std::string& comparison, const std::vector<StageReport>& stages) {
  std::string text;
  for (const StageReport& stage : stages) {
    const bool over = stage.limit && !(stage.rel_l2 <= *stage.limit);
    const auto index = [](int64_t value) { return value < 0 ? std::string("-") : std::to_string(value); };
    const std::string row =
        fmt::format("  {:<12} {:<17} {:>12} {:>11.6f} {:>10.3e} {:>10} {:>7} {:>7}",
                    &stage == &stages.front() ? comparison : "", name_of(stage), cosine_text(stage.cosine),
                    stage.norm_ratio, stage.rel_l2, stage.limit ? fmt::format("{:.1e}", *stage.limit) : "-",
                    index(stage.rel_l2 == 0.0 ? -1 : stage.worst_token),
                    index(stage.rel_l2 == 0.0 ? -1 : stage.worst_expert));
    text += (over ? red(row + "  <-") : row) + "\n";
  }
  return text;
}

std::string comparison_rows(const std::string& name, const ComparisonReport& comparison) {
  if (comparison.stages.empty()) return fmt::format("  {:<12} {}\n", name, comparison.left_out);
  return table_rows(name, comparison.stages);
}

std::string percentage(int64_t part, int64_t whole) {
  return whole == 0 ? "0%"
                    : fmt::format("{:.4g}%", 100.0 * static_cast<double>(part) / static_cast<double>(whole));
}

std::string counts_text(const LayertestReport& report) {
  std::string text;
  if (report.exact_blocks) {
    text += fmt::format("  MXFP4 blocks that are not exact: {} of {} ({})\n", report.exact_blocks->inexact,
                        report.exact_blocks->blocks,
                        percentage(report.exact_blocks->inexact, report.exact_blocks->blocks));
  }
  if (report.staging) {
    text +=
        fmt::format("  staged bytes that differ from the specification: x {} of {}, intermediate {} of {}\n",
                    report.staging->x_different, report.staging->x_values,
                    report.staging->intermediate_different, report.staging->intermediate_values);
  }
  for (const auto& [what, scale] : input_scales_of(report)) {
    const std::string who =
        scale.worst_expert < 0 ? "it loses" : fmt::format("expert {} loses most,", scale.worst_expert);
    const std::string line =
        fmt::format("  input scales of {}: {} {:.3g} x what a scale by token loses (limit {})", what, who,
                    scale.ratio, scale.limit);
    text += (scale.ratio <= scale.limit ? line : red(line + "  <-")) + "\n";
  }
  return text;
}

/// Where the limits come from; nothing where there are none.
std::string limits_text(const LayertestReport& report) {
  std::string text;
  for (const auto& [name, comparison] :
       {std::pair("checkpoint", &report.checkpoint), std::pair("kernel", &report.kernel_stages)}) {
    if (!comparison->stages.empty()) text += fmt::format("  {:<12} {}\n", name, comparison->limit_origin);
  }
  if (!input_scales_of(report).empty()) {
    text += fmt::format(
        "  input scales {} x a scale by token: in an expert's median row, and with what saturates\n",
        input_scales_of(report).front().second.limit);
  }
  return text;
}

}  // namespace

Json charts_json(const LayerCharts& charts) {
  Json json = {{"expert_errors", Json::array()},
               {"block_scales", histograms_json(charts.block_scales)},
               {"errors", histograms_json(charts.errors)}};
  for (const ExpertErrors& errors : charts.expert_errors) {
    json["expert_errors"].push_back({{"comparison", errors.comparison},
                                     {"stages", errors.stages},
                                     {"experts", errors.experts},
                                     {"rows", errors.rows},
                                     {"rel_l2", numbers_json(errors.rel_l2)}});
  }
  if (charts.worst_token) {
    const TokenScatter& scatter = *charts.worst_token;
    json["worst_token"] = {{"token", scatter.token},
                           {"columns", scatter.columns},
                           {"reference_name", scatter.reference_name},
                           {"candidate_name", scatter.candidate_name},
                           {"reference", numbers_json(scatter.reference)},
                           {"candidate", numbers_json(scatter.candidate)}};
  }
  return json;
}

Json explanations_json(const std::vector<ReportedExplanation>& explanations) {
  Json json = Json::array();
  for (const ReportedExplanation& one : explanations) {
    json.push_back(
        {{"fault", one.fault}, {"distance", json_number(one.distance)}, {"evidence", one.evidence}});
  }
  return json;
}

std::vector<std::pair<std::string, InputScaleReport>> input_scales_of(const LayertestReport& report) {
  std::vector<std::pair<std::string, InputScaleReport>> scales;
  if (report.x_scale) scales.emplace_back("x", *report.x_scale);
  if (report.intermediate_scale) scales.emplace_back("intermediate", *report.intermediate_scale);
  std::erase_if(scales, [](const auto& scale) { return scale.second.worst_expert < 0; });
  if (report.shared_x_scale) scales.emplace_back("shared_x", *report.shared_x_scale);
  if (report.shared_intermediate_scale)
    scales.emplace_back("shared_intermediate", *report.shared_intermediate_scale);
  return scales;
}

std::string format_table(const LayerResult& result) {
  const auto& [subject, report] = result;
  std::string text;
  for (const auto& [label, fact] : subject.facts)
    text += fmt::format("{:<12} {}\n", label, printable(fact, kReportLineBytes));
  for (const std::string& note : subject.notes)
    text += fmt::format("{:<12} {}\n", "note", printable(note, kReportLineBytes));
  text += "\n" +
          bold(fmt::format("  {:<12} {:<17} {:>12} {:>11} {:>10} {:>10} {:>7} {:>7}", "comparison", "stage",
                           "cosine", "norm ratio", "rel L2", "limit", "token", "expert")) +
          "\n";
  text += comparison_rows("checkpoint", report.checkpoint);
  text += comparison_rows("activations", report.activations);
  text += comparison_rows("kernel", report.kernel_stages);
  if (!report.kernel_end_to_end.empty()) text += table_rows("  end to end", report.kernel_end_to_end);
  const std::string limits = limits_text(report);
  text += counts_text(report) + "\n" + (limits.empty() ? "" : "limits on relative L2\n" + limits + "\n");
  for (const std::string& finding : report.findings)
    text += red("finding") + "  " + printable(finding) + "\n";
  for (const ReportedExplanation& one : report.explanations)
    text += fmt::format("explanation  {} ({})\n", one.fault, one.evidence);
  if (report.verdict == "fine") return text + bold(green("verdict: fine")) + ": nothing exceeds its limit\n";
  return text + bold(red("verdict: " + report.verdict)) + ": see the findings above\n";
}

Json layer_json(const LayerResult& result) {
  const auto& [subject, report] = result;
  Json json = {
      {"verdict", report.verdict},
      {"backend", report.backend},
      {"kernel", report.kernel},
      {"model", subject.model},
      {"layer", subject.layer},
      {"comparisons",
       {{"checkpoint", stages_json(report.checkpoint.stages)},
        {"activations", stages_json(report.activations.stages)},
        {"kernel", stages_json(report.kernel_stages.stages)}}},
      {"kernel_end_to_end", stages_json(report.kernel_end_to_end)},
      {"left_out", {{"checkpoint", report.checkpoint.left_out}, {"kernel", report.kernel_stages.left_out}}},
      {"findings", report.findings},
      {"notes", subject.notes},
  };
  if (report.exact_blocks) {
    json["mxfp4_blocks"] = {{"total", report.exact_blocks->blocks},
                            {"inexact", report.exact_blocks->inexact}};
  }
  for (const auto& [what, scale] : input_scales_of(report)) {
    json["input_scales"][what] = {{"worst_expert", index_or_null(scale.worst_expert)},
                                  {"ratio", json_number(scale.ratio)},
                                  {"limit", scale.limit}};
  }
  if (report.staging) {
    json["staging"] = {
        {"x", {{"values", report.staging->x_values}, {"different", report.staging->x_different}}},
        {"intermediate",
         {{"values", report.staging->intermediate_values},
          {"different", report.staging->intermediate_different}}}};
  }
  for (const auto& [label, fact] : subject.facts) json["facts"][label] = fact;
  if (!report.explanations.empty()) json["explanations"] = explanations_json(report.explanations);
  json["charts"] = charts_json(report.charts);
  return json;
}

std::string format_json(const LayerResult& result) {
  return layer_json(result).dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace fourfold
