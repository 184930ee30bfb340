// Memory for weights: large pages, and no page touched before its first writer touches it.
#pragma once

#include <cstddef>

namespace fourfold::cpu {

/// Move-only owner of zeroed bytes at a multiple of 2 MB. Asks for large pages: with 4 KB pages reading is
/// about 40% slower.
class HugeBuffer {
 public:
  HugeBuffer() = default;
  /// Throws std::bad_alloc.
  explicit HugeBuffer(size_t bytes);
  HugeBuffer(HugeBuffer&& other) noexcept;
  HugeBuffer& operator=(HugeBuffer&& other) noexcept;
  ~HugeBuffer();

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* mapping_ = nullptr;
  size_t mapped_bytes_ = 0;
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace fourfold::cpu
