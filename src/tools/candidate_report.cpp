// What layertest --candidate found, for people and as JSON.
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "tools/candidate_test.h"
#include "tools/json_number.h"
#include "tools/layertest_report.h"
#include "tools/terminal.h"

namespace fourfold {
namespace {

using diagnosis::Explanation;
using diagnosis::Verdict;
using Json = nlohmann::ordered_json;

constexpr size_t kLineBytes = 1000;  // of text that comes from files

std::string number(double value) {
  return value > 1e20 ? "far" : fmt::format("{:.2e}", value);
}

std::string row(const std::string& what, const Explanation& e) {
  return fmt::format("  {:<10} {:<44} {:>9} {:>9} {:>9}  {}\n", what, e.faults.empty() ? "no fault" : e.id(),
                     number(e.distance), number(e.noise), number(e.limit), describe(e.staging));
}

std::string explanations_text(const diagnosis::Diagnosis& experts) {
  std::string text = bold(fmt::format("  {:<10} {:<44} {:>9} {:>9} {:>9}  {}\n", "experts", "explanation",
                                      "distance", "noise", "limit", "activations"));
  text += row("as is", experts.sound);
  const std::string tried =
      fmt::format("  {} of the tokens replayed, {} faults and {} pairs tried, {} replays\n",
                  experts.tokens.size(), experts.faults_tried, experts.pairs_tried, experts.replays);
  if (experts.verdict == Verdict::kFine) return text + tried;
  if (experts.best) text += row("best", *experts.best);
  for (const Explanation& same : experts.alike)
    text += fmt::format("  {:<10} {}\n", "  same here", same.id());
  if (experts.runner_up) text += row("runner-up", *experts.runner_up);
  return text + tried;
}

std::string routing_text(const CandidateReport& report) {
  if (!report.routing) return fmt::format("  {:<10} {}\n", "routing", report.routing_left_out);
  const auto& routing = *report.routing;
  std::string text = fmt::format(
      "  {:<10} the engine's weights are {} from the router's (median token); other experts in {} tokens\n",
      "routing", number(routing.distance), routing.tokens_with_other_ids);
  if (routing.best) {
    text +=
        fmt::format("  {:<10} {} ({}); runner-up {} ({})\n", "", routing.best->id,
                    number(routing.best_distance), routing.runner_up->id, number(routing.runner_up_distance));
  }
  return text;
}

/// Stage by stage, where there is more than the output.
std::vector<std::string> stage_lines(const CandidateReport& report) {
  std::vector<std::string> lines;
  if (report.stages.size() < 2) return lines;
  for (const CandidateStage& stage : report.stages) {
    lines.push_back(fmt::format("{}, after the engine's own stage before it: {} off, {} is rounding{}",
                                stage.name, number(stage.distance), number(stage.limit),
                                stage.is_off() ? "  <-" : ""));
  }
  return lines;
}

Json explanation_json(const Explanation& e) {
  Json json = {{"id", e.id()},
               {"sentence", e.sentence()},
               {"activations", describe(e.staging)},
               {"distance", json_number(e.distance)},
               {"noise", json_number(e.noise)},
               {"limit", json_number(e.limit)}};
  return json;
}

std::string_view name_of(Verdict verdict) {
  return verdict == Verdict::kFine ? "fine" : verdict == Verdict::kExplained ? "explained" : "unexplained";
}

}  // namespace

std::string format_candidate(const CandidateReport& report) {
  std::string text;
  for (const auto& [label, fact] : report.facts)
    text += fmt::format("{:<12} {}\n", label, printable(fact, kLineBytes));
  for (const std::string& note : report.notes)
    text += fmt::format("{:<12} {}\n", "note", printable(note, kLineBytes));
  text += "\n" + routing_text(report);
  for (const StagedReport& staged : report.staged) {
    text +=
        fmt::format("  {:<10} codes and scales are {} from {} with scales read as {}, {} as {}; {} is due\n",
                    "staging", number(staged.distance), staged.what, staged.layout, number(staged.runner_up),
                    staged.runner_up_layout, number(staged.due));
  }
  text += "\n" + explanations_text(report.experts) + "\n";
  if (report.verdict != "fine") {
    for (const std::string& line : stage_lines(report)) text += fmt::format("  {:<10} {}\n", "where", line);
    for (const std::string& line : describe(report.map, report.mapped_tokens))
      text += fmt::format("  {:<10} {}\n", "where", line);
    text += "\n";
  }
  if (report.verdict == "fine") return text + bold(green("verdict: fine")) + ": " + report.explanation + "\n";
  text += bold(red("verdict: " + report.verdict)) + ": " + report.explanation + "\n";
  if (!report.experts.alike.empty() && report.experts.verdict == Verdict::kExplained) {
    text += fmt::format(
        "{:<12} {} more explanations do the same on these data; other tokens may tell them apart\n", "",
        report.experts.alike.size());
  }
  return report.remedy.empty() ? text : text + fmt::format("{:<12} {}\n", "look at", report.remedy);
}

std::string candidate_json(const CandidateReport& report) {
  const diagnosis::Diagnosis& experts = report.experts;
  Json json = {{"verdict", report.verdict},
               {"explanation", report.explanation},
               {"remedy", report.remedy},
               {"model", report.model},
               {"layer", report.layer}};
  json["experts"] = {{"verdict", name_of(experts.verdict)}, {"as_is", explanation_json(experts.sound)}};
  const bool is_fine = experts.verdict == Verdict::kFine;  // then the nearest fault is nothing to know
  if (experts.best && !is_fine) json["experts"]["best"] = explanation_json(*experts.best);
  json["experts"]["alike"] = Json::array();
  for (const Explanation& same : experts.alike) {
    if (!is_fine) json["experts"]["alike"].push_back(same.id());
  }
  if (experts.runner_up && !is_fine) json["experts"]["runner_up"] = explanation_json(*experts.runner_up);
  if (report.routing) {
    const auto& routing = *report.routing;
    json["routing"] = {{"verdict", name_of(routing.verdict)},
                       {"distance", json_number(routing.distance)},
                       {"tokens_with_other_experts", routing.tokens_with_other_ids}};
    if (routing.best)
      json["routing"]["best"] = {{"id", routing.best->id}, {"distance", json_number(routing.best_distance)}};
  } else {
    json["routing"] = {{"left_out", report.routing_left_out}};
  }
  json["staged"] = Json::array();
  for (const StagedReport& staged : report.staged) {
    json["staged"].push_back({{"tensor", staged.what},
                              {"layout", staged.layout},
                              {"distance", json_number(staged.distance)},
                              {"runner_up", staged.runner_up_layout},
                              {"runner_up_distance", json_number(staged.runner_up)},
                              {"due", json_number(staged.due)}});
  }
  json["stages"] = Json::array();
  for (const CandidateStage& stage : report.stages) {
    json["stages"].push_back({{"stage", stage.name},
                              {"distance", json_number(stage.distance)},
                              {"limit", json_number(stage.limit)},
                              {"off", stage.is_off()}});
  }
  const diagnosis::ErrorMap& map = report.map;
  json["where"] = {{"tokens", report.mapped_tokens},
                   {"not_finite", report.not_finite},
                   {"bad_tokens", map.bad_tokens},
                   {"bad_experts", map.bad_experts},
                   {"share_of_worst_tenth_of_columns", json_number(map.share_of_worst_columns)},
                   {"first_bad_column", map.first_bad_column},
                   {"last_bad_column", map.last_bad_column},
                   {"period", map.period},
                   {"block", map.block},
                   {"bad_blocks", map.bad_blocks}};
  json["explanations"] = explanations_json(report.explanations);
  json["charts"] = charts_json(report.charts);
  json["notes"] = report.notes;
  for (const auto& [label, fact] : report.facts) json["facts"][label] = fact;
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace fourfold
