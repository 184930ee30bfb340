#include "base/files.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <system_error>

#include "base/fail.h"

namespace fourfold {

int64_t require_regular_file(const std::filesystem::path& path) {
  std::error_code error;
  const std::filesystem::file_status status = std::filesystem::status(path, error);
  if (status.type() == std::filesystem::file_type::not_found) {
    fail(ErrorCode::kNotFound, "{}: expected a file, found nothing of that name", path.string());
  }
  if (error) fail(ErrorCode::kIo, "{}: {}", path.string(), error.message());
  if (status.type() != std::filesystem::file_type::regular) {
    fail(ErrorCode::kBadFile, "{}: expected a regular file, found {}", path.string(),
         status.type() == std::filesystem::file_type::directory ? "a directory" : "a special file");
  }
  const auto size = std::filesystem::file_size(path, error);
  if (error) fail(ErrorCode::kIo, "{}: {}", path.string(), error.message());
  return static_cast<int64_t>(size);
}

std::string read_file(const std::filesystem::path& path, int64_t limit) {
  const int64_t size = require_regular_file(path);
  if (size > limit) {
    fail(ErrorCode::kBadFile, "{}: expected at most {} bytes, found {}", path.string(), limit, size);
  }
  std::string content(static_cast<size_t>(size), '\0');
  std::ifstream file(path, std::ios::binary);
  if (!file.read(content.data(), size)) {
    fail(ErrorCode::kIo, "{}: can't read it: {}", path.string(), std::strerror(errno));
  }
  return content;
}

std::filesystem::path partial_path_of(const std::filesystem::path& path) {
  return path.parent_path() / fmt::format(".{}.partial-{}", path.filename().string(), getpid());
}

void write_file(const std::filesystem::path& path, std::string_view content) {
  const std::filesystem::path partial = partial_path_of(path);
  std::ofstream file(partial, std::ios::binary | std::ios::trunc);
  file.write(content.data(), static_cast<std::streamsize>(content.size()));
  file.close();
  std::error_code error;
  if (file) {
    std::filesystem::rename(partial, path, error);
    if (!error) return;
  }
  const std::string reason = error ? error.message() : std::strerror(errno);
  std::filesystem::remove(partial, error);
  fail(ErrorCode::kIo, "{}: can't write it: {}", path.string(), reason);
}

}  // namespace fourfold
