// The self-test's result for people, and as JSON.
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "tools/self_test.h"
#include "tools/terminal.h"

namespace fourfold {
namespace {

double percent(int64_t part, int64_t whole) {
  return whole == 0 ? 100.0 : 100.0 * static_cast<double>(part) / static_cast<double>(whole);
}

std::string matrix_text(const SelfTestReport& report) {
  std::string text = bold(fmt::format("  {:<34} {:>7} {:>7} {:>9} {:>9}  {}\n", "planted", "trials", "named",
                                      "in class", "left out", "named instead"));
  for (const auto& [id, tally] : report.faults) {
    std::string instead;
    for (const auto* pairs : {&report.confusion, &report.alike}) {
      for (const auto& [pair, count] : *pairs) {
        if (pair.first != id) continue;
        instead += fmt::format("{}{} x {}{}", instead.empty() ? "" : ", ", count, pair.second,
                               pairs == &report.alike ? " (the same here)" : "");
      }
    }
    const std::string row = fmt::format("  {:<34} {:>7} {:>7} {:>9} {:>9}  {}", id, tally.trials, tally.named,
                                        tally.in_class, tally.left_out, instead);
    text += (!tally.is_named() ? red(row) : row) + "\n";
  }
  return text;
}

}  // namespace

std::string format_self_test(const SelfTestReport& report) {
  std::string text;
  for (const std::string& line : report.data) text += fmt::format("{:<12} {}\n", "data", line);
  text += "\n" + matrix_text(report) + "\n";
  text += fmt::format(
      "single faults: {} of {} trials named first ({:.1f}%), {} more in a class of faults that do the same "
      "there "
      "({:.1f}% in all); {} left out, where the fault changes no more than rounding does\n",
      report.named(), report.trials(), percent(report.named(), report.trials()), report.in_class(),
      percent(report.named() + report.in_class(), report.trials()), report.left_out());
  text +=
      fmt::format("sound engines: a fault claimed in {} of {} trials, and neither fine nor explained in {}\n",
                  report.sound_claimed, report.sound_trials, report.sound_unexplained);
  for (const std::string& claim : report.claimed) text += red(fmt::format("  claimed: {}\n", claim));
  text += fmt::format("pairs: {} of {} named first, {} in the first two; {} left out\n", report.pairs_first,
                      report.pair_trials, report.pairs_top_two, report.pairs_left_out);
  for (const auto& [pair, count] : report.confusion) {
    if (pair.first.find(" + ") != std::string::npos)
      text += fmt::format("  {}: named {}\n", pair.first, pair.second);
  }
  text += fmt::format("{:.0f} s\n", report.seconds);
  return text + (report.passes() ? bold(green("self-test: passed")) +
                                       ": every fault named in 95% of its trials, none claimed on sound "
                                       "engines\n"
                                 : bold(red("self-test: failed")) + "\n");
}

std::string self_test_json(const SelfTestReport& report) {
  using Json = nlohmann::ordered_json;
  Json json = {{"passes", report.passes()},
               {"data", report.data},
               {"seconds", report.seconds},
               {"single",
                {{"trials", report.trials()},
                 {"named", report.named()},
                 {"in_class", report.in_class()},
                 {"left_out", report.left_out()}}},
               {"sound",
                {{"trials", report.sound_trials},
                 {"claimed", report.sound_claimed},
                 {"unexplained", report.sound_unexplained}}},
               {"pairs",
                {{"trials", report.pair_trials},
                 {"first", report.pairs_first},
                 {"top_two", report.pairs_top_two},
                 {"left_out", report.pairs_left_out}}}};
  for (const auto& [id, tally] : report.faults) {
    json["faults"][id] = {{"trials", tally.trials},
                          {"named", tally.named},
                          {"in_class", tally.in_class},
                          {"left_out", tally.left_out}};
  }
  json["confusion"] = Json::array();
  for (const auto& [pair, count] : report.confusion) {
    json["confusion"].push_back({{"planted", pair.first}, {"named", pair.second}, {"trials", count}});
  }
  return json.dump(2) + "\n";
}

}  // namespace fourfold
