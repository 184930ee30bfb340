// Arrays of Python's frameworks, by DLPack or the buffer protocol, as views of the library. Nothing is
// copied: a layout that a view can't express is an error that says what to do.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "fourfold/tensor.h"

namespace fourfold::python {

namespace nb = nanobind;

using Array = nb::ndarray<nb::ro>;
using WritableArray = nb::ndarray<>;

/// What an element is. Frameworks without a type of that kind pass unsigned integers of the same size.
enum class Element : uint8_t { kByte, kBf16, kF16, kF32, kI32, kI64 };

/// An array of up to three dimensions, not owned.
struct ArrayView {
  std::string name;  ///< for messages
  std::byte* data = nullptr;
  nb::dlpack::dtype type;
  Device device;
  std::vector<int64_t> shape, strides;  ///< strides in elements

  /// e.g. "float32 [3, 4] on cuda:0"
  std::string describe() const;
  /// Throws Error for any other number of dimensions.
  void require_dimensions(size_t count) const;
  void require_shape(const std::vector<int64_t>& expected) const;
  /// Throws Error unless its elements are of that kind.
  void require(Element element) const;
  bool is(Element element) const;
  /// [D, ...] -> [...], number `index`.
  ArrayView slice(int64_t index) const;
};

/// Throws Error for memory that is neither the host's nor a CUDA device's.
ArrayView view_of(const Array& array, std::string name);
ArrayView view_of(const WritableArray& array, std::string name);

/// [rows, cols] with elements of a row side by side; rows may lie apart. Throws Error otherwise, and for
/// elements of another kind.
MatrixView<Bf16> bf16_matrix(const ArrayView& array);
MatrixView<float> f32_matrix(const ArrayView& array);
MatrixView<uint8_t> byte_matrix(const ArrayView& array);
MatrixView<int32_t> i32_matrix(const ArrayView& array);
MatrixView<int64_t> i64_matrix(const ArrayView& array);
/// bf16, float16 or float32; a vector counts as one row.
DenseView dense_matrix(const ArrayView& array);

/// One dimension without gaps.
std::span<float> f32_vector(const ArrayView& array);
std::span<int32_t> i32_vector(const ArrayView& array);
/// Any number of dimensions without gaps.
std::span<uint8_t> bytes(const ArrayView& array);

/// Keeps Python's arrays alive for as long as the result; they are let go of with the GIL held, on whatever
/// thread that happens.
std::shared_ptr<const void> keep_alive(std::vector<Array> arrays);

}  // namespace fourfold::python
