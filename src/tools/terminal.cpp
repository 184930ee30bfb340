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

}  // namespace

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
