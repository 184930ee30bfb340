// Throwing fourfold::Error with a formatted message.
#pragma once

#include <fmt/format.h>

#include <string>
#include <string_view>

#include "fourfold/error.h"

namespace fourfold::python {

/// The caller's mistake: what was wrong, what was expected, what was found.
[[noreturn]] inline void reject(std::string_view what, std::string_view expected, std::string_view found) {
  throw Error(ErrorCode::kInvalidArgument, fmt::format("{}: expected {}, found {}", what, expected, found));
}

/// The value that `parse` gives for `text`; throws Error naming `what` and the names that it knows.
template <class Parse>
auto parse_name(std::string_view what, std::string_view text, Parse parse, std::string_view known) {
  const auto value = parse(text);
  if (!value) reject(what, known, fmt::format("'{}'", text));
  return *value;
}

}  // namespace fourfold::python
