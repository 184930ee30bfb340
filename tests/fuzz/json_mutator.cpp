#include "json_mutator.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <utility>
#include <vector>

#include "fuzz_target.h"

namespace fourfold::fuzz {
namespace {

using Json = nlohmann::ordered_json;

size_t below(std::minstd_rand& random, size_t count) {
  return random() % count;
}

/// Values at which readers break: ends of integer types, products that overflow, wrong types.
Json interesting_value(std::minstd_rand& random) {
  static const std::vector<Json> kValues = {
      0,
      1,
      2,
      -1,
      15,
      16,
      17,
      128,
      0.5,
      -0.0,
      1e308,
      1e-320,
      int64_t{1} << 31,
      (int64_t{1} << 31) - 1,
      int64_t{1} << 32,
      int64_t{1} << 53,
      INT64_MAX,
      INT64_MIN,
      UINT64_MAX,
      uint64_t{1} << 63,
      nullptr,
      true,
      false,
      "",
      "F8_E4M3",
      "BF16",
      "U8",
      "F4",
      "../../etc/passwd",
      "/dev/zero",
      std::string(300, 'x'),
      std::string("a\0b", 3),
      "\xff\xfe",
      Json::array(),
      Json::object(),
      Json::array({Json::array({Json::array({1})})}),
      Json::array({0, 0, 0, 0, 0, 0, 0, 0, 0}),
  };
  return kValues[below(random, kValues.size())];
}

/// All values of a document.
void collect(Json& value, std::vector<Json*>& out) {
  out.push_back(&value);
  if (!value.is_structured()) return;
  for (auto& child : value) collect(child, out);
}

void change_number(Json& value, std::minstd_rand& random) {
  const auto number = value.get<int64_t>();
  const std::array<int64_t, 8> deltas = {1, -1, 2, -2, 8, 16, -16, 4096};
  const size_t choice = below(random, deltas.size() + 2);
  const auto wrapped = static_cast<uint64_t>(number);
  if (choice < deltas.size()) {
    value = static_cast<int64_t>(wrapped + static_cast<uint64_t>(deltas[choice]));
  } else {
    value = choice == deltas.size() ? static_cast<int64_t>(wrapped * 2) : number / 2;
  }
}

void change_text(Json& value, std::minstd_rand& random) {
  auto text = value.get<std::string>();
  const size_t at = text.empty() ? 0 : below(random, text.size());
  switch (below(random, 4)) {
    case 0:
      text.insert(at, 1, static_cast<char>(below(random, 128)));
      break;
    case 1:
      if (!text.empty()) text.erase(at, 1 + below(random, 4));
      break;
    case 2:
      if (!text.empty()) text[at] = static_cast<char>(text[at] ^ (1 << below(random, 7)));
      break;
    default:
      text += text;
  }
  value = text.substr(0, 1000);
}

void change_structure(Json& value, std::minstd_rand& random) {
  if (value.empty()) {
    if (value.is_array()) {
      value.push_back(interesting_value(random));
    } else {
      value["key"] = interesting_value(random);
    }
    return;
  }
  auto at = value.begin();
  std::advance(at, static_cast<std::ptrdiff_t>(below(random, value.size())));
  const size_t choice = below(random, 3);
  if (choice == 0) {
    value.erase(at);
  } else if (value.is_array()) {
    Json copy = *at;
    value.push_back(std::move(copy));
  } else {
    Json copy = *at;
    const std::string key = choice == 1 ? at.key() + "2" : at.key().substr(0, at.key().size() / 2);
    value[key] = std::move(copy);
  }
}

}  // namespace

void mutate_value(Json& value, std::minstd_rand& random) {
  std::vector<Json*> values;
  collect(value, values);
  Json& chosen = *values[below(random, values.size())];
  const size_t choice = below(random, 8);
  const bool changes = chosen.is_number_integer() || chosen.is_string() || chosen.is_structured();
  if (choice == 0 || (choice > 1 && !changes)) {
    chosen = interesting_value(random);
  } else if (choice == 1) {
    Json copy = *values[below(random, values.size())];  // which may hold what it replaces
    chosen = std::move(copy);
  } else if (chosen.is_number_integer()) {
    change_number(chosen, random);
  } else if (chosen.is_string()) {
    change_text(chosen, random);
  } else {
    change_structure(chosen, random);
  }
}

std::string mutate_json(std::string_view text, std::minstd_rand& random) {
  Json json = Json::parse(text.begin(), text.end(), nullptr, false);
  if (json.is_discarded()) return std::string(text);
  for (size_t change = 0; change <= below(random, 4); ++change) mutate_value(json, random);
  std::string out = json.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (below(random, 16) == 0 && out.size() > 2 && json.is_object() && !json.empty()) {
    out.insert(1, out.substr(1, out.size() - 2) + ",");  // every key twice
  }
  return out;
}

size_t mutate_json_input(uint8_t* data, size_t size, size_t max_size, unsigned int seed) {
  std::minstd_rand random(seed);
  if (below(random, 4) != 0) {
    const std::string text = mutate_json({reinterpret_cast<const char*>(data), size}, random);
    if (text.size() <= max_size && text != std::string_view(reinterpret_cast<const char*>(data), size)) {
      std::copy(text.begin(), text.end(), data);
      return text.size();
    }
  }
  return LLVMFuzzerMutate(data, size, max_size);
}

}  // namespace fourfold::fuzz
