// What the fuzzers share. A target takes any bytes: it may throw fourfold::Error, and nothing else may
// happen.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>
#include <string_view>

#include "fourfold/error.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
/// libFuzzer's own mutations, for custom mutators to fall back on. Returns the new size.
extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace fourfold::fuzz {

/// Numbers from fuzzed bytes; zeros once they are used up.
class ByteSource {
 public:
  ByteSource(const uint8_t* data, size_t size) : data_(data, size) {}

  bool is_empty() const { return data_.empty(); }

  uint8_t byte() {
    if (data_.empty()) return 0;
    const uint8_t value = data_.front();
    data_ = data_.subspan(1);
    return value;
  }
  /// 0 to count - 1.
  size_t below(size_t count) { return count <= 256 ? byte() % count : (byte() * 256u + byte()) % count; }
  bool one_in(size_t count) { return below(count) == 1; }

  template <class Container>
  const auto& pick(const Container& container) {
    return container[below(std::size(container))];
  }

 private:
  std::span<const uint8_t> data_;
};

/// Aborts, for libFuzzer to see, where something that must hold does not.
inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "does not hold: %s\n", what);
  std::abort();
}

/// A directory of this process, in memory where the system has such a file system; gone at exit.
inline const std::filesystem::path& scratch_directory() {
  static const std::filesystem::path directory = [] {
    std::error_code error;
    const bool has_memory = std::filesystem::is_directory("/dev/shm", error);
    std::string name =
        (has_memory ? std::filesystem::path("/dev/shm") : std::filesystem::temp_directory_path()) /
        "fourfold-fuzz-XXXXXX";
    require(mkdtemp(name.data()) != nullptr, "a scratch directory can be made");
    static const std::filesystem::path made = name;
    std::atexit([] { std::filesystem::remove_all(made); });
    return made;
  }();
  return directory;
}

inline void write_in_place(const std::filesystem::path& path, std::string_view content) {
  std::ofstream(path, std::ios::binary | std::ios::trunc)
      .write(content.data(), static_cast<std::streamsize>(content.size()));
}

}  // namespace fourfold::fuzz
