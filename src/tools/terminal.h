// Colour and progress, on a terminal alone.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace fourfold {

/// Text in colour where stdout is a terminal that wants it (NO_COLOR unset), else as it is.
std::string red(std::string_view text);
std::string green(std::string_view text);
std::string bold(std::string_view text);

/// Text from files as a terminal may have it: control characters and bytes that are not UTF-8 made visible,
/// and an end.
std::string printable(std::string_view text, size_t most_bytes = 2000);

/// As many bytes of one text from files stand on a line of a report.
inline constexpr size_t kReportLineBytes = 1000;

/// One line on stderr that says what is being done; nothing where stderr is no terminal.
class Progress {
 public:
  ~Progress() { clear(); }
  void show(std::string_view what) const;
  void clear() const;
};

}  // namespace fourfold
