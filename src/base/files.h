// Whole files: read with a limit, written under their name only when complete.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace fourfold {

/// Throws Error when `path` is not a regular file, can't be read, or holds more than `limit` bytes.
std::string read_file(const std::filesystem::path& path, int64_t limit);

/// Writes a sibling and renames it: readers see the old content or the new one, never a part. What is no
/// regular file (a pipe, /dev/stdout) is written in place; a symbolic link keeps pointing where it does.
void write_file(const std::filesystem::path& path, std::string_view content);

/// Throws Error when write_file() could not create `path`: for the start of work whose report goes there.
void require_creatable(const std::filesystem::path& path);

/// Throws Error unless `path` is a regular file; says what it is instead. Returns its size.
int64_t require_regular_file(const std::filesystem::path& path);

/// Throws Error when the machine has less memory available than `bytes`. `what` names what wants it, and its
/// remedy.
void require_memory(int64_t bytes, const std::string& what);

/// A file that appears under its name at commit(), whole; without it nothing is left behind. Writes may come
/// from any thread. Throws Error naming the file when the system refuses.
class PartialFile {
 public:
  explicit PartialFile(std::filesystem::path path);
  ~PartialFile();
  PartialFile(const PartialFile&) = delete;
  PartialFile& operator=(const PartialFile&) = delete;

  void write_at(std::span<const std::byte> data, int64_t offset);
  void commit();

 private:
  std::filesystem::path path_, partial_path_;
  int descriptor_ = -1;
};

}  // namespace fourfold
