#include "tools/number_list.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <set>
#include <string_view>

namespace fourfold {
namespace {

int64_t parse_index(std::string_view text, const std::string& option) {
  int64_t value = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0) {
    throw CLI::ValidationError(option,
                               fmt::format("expected numbers and ranges such as 0,3,8-11, found '{}'", text));
  }
  return value;
}

}  // namespace

std::vector<int64_t> parse_list(const std::string& text, const std::string& option) {
  constexpr int64_t kMost = 1 << 20;
  std::set<int64_t> numbers;
  // An empty text is no list; an empty part of one is an error.
  for (size_t begin = 0; !text.empty() && begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const std::string_view part = std::string_view(text).substr(begin, end - begin);
    const size_t dash = part.find('-');
    const int64_t first = parse_index(part.substr(0, dash), option);
    const int64_t last = dash == std::string_view::npos ? first : parse_index(part.substr(dash + 1), option);
    if (last < first || last >= kMost) {
      throw CLI::ValidationError(option,
                                 fmt::format("expected ascending ranges below {}, found '{}'", kMost, part));
    }
    for (int64_t number = first; number <= last; ++number) numbers.insert(number);
    begin = end + 1;
  }
  return {numbers.begin(), numbers.end()};
}

std::string format_list(const std::vector<int64_t>& numbers) {
  std::string text;
  for (size_t begin = 0; begin < numbers.size();) {
    size_t end = begin;
    while (end + 1 < numbers.size() && numbers[end + 1] == numbers[end] + 1) ++end;
    text += fmt::format("{}{}", text.empty() ? "" : ", ", numbers[begin]);
    if (end > begin) text += fmt::format("-{}", numbers[end]);
    begin = end + 1;
  }
  return text.empty() ? "none" : text;
}

}  // namespace fourfold
