#include "base/files.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cinttypes>
#include <fstream>
#include <optional>
#include <system_error>
#include <utility>

#include "base/fail.h"

namespace fourfold {
namespace {

void write_in_place(const std::filesystem::path& path, std::string_view content) {
  std::ofstream file(path, std::ios::binary);
  file.write(content.data(), static_cast<std::streamsize>(content.size()));
  file.close();
  if (!file) fail_io(path, "write");
}

/// The file that a new one replaces or becomes; none where `path` is something else, which is written in
/// place.
std::optional<std::filesystem::path> replaceable_file(const std::filesystem::path& path) {
  std::error_code error;
  const auto type = std::filesystem::status(path, error).type();
  if (type == std::filesystem::file_type::not_found || type == std::filesystem::file_type::none) return path;
  if (type == std::filesystem::file_type::regular) return std::filesystem::canonical(path);
  return std::nullopt;
}

}  // namespace

int64_t require_regular_file(const std::filesystem::path& path) {
  std::error_code error;
  const std::filesystem::file_status status = std::filesystem::status(path, error);
  if (status.type() == std::filesystem::file_type::not_found) {
    const bool is_link = std::filesystem::is_symlink(path, error);
    fail(ErrorCode::kNotFound, "{}: expected a file, found {}", path.string(),
         is_link ? "a symbolic link to nothing" : "nothing of that name");
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
  if (!file.read(content.data(), size)) fail_io(path, "read");
  return content;
}

void write_file(const std::filesystem::path& path, std::string_view content) {
  const std::optional<std::filesystem::path> target = replaceable_file(path);
  if (!target) return write_in_place(path, content);
  PartialFile file(*target);
  file.write_at(std::as_bytes(std::span(content)), 0);
  file.commit();
}

void require_creatable(const std::filesystem::path& path) {
  if (const auto target = replaceable_file(path)) {
    const PartialFile dropped(*target);
  } else if (std::filesystem::is_directory(path)) {
    fail(ErrorCode::kIo, "{}: expected a file to write, found a directory", path.string());
  }
}

void require_memory(int64_t bytes, const std::string& what) {
  std::ifstream info("/proc/meminfo");
  for (std::string line; std::getline(info, line);) {
    int64_t kilobytes = 0;
    if (std::sscanf(line.c_str(), "MemAvailable: %" SCNd64 " kB", &kilobytes) != 1) continue;
    if (bytes > kilobytes * 1024) {
      fail(ErrorCode::kInvalidArgument,
           "{}: expected to fit the {} MB of memory that are available, found a need of "
           "{} MB",
           what, kilobytes / 1024, bytes >> 20);
    }
    return;
  }
}

PartialFile::PartialFile(std::filesystem::path path)
    : path_(std::move(path)),
      partial_path_(path_.parent_path() /
                    fmt::format(".{}.partial-{}", path_.filename().string(), getpid())) {
  descriptor_ = open(partial_path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (descriptor_ < 0) fail_io(path_, "create");
}

PartialFile::~PartialFile() {
  if (descriptor_ >= 0) close(descriptor_);
  std::error_code ignored;
  std::filesystem::remove(partial_path_, ignored);  // gone already after a commit
}

void PartialFile::write_at(std::span<const std::byte> data, int64_t offset) {
  // Large files start on their way to the disk at once, not when memory is full of them or at the end.
  constexpr size_t kLargePart = size_t{64} << 10;
  const int64_t begin = offset;
  const size_t size = data.size();
  while (!data.empty()) {
    const ssize_t written = pwrite(descriptor_, data.data(), data.size(), offset);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0 && errno == EFAULT) {  // bytes of a mapped file that is no longer all there
      fail(ErrorCode::kIo, "{}: can't write it: what it is written from can't be read; was that truncated?",
           path_.string());
    }
    if (written <= 0) fail_io(path_, "write");
    data = data.subspan(static_cast<size_t>(written));
    offset += written;
  }
  if (size >= kLargePart)
    sync_file_range(descriptor_, begin, static_cast<int64_t>(size), SYNC_FILE_RANGE_WRITE);
}

void PartialFile::commit() {
  if (close(std::exchange(descriptor_, -1)) != 0) fail_io(path_, "write");
  std::error_code error;
  std::filesystem::rename(partial_path_, path_, error);
  if (error) fail(ErrorCode::kIo, "{}: can't write it: {}", path_.string(), error.message());
}

}  // namespace fourfold
