// The report on a whole model, as a table and as JSON.
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "tools/exit_codes.h"
#include "tools/model_test.h"
#include "tools/number_list.h"
#include "tools/terminal.h"

namespace fourfold {
namespace {

using Json = nlohmann::ordered_json;

/// The figures of a layer that could be tested.
std::string result_columns(const LayertestReport& report) {
  const auto worst = worst_figure(report);
  const StageReport& out = report.activations.stages.back();
  return fmt::format("{:<12} {:<28} {:>10} {:>9} {:>9} {:>11.6f} {:>9}", report.verdict,
                     worst ? worst->name : "nothing has a limit",
                     worst ? fmt::format("{:.3e}", worst->value) : "-",
                     worst ? fmt::format("{:.1e}", worst->limit) : "-",
                     worst ? fmt::format("{:.3g}", worst->share()) : "-", out.cosine, report.findings.size());
}

std::string table_row(const ModelRow& row) {
  if (!row.result) {
    return red(fmt::format("  {:>5} {:<12} {}", row.layer, "not read",
                           printable(row.error, kReportLineBytes))) +
           "\n";
  }
  const std::string line =
      fmt::format("  {:>5} {}  {:>7.1f}", row.layer, result_columns(row.result->report), row.seconds);
  return (row.result->report.findings.empty() ? line : red(line)) + "\n";
}

/// Layers that were skipped for the same reason, on one line.
std::string skipped_text(const ModelReport& report) {
  std::vector<std::pair<std::string, std::vector<int64_t>>> reasons;
  for (const SkippedLayer& skipped : report.skipped) {
    auto same = std::find_if(reasons.begin(), reasons.end(),
                             [&](const auto& reason) { return reason.first == skipped.reason; });
    if (same == reasons.end()) same = reasons.insert(same, {skipped.reason, {}});
    same->second.push_back(skipped.layer);
  }
  std::string text;
  for (const auto& [reason, layers] : reasons) {
    text += fmt::format("{:<12} layer{} {}: {}\n", "skipped", layers.size() == 1 ? "" : "s",
                        format_list(layers), printable(reason, kReportLineBytes));
  }
  return text;
}

/// What is the same in every layer, from the first that could be tested.
std::string common_facts(const ModelReport& report) {
  std::string text;
  for (const ModelRow& row : report.rows) {
    if (!row.result) continue;
    for (const auto& [label, fact] : row.result->subject.facts) {
      const bool is_common = std::all_of(report.rows.begin(), report.rows.end(), [&](const ModelRow& other) {
        if (!other.result) return true;
        const auto& facts = other.result->subject.facts;
        return std::find(facts.begin(), facts.end(), std::pair(label, fact)) != facts.end();
      });
      if (is_common) text += fmt::format("{:<12} {}\n", label, printable(fact, kReportLineBytes));
    }
    break;
  }
  return text;
}

/// Notes and findings of the layers, those of the worst first.
std::string remarks(const ModelReport& report) {
  std::string text;
  for (const ModelRow* row : worst_first(report)) {
    if (!row->result) continue;
    for (const std::string& finding : row->result->report.findings) {
      text += fmt::format("{}  layer {}: {}\n", red("finding"), row->layer, printable(finding));
    }
  }
  for (const ModelRow& row : report.rows) {
    if (!row.result) continue;
    for (const std::string& note : row.result->subject.notes) {
      text += fmt::format("note     layer {}: {}\n", row.layer, printable(note, kReportLineBytes));
    }
  }
  return text;
}

std::string verdict_line(const ModelReport& report) {
  int64_t unread = 0, with_findings = 0;
  for (const ModelRow& row : report.rows) {
    unread += !row.result;
    with_findings += row.result && !row.result->report.findings.empty();
  }
  const auto total = static_cast<int64_t>(report.rows.size());
  const int64_t fine = total - unread - with_findings;
  std::string text = fmt::format("{} of {} layer{} fine", fine, total, total == 1 ? "" : "s");
  if (with_findings > 0) text += fmt::format(", {} with findings", with_findings);
  if (unread > 0) text += fmt::format(", {} not read", unread);
  const std::string verdict = "verdict: " + verdict_of(report);
  return bold(exit_code_of(report) == kExitFine ? green(verdict) : red(verdict)) + ": " + text + "\n";
}

}  // namespace

std::string verdict_of(const ModelReport& report) {
  switch (exit_code_of(report)) {
    case kExitFine:
      return "fine";
    case kExitFinding:
      return "finding";
    default:
      return "error";
  }
}

std::string format_model_table(const ModelReport& report) {
  std::string text = fmt::format("{:<12} {}: {}\n", "model", printable(report.directory, kReportLineBytes),
                                 printable(report.model, kReportLineBytes));
  text += common_facts(report) + skipped_text(report);
  for (const std::string& damage : report.damage) {
    text += red(fmt::format("{:<12} {}", "damage", printable(damage, kReportLineBytes))) + "\n";
  }
  text += "\n" +
          bold(fmt::format("  {:>5} {:<12} {:<28} {:>10} {:>9} {:>9} {:>11} {:>9}  {:>7}", "layer", "verdict",
                           "worst", "value", "limit", "of limit", "out cosine", "findings", "seconds")) +
          "\n";
  for (const ModelRow* row : worst_first(report)) text += table_row(*row);
  text += "  worst: what comes nearest to its limit, or is beyond; out cosine: of activations\n\n";
  return text + remarks(report) + verdict_line(report);
}

std::string format_model_json(const ModelReport& report) {
  Json json = {{"verdict", verdict_of(report)}, {"model", report.model},    {"directory", report.directory},
               {"layers", Json::array()},       {"skipped", Json::array()}, {"damage", report.damage}};
  for (const ModelRow& row : report.rows) {
    Json layer = row.result ? layer_json(*row.result) : Json({{"layer", row.layer}, {"error", row.error}});
    layer["seconds"] = row.seconds;
    json["layers"].push_back(std::move(layer));
  }
  for (const SkippedLayer& skipped : report.skipped) {
    json["skipped"].push_back({{"layer", skipped.layer}, {"reason", skipped.reason}});
  }
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace fourfold
