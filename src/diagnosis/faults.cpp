#include "diagnosis/faults.h"

#include <fmt/format.h>

#include <array>

#include "diagnosis/fault_list.h"
#include "fourfold/number_formats.h"

namespace fourfold::diagnosis {
namespace {

constexpr std::string_view kWrongCode = "e2m1-code-";

}  // namespace

std::string_view to_string(FaultPlace place) {
  constexpr std::array<std::string_view, 6> kNames = {"weights", "staging", "activation",
                                                      "routing", "experts", "combine"};
  return kNames[static_cast<size_t>(place)];
}

std::vector<Fault> known_faults(const Subject& subject) {
  std::vector<Fault> faults;
  add_weight_faults(subject, faults);
  add_stage_faults(subject, faults);
  add_routing_faults(subject, faults);
  return faults;
}

Fault wrong_code_fault(int code, float value) {
  Fault fault;
  fault.id = fmt::format("{}{}-as-{}", kWrongCode, code, value);
  fault.sentence = fmt::format("e2m1's code {} is decoded as {} instead of {}", code, value,
                               decode_e2m1(static_cast<uint8_t>(code)));
  fault.remedy = "the e2m1 table: 0, 0.5, 1, 1.5, 2, 3, 4, 6";
  fault.place = FaultPlace::kWeights;
  fault.code = code;
  fault.value = value;
  fault.apply = [](Deviation& d, const Fault& f) {
    for (WeightReading* reading : {&d.first.reading, &d.down}) {
      reading->wrong_code = f.code;
      reading->wrong_value = f.value;
    }
  };
  return fault;
}

bool is_wrong_code(const Fault& fault) {
  return fault.id.starts_with(kWrongCode);
}

std::vector<float> wrong_values_of(int code) {
  std::vector<float> values;
  for (const float value : {0.0f, 0.25f, 0.5f, 0.75f, 1.0f, 1.25f, 1.5f, 1.75f, 2.0f, 2.5f, 3.0f, 3.5f, 4.0f,
                            4.5f, 5.0f, 6.0f, 7.0f, 8.0f}) {
    if (value != decode_e2m1(static_cast<uint8_t>(code))) values.push_back(value);
  }
  return values;
}

bool can_be_combined(const Fault& a, const Fault& b) {
  Deviation ab, ba, only_a, only_b;
  a.apply_to(ab);
  b.apply_to(ab);
  b.apply_to(ba);
  a.apply_to(ba);
  a.apply_to(only_a);
  b.apply_to(only_b);
  return ab == ba && !(ab == only_a) && !(ab == only_b);
}

}  // namespace fourfold::diagnosis
