#include "tools/bench_report.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "tools/json_number.h"
#include "tools/terminal.h"

namespace fourfold {
namespace {

using Json = nlohmann::ordered_json;

Json optional_number(const std::optional<double>& value) {
  return value ? json_number(*value) : Json(nullptr);
}

std::string status_of(const BenchResult& result) {
  if (!result.not_run.empty()) return "not run";
  return result.check.passed() ? "ok" : "wrong";
}

Json ceiling_json(const Ceiling& ceiling) {
  return {
      {"name", ceiling.name}, {"per_second", optional_number(ceiling.per_second)}, {"note", ceiling.note}};
}

Json machine_json(const MachineReport& machine) {
  Json peaks = Json::array();
  for (const Ceiling& peak : machine.peaks) peaks.push_back(ceiling_json(peak));
  return {{"machine", machine.machine},
          {"threads", machine.threads > 0 ? Json(machine.threads) : Json(nullptr)},
          {"cache_bytes", machine.cache_bytes},
          {"read_bandwidth", ceiling_json(machine.read_bandwidth)},
          {"peaks", peaks}};
}

Json check_json(const CheckReport& check) {
  Json stages = Json::array();
  for (const StageCheck& stage : check.stages) {
    stages.push_back({{"stage", stage.stage},
                      {"rel_l2", json_number(stage.rel_l2)},
                      {"limit", stage.limit},
                      {"worst_row_rel_l2", json_number(stage.worst_row_rel_l2)},
                      {"worst_row_limit", stage.worst_row_limit}});
  }
  return {{"depth", check.depth == CheckDepth::kStageByStage ? "stages" : "end to end"},
          {"why_end_to_end", check.why_end_to_end},
          {"rows", check.rows},
          {"whole_experts", check.whole_experts},
          {"tokens", check.tokens},
          {"staged_values", check.staged_values},
          {"stages", stages},
          {"findings", check.findings}};
}

void add_times(const BenchResult& result, Json& json) {
  if (!result.seconds) return;
  const Spread& seconds = *result.seconds;
  json["seconds"] = {
      {"median", seconds.median}, {"p10", seconds.p10}, {"p90", seconds.p90}, {"samples", seconds.samples}};
  json["bytes_per_second"] = result.work.bytes / seconds.median;
  json["operations_per_second"] = result.work.operations / seconds.median;
  json["floor"] = {{"seconds", result.floor.seconds},
                   {"by", result.floor.by_memory ? "memory" : "arithmetic"},
                   {"fraction", result.floor.seconds / seconds.median},
                   {"beaten", result.beats_floor()}};
  json["peak"] = result.peak ? ceiling_json(*result.peak) : Json(nullptr);
  json["peak_between_calls"] = optional_number(result.peak_between);
  Json stages = Json::array();
  for (const StageTime& stage : result.stages) {
    stages.push_back({{"stage", stage.stage}, {"seconds", stage.seconds}});
  }
  json["stages"] = stages;
}

Json case_json(const BenchResult& result) {
  const BenchCase& bench_case = result.bench_case;
  Json json = {{"case", bench_case.name()},
               {"backend", bench_case.backend},
               {"model", bench_case.model},
               {"experts", bench_case.experts},
               {"hidden", bench_case.hidden},
               {"intermediate", bench_case.intermediate},
               {"top_k", bench_case.top_k},
               {"tokens", bench_case.tokens},
               {"activations", to_string(bench_case.activations)},
               {"threads", bench_case.threads > 0 ? Json(bench_case.threads) : Json(nullptr)},
               {"status", status_of(result)}};
  if (!result.not_run.empty()) {
    json["reason"] = result.not_run;
    return json;
  }
  json["kernel"] = result.kernel;
  json["experts_hit"] = result.work.experts_hit;
  json["rows"] = result.work.rows;
  json["weight_bytes"] = result.work.weight_bytes;
  json["bytes"] = result.work.bytes;
  json["operations"] = result.work.operations;
  json["rotation"] = {{"routings", result.rotations},
                      {"layers", result.layer_copies},
                      {"weight_bytes", result.rotating_bytes},
                      {"cold", result.cold}};
  json["check"] = check_json(result.check);
  add_times(result, json);
  return json;
}

std::string percent(double fraction) {
  return fmt::format("{:.1f}%", 100.0 * fraction);
}

/// Microseconds with about four digits.
std::string microseconds(double seconds) {
  const double us = seconds * 1e6;
  return fmt::format("{:.{}f}", us, us < 100 ? 2 : us < 10'000 ? 1 : 0);
}

std::string check_text(const CheckReport& check) {
  return fmt::format("{:.1e}, {} rows{}", check.worst(), check.rows,
                     check.depth == CheckDepth::kEndToEnd ? ", end to end" : "");
}

std::string timed_line(const BenchResult& result) {
  const Spread& seconds = *result.seconds;
  return fmt::format("{:>6.1f} {:>8.1f} {:>10} {:>19} {:>8.1f} {:>9.4g} {:>10} {:>7} {}  {}{}",
                     result.work.experts_hit, result.work.rows, microseconds(seconds.median),
                     fmt::format("{}-{}", microseconds(seconds.p10), microseconds(seconds.p90)),
                     1e-9 * result.work.bytes / seconds.median,
                     1e-12 * result.work.operations / seconds.median, microseconds(result.floor.seconds),
                     percent(result.floor.seconds / seconds.median), result.floor.by_memory ? "m" : "a",
                     check_text(result.check), result.cold ? "" : ", warm");
}

/// Where the floor would be longer by more than a twentieth, were the peak what it is between calls.
std::string between_line(const BenchResult& result) {
  if (!result.peak_between || result.floor_between.seconds <= 1.05 * result.floor.seconds) return "";
  return fmt::format(
      "      {} between the calls is {:.4g} TFLOP/s, {} of the ceiling; beside that {} of the floor\n",
      result.peak->name, 1e-12 * *result.peak_between,
      percent(*result.peak_between / result.peak->per_second.value_or(0.0)),
      percent(result.floor_between.seconds / result.seconds->median));
}

std::string stage_lines(const BenchResult& result) {
  double total = 0.0;
  for (const StageTime& stage : result.stages) total += stage.seconds;
  std::string text;
  for (const StageTime& stage : result.stages) {
    text += fmt::format("      {:<24} {:>10} us {:>7}\n", stage.stage, microseconds(stage.seconds),
                        percent(total > 0.0 ? stage.seconds / total : 0.0));
  }
  return text;
}

}  // namespace

std::string format_machine(const MachineReport& machine) {
  const auto rate = [](const Ceiling& ceiling, std::string_view unit) {
    if (!ceiling.per_second) return fmt::format("{} not measured: {}", ceiling.name, ceiling.note);
    const double giga = 1e-9 * *ceiling.per_second;
    return giga < 1000.0 ? fmt::format("{} {:.4g} G{}", ceiling.name, giga, unit)
                         : fmt::format("{} {:.4g} T{}", ceiling.name, 1e-3 * giga, unit);
  };
  std::string text = fmt::format(
      "machine      {}{}; last-level cache {:.0f} MB\n", machine.machine,
      machine.threads > 0 ? fmt::format(", {} thread{}", machine.threads, machine.threads == 1 ? "" : "s")
                          : "",
      1e-6 * static_cast<double>(machine.cache_bytes));
  text += fmt::format("ceilings     {}\n", rate(machine.read_bandwidth, "B/s"));
  for (const Ceiling& peak : machine.peaks) {
    text += fmt::format("             {}\n", rate(peak, "FLOP/s"));
  }
  return text;
}

std::string format_case_head() {
  return bold(fmt::format("{:<36} {:<8} {:>3} {:>6} {:>8} {:>10} {:>19} {:>8} {:>9} {:>10} {:>7}    {}",
                          "case", "act", "thr", "hit", "rows", "median us", "p10-p90", "GB/s", "TFLOP/s",
                          "floor us", "of it", "check: rel L2")) +
         "\n";
}

std::string format_case(const BenchResult& result) {
  const BenchCase& bench_case = result.bench_case;
  std::string text = fmt::format("{:<36} {:<8} {:>3} ", bench_case.name(), to_string(bench_case.activations),
                                 bench_case.threads > 0 ? std::to_string(bench_case.threads) : "-");
  if (!result.not_run.empty()) return text + "not run: " + printable(result.not_run) + "\n";
  if (!result.seconds) {
    text = red(text + "wrong: no time is given") + "\n";
    for (const std::string& finding : result.check.findings) text += fmt::format("      {}\n", finding);
    return text;
  }
  text += timed_line(result) + "\n";
  if (result.peak && bench_case.threads == 0 && !result.peak->per_second) {
    text += fmt::format("      floor of the bytes alone: {}: {}\n", result.peak->name, result.peak->note);
  }
  if (result.beats_floor()) {
    text += red(fmt::format("      faster than its floor: {}; the fraction means nothing, run it again",
                            result.cold ? "a ceiling was measured too low, on a busy machine?"
                                        : "its weights came from a cache, or a ceiling is too low")) +
            "\n";
  }
  return text + between_line(result) + stage_lines(result);
}

std::string format_bench_json(const BenchRequest& request, const std::vector<MachineReport>& machines,
                              const std::vector<BenchResult>& results) {
  Json json = {{"version", FOURFOLD_VERSION},
               {"seed", request.seed},
               {"routing", request.routing.describe()},
               {"activation_scale",
                {{"x", to_string(request.x_scale)}, {"intermediate", to_string(request.intermediate_scale)}}},
               {"activation_rule", to_string(request.activation_rule)},
               {"machines", Json::array()},
               {"cases", Json::array()}};
  for (const MachineReport& machine : machines) json["machines"].push_back(machine_json(machine));
  for (const BenchResult& result : results) json["cases"].push_back(case_json(result));
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace fourfold
