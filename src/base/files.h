// Whole files: read with a limit, written under their name only when complete.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace fourfold {

/// Throws Error when `path` is not a regular file, can't be read, or holds more than `limit` bytes.
std::string read_file(const std::filesystem::path& path, int64_t limit);

/// Writes a sibling and renames it: readers see the old content or the new one, never a part.
void write_file(const std::filesystem::path& path, std::string_view content);

/// A name beside `path` that no other process uses.
std::filesystem::path partial_path_of(const std::filesystem::path& path);

/// Throws Error unless `path` is a regular file; says what it is instead. Returns its size.
int64_t require_regular_file(const std::filesystem::path& path);

}  // namespace fourfold
