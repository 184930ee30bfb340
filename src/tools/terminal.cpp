#include "tools/terminal.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

namespace fourfold {
namespace {

std::string coloured(std::string_view text, const char* code) {
  static const bool wanted = isatty(STDOUT_FILENO) && std::getenv("NO_COLOR") == nullptr;
  return wanted ? fmt::format("\033[{}m{}\033[0m", code, text) : std::string(text);
}

bool shows_progress() {
  static const bool terminal = isatty(STDERR_FILENO);
  return terminal;
}

/// Bytes of the UTF-8 character at the start of `text`; 0 where there is none, or a control character (C0,
/// DEL, C1).
size_t printable_length(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(0);
  if (first < 0x80) return first >= 0x20 && first != 0x7F;
  const size_t length = first >= 0xF0 && first < 0xF5 ? 4 : first >= 0xE0 ? 3 : first >= 0xC2 ? 2 : 0;
  if (length == 0 || first >= 0xF5 || text.size() < length) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return 0;
  }
  const bool c1 = first == 0xC2 && byte(1) < 0xA0;
  const bool overlong = (first == 0xE0 && byte(1) < 0xA0) || (first == 0xF0 && byte(1) < 0x90);
  const bool surrogate_or_beyond = (first == 0xED && byte(1) >= 0xA0) || (first == 0xF4 && byte(1) >= 0x90);
  return c1 || overlong || surrogate_or_beyond ? 0 : length;
}

}  // namespace

std::string printable(std::string_view text, size_t most_bytes) {
  std::string safe;
  while (!text.empty() && safe.size() < most_bytes) {
    const size_t length = printable_length(text);
    safe += length > 0 ? std::string(text.substr(0, length))
                       : fmt::format("\\x{:02x}", static_cast<unsigned char>(text[0]));
    text.remove_prefix(length > 0 ? length : 1);
  }
  return text.empty() ? safe : safe + " ...";
}

std::string red(std::string_view text) {
  return coloured(text, "31");
}
std::string green(std::string_view text) {
  return coloured(text, "32");
}
std::string bold(std::string_view text) {
  return coloured(text, "1");
}

void Progress::show(std::string_view what) const {
  if (shows_progress()) fmt::print(stderr, "\r\033[K{} ...", what);
}

void Progress::clear() const {
  if (shows_progress()) fmt::print(stderr, "\r\033[K");
}

}  // namespace fourfold
