// Numbers in reports.
#pragma once

#include <cmath>
#include <nlohmann/json.hpp>

namespace fourfold {

/// JSON has no NaN and no infinity: they are the strings "nan", "inf" and "-inf".
inline nlohmann::ordered_json json_number(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  return value;
}

}  // namespace fourfold
