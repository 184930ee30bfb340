// Views of tensors that somebody else owns, and the one owner of raw bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <variant>

#include "fourfold/export.h"
#include "fourfold/number_formats.h"

namespace FOURFOLD_EXPORT fourfold {

/// Where bytes live.
struct Device {
  enum class Kind : uint8_t { kHost, kCuda };
  Kind kind = Kind::kHost;
  int index = 0;

  static constexpr Device host() { return {}; }
  static constexpr Device cuda(int index) { return {Kind::kCuda, index}; }
  friend constexpr bool operator==(Device, Device) = default;
};

/// A row-major matrix that is not owned. `stride` counts elements from one row's start to the next.
template <class T>
struct MatrixView {
  T* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;
  Device device = {};

  constexpr MatrixView() = default;
  constexpr MatrixView(T* data_, int64_t rows_, int64_t cols_) : MatrixView(data_, rows_, cols_, cols_) {}
  constexpr MatrixView(T* data_, int64_t rows_, int64_t cols_, int64_t stride_, Device device_ = {})
      : data(data_), rows(rows_), cols(cols_), stride(stride_), device(device_) {}
  /// A view of mutable elements is also a view of constant ones.
  template <class Mutable>
  requires(std::is_same_v<const Mutable, T>) constexpr MatrixView(const MatrixView<Mutable>& other)  // NOLINT
      : MatrixView(other.data, other.rows, other.cols, other.stride, other.device) {}

  constexpr bool empty() const { return data == nullptr; }
  constexpr T* row(int64_t r) const { return data + r * stride; }
  constexpr T& operator()(int64_t r, int64_t c) const { return data[r * stride + c]; }
  constexpr MatrixView rows_from(int64_t first, int64_t count) const {
    return {data + first * stride, count, cols, stride, device};
  }
  constexpr MatrixView cols_from(int64_t first, int64_t count) const {
    return {data + first, rows, count, stride, device};
  }
};

/// Element type of an unquantized tensor.
enum class ElementType : uint8_t { kBf16, kF16, kF32 };

/// An unquantized matrix whose element type is known at run time. Elements may lie at any address.
struct DenseView {
  ElementType type = ElementType::kBf16;
  const std::byte* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_stride_bytes = 0;
  Device device = {};
};

/// Decodes row `row` into `out` [cols]. Host views only. Exact for every type.
void decode_row(const DenseView& matrix, int64_t row, float* out);

/// Move-only owner of bytes, 64-byte aligned. Device memory comes with the deleter of the room that allocated
/// it.
class Buffer {
 public:
  Buffer() = default;
  /// Uninitialised host bytes. Throws std::bad_alloc.
  explicit Buffer(size_t bytes);
  Buffer(void* data, size_t bytes, Device device, void (*deleter)(void*))
      : data_(static_cast<std::byte*>(data), deleter), bytes_(bytes), device_(device) {}

  std::byte* data() const { return data_.get(); }
  size_t bytes() const { return bytes_; }
  Device device() const { return device_; }

 private:
  std::unique_ptr<std::byte, void (*)(void*)> data_{nullptr, nullptr};
  size_t bytes_ = 0;
  Device device_ = {};
};

}  // namespace fourfold
