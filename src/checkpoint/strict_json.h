// JSON from files that may be damaged or hostile.
#pragma once

#include <nlohmann/json.hpp>

#include <string>
#include <string_view>

namespace fourfold {

/// Parses `text`; throws Error naming `source` for syntax errors, duplicate keys and nesting deeper than 64.
nlohmann::json parse_strict_json(std::string_view text, const std::string& source);

}  // namespace fourfold
