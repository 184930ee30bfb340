// Activations and routers as users write them: a name and parameters.
#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <map>
#include <vector>

#include "base/fail.h"
#include "checkpoint/router_scores.h"
#include "fourfold/model_family.h"

namespace fourfold {
namespace {

constexpr std::array<std::pair<std::string_view, ActivationKind>, 7> kActivations = {{
    {"swiglu", ActivationKind::kSwiglu},
    {"swiglu-step", ActivationKind::kSwigluStep},
    {"geglu", ActivationKind::kGeglu},
    {"geglu-tanh", ActivationKind::kGegluTanh},
    {"relu2", ActivationKind::kReluSquared},
    {"silu", ActivationKind::kSilu},
    {"gelu", ActivationKind::kGelu},
}};

/// "name,key=value,..." -> the name and its parameters.
struct Parameters {
  std::string_view name;
  std::map<std::string_view, std::string_view> values;
};

Parameters split_parameters(std::string_view text, const std::string& what) {
  Parameters parameters;
  parameters.name = text.substr(0, text.find(','));
  for (size_t begin = parameters.name.size(); begin < text.size();) {
    const size_t end = std::min(text.find(',', begin + 1), text.size());
    const std::string_view part = text.substr(begin + 1, end - begin - 1);
    const size_t equals = part.find('=');
    if (equals == std::string_view::npos || equals == 0) reject(what, "key=value after the name", part);
    if (!parameters.values.emplace(part.substr(0, equals), part.substr(equals + 1)).second) {
      reject(what, "each parameter once", part);
    }
    begin = end;
  }
  return parameters;
}

template <class Number>
Number parse_number(std::string_view key, std::string_view text, const std::string& what) {
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool whole = error == std::errc() && end == text.data() + text.size();
  if (!whole || !std::isfinite(static_cast<double>(value)))
    reject(what, fmt::format("a number for {}", key), text);
  return value;
}

int64_t parse_count(std::string_view key, std::string_view text, const std::string& what) {
  const auto number = parse_number<int64_t>(key, text, what);
  if (number < 1) reject(what, fmt::format("{} from 1", key), text);
  return number;
}

/// The entry of `table` called `name`.
template <class Table>
auto value_in(const Table& table, std::string_view name, const std::string& what) {
  std::vector<std::string_view> names;
  for (const auto& [entry, value] : table) {
    if (entry == name) return value;
    names.push_back(entry);
  }
  reject(what, fmt::format("one of {}", fmt::join(names, ", ")), name);
}

}  // namespace

ActivationFunction parse_activation(std::string_view text) {
  const std::string what = fmt::format("activation '{}'", text);
  const Parameters parameters = split_parameters(text, what);
  ActivationFunction function;
  function.kind = value_in(kActivations, parameters.name, what);
  const bool is_swiglu = function.kind == ActivationKind::kSwiglu;
  for (const auto& [key, value] : parameters.values) {
    const auto number = parse_number<float>(key, value, what);
    if (key == "alpha" && is_swiglu) {
      function.alpha = number;
    } else if (key == "beta" && is_swiglu) {
      function.beta = number;
    } else if (key == "limit" && (is_swiglu || function.kind == ActivationKind::kSwigluStep)) {
      if (!(number > 0.0f)) reject(what, "a positive limit", value);
      function.limit = number;
    } else {
      reject(what, "alpha, beta and limit for swiglu, limit for swiglu-step, none for others", key);
    }
  }
  return function;
}

RouterConfig parse_router(std::string_view text) {
  const std::string what = fmt::format("router '{}'", text);
  const Parameters parameters = split_parameters(text, what);
  RouterConfig router;
  router.score = value_in(kRouterScores, parameters.name, what);
  for (const auto& [key, value] : parameters.values) {
    if (key == "top-k") {
      router.top_k = parse_count(key, value, what);
    } else if (key == "groups") {
      router.groups = parse_count(key, value, what);
    } else if (key == "top-groups") {
      router.top_groups = parse_count(key, value, what);
    } else if (key == "scale") {
      router.scaling_factor = parse_number<float>(key, value, what);
      if (!(router.scaling_factor > 0.0f)) reject(what, "a positive scale", value);
    } else if (key == "renormalise" && (value == "yes" || value == "no")) {
      router.renormalise = value == "yes";
    } else {
      reject(what, "top-k, groups, top-groups, scale or renormalise=yes|no",
             fmt::format("{}={}", key, value));
    }
  }
  return router;
}

}  // namespace fourfold
