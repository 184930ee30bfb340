// Throwing fourfold::Error with a formatted message. Host code alone: fmt does not compile under nvcc.
#pragma once

#include <fmt/format.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <string>
#include <utility>

#include "fourfold/error.h"

namespace fourfold {

template <class... Args>
[[noreturn]] void fail(ErrorCode code, fmt::format_string<Args...> format, Args&&... args) {
  throw Error(code, fmt::format(format, std::forward<Args>(args)...));
}

/// The caller's mistake: what was wrong, what was expected, what was found.
template <class Expected, class Found>
[[noreturn]] void reject(const std::string& what, const Expected& expected, const Found& found) {
  fail(ErrorCode::kInvalidArgument, "{}: expected {}, found {}", what, expected, found);
}

/// The system's refusal, as errno has it. `action`: what could not be done, a verb.
[[noreturn]] inline void fail_io(const std::filesystem::path& path, const char* action) {
  fail(ErrorCode::kIo, "{}: can't {} it: {}", path.string(), action, std::strerror(errno));
}

inline std::string shape_text(int64_t rows, int64_t cols) {
  return fmt::format("[{}, {}]", rows, cols);
}

}  // namespace fourfold
