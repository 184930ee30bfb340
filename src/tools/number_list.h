// Lists of layers and experts, on the command line and in reports.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fourfold {

/// "0,3,8-11" -> ascending numbers, each once. Throws CLI::ValidationError naming `option`.
std::vector<int64_t> parse_list(const std::string& text, const std::string& option);

/// Ascending numbers -> "0, 3, 8-11"; "none" for none.
std::string format_list(const std::vector<int64_t>& numbers);

}  // namespace fourfold
