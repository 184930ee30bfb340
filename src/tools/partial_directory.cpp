#include "tools/partial_directory.h"

#include <signal.h>  // NOLINT(modernize-deprecated-headers): kill() is POSIX's
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <string_view>
#include <system_error>
#include <vector>

#include "base/fail.h"

namespace fourfold {
namespace {

constexpr std::string_view kPrefix = ".partial-";

/// Leftovers of runs that were killed.
void remove_abandoned(const std::filesystem::path& parent) {
  std::error_code error;
  std::vector<std::filesystem::path> abandoned;
  for (const auto& entry : std::filesystem::directory_iterator(parent, error)) {
    const std::string name = entry.path().filename().string();
    pid_t owner = 0;
    if (!name.starts_with(kPrefix)) continue;
    const char* digits = name.data() + kPrefix.size();
    const auto parsed = std::from_chars(digits, name.data() + name.size(), owner);
    if (parsed.ec == std::errc() && owner > 0 && kill(owner, 0) != 0 && errno == ESRCH) {
      abandoned.push_back(entry.path());
    }
  }
  for (const auto& path : abandoned) std::filesystem::remove_all(path, error);
}

}  // namespace

PartialDirectory::PartialDirectory(const std::filesystem::path& parent)
    : path_(parent / fmt::format("{}{}", kPrefix, getpid())) {
  std::error_code error;
  remove_abandoned(parent);
  std::filesystem::create_directories(path_, error);
  if (error) fail(ErrorCode::kIo, "{}: can't create it: {}", path_.string(), error.message());
}

PartialDirectory::~PartialDirectory() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

void PartialDirectory::move_into_place(const std::string& name, const std::filesystem::path& parent) const {
  std::error_code error;
  if (std::filesystem::exists(parent / name)) {
    std::filesystem::rename(parent / name, path_ / ("replaced-" + name), error);
  }
  if (!error) std::filesystem::rename(path_ / name, parent / name, error);
  if (error) fail(ErrorCode::kIo, "{}: can't write it: {}", (parent / name).string(), error.message());
}

}  // namespace fourfold
