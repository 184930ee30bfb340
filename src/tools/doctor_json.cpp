// The doctor's report as JSON, and whether it is good; docs/inspect.md is the schema.
#include <algorithm>
#include <nlohmann/json.hpp>

#include "tools/doctor.h"

namespace fourfold {
namespace {

using Json = nlohmann::ordered_json;

Json text_or_null(std::string_view text) {
  return text.empty() ? Json(nullptr) : Json(text);
}

/// {label: [text, ...]}: a fact without a label goes on with the one before.
Json machine_json(const Facts& facts) {
  Json json = Json::object();
  std::string last;
  for (const auto& [label, text] : facts) {
    if (!label.empty()) last = label;
    json[last].push_back(text);
  }
  return json;
}

Json choice_json(const DoctorChoice& choice) {
  return {{"activations", text_or_null(choice.task)},
          {"backend", text_or_null(choice.backend)},
          {"reason", text_or_null(choice.reason)},
          {"kernel", text_or_null(choice.kernel)},
          {"trouble", text_or_null(choice.trouble)}};
}

Json layer_json(const DoctorLayer& layer) {
  Json json = {{"model", layer.model}, {"layer", layer.layer}, {"trouble", text_or_null(layer.trouble)}};
  if (!layer.trouble.empty()) return json;
  json["scheme"] = layer.scheme;
  json["experts"] = layer.config.experts;
  json["hidden"] = layer.config.hidden;
  json["intermediate"] = layer.config.intermediate;
  for (const DoctorChoice& choice : layer.choices) json["choices"].push_back(choice_json(choice));
  return json;
}

Json self_test_json(const SelfTest& test) {
  return {{"backend", test.backend},
          {"activations", to_string(test.activations)},
          {"kernel", text_or_null(test.kernel)},
          {"right", test.is_fine},
          {"seconds", test.seconds},
          {"trouble", text_or_null(test.trouble)}};
}

}  // namespace

bool is_fine(const DoctorReport& report) {
  const auto works = [](const DoctorChoice& choice) { return choice.trouble.empty(); };
  if (!works(report.chosen) || !report.isa_trouble.empty()) return false;
  if (report.layer && (!report.layer->trouble.empty() ||
                       !std::all_of(report.layer->choices.begin(), report.layer->choices.end(), works))) {
    return false;
  }
  return std::all_of(report.self_tests.begin(), report.self_tests.end(),
                     [](const SelfTest& test) { return test.is_fine; });
}

std::string format_doctor_json(const DoctorReport& report) {
  Json json = {{"version", FOURFOLD_VERSION},
               {"verdict", is_fine(report) ? "fine" : "trouble"},
               {"machine", machine_json(report.machine)},
               {"chosen", choice_json(report.chosen)},
               {"isa_trouble", text_or_null(report.isa_trouble)},
               {"layer", report.layer ? layer_json(*report.layer) : Json(nullptr)},
               {"self_tests", Json::array()}};
  for (const SelfTest& test : report.self_tests) json["self_tests"].push_back(self_test_json(test));
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace fourfold
