// JSON from files that may be damaged or hostile.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include <string>
#include <string_view>

namespace fourfold {

/// Parses `text`; throws Error naming `source` for syntax errors, duplicate keys and nesting deeper than 64.
nlohmann::json parse_strict_json(std::string_view text, const std::string& source);

/// The string that `object` has under `key`; empty where it has none, or something else.
std::string string_in(const nlohmann::json& object, const char* key);

}  // namespace fourfold
