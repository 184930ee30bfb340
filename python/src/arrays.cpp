#include "arrays.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <string_view>
#include <utility>

#include "failures.h"

namespace fourfold::python {
namespace {

using Code = nb::dlpack::dtype_code;

bool is_type(const nb::dlpack::dtype& type, Code code, int bits) {
  return type.code == static_cast<uint8_t>(code) && type.bits == bits && type.lanes == 1;
}

/// One byte an element: codes, scales; two e2m1 codes count as one.
bool is_byte(const nb::dlpack::dtype& type) {
  if (type.code == static_cast<uint8_t>(Code::Float4_E2M1FN)) return type.bits * type.lanes == 8;
  const bool is_float8 = type.code >= static_cast<uint8_t>(Code::Float8_E3M4) &&
                         type.code <= static_cast<uint8_t>(Code::Float8_E8M0FNU);
  return type.bits == 8 && type.lanes == 1 &&
         (is_float8 || type.code == static_cast<uint8_t>(Code::UInt) ||
          type.code == static_cast<uint8_t>(Code::Int));
}

std::string_view expected_types(Element element) {
  switch (element) {
    case Element::kByte:
      return "bytes (uint8, float8_e4m3fn, float8_e8m0fnu or float4_e2m1fn_x2)";
    case Element::kBf16:
      return "bfloat16 (or its bits as uint16)";
    case Element::kF16:
      return "float16";
    case Element::kF32:
      return "float32";
    case Element::kI32:
      return "int32";
    case Element::kI64:
      return "int64";
  }
  return "";
}

std::string type_name(const nb::dlpack::dtype& type) {
  if (type.code == static_cast<uint8_t>(Code::Float4_E2M1FN))
    return fmt::format("float4_e2m1fn_x{}", type.lanes);
  const std::pair<Code, std::string_view> prefixes[] = {
      {Code::Int, "int"},
      {Code::UInt, "uint"},
      {Code::Float, "float"},
      {Code::Bfloat, "bfloat"},
      {Code::Bool, "bool"},
      {Code::Complex, "complex"},
      {Code::Float8_E4M3FN, "float8_e4m3fn, bits "},
  };
  for (const auto& [code, prefix] : prefixes) {
    if (type.code == static_cast<uint8_t>(code)) return fmt::format("{}{}", prefix, type.bits);
  }
  return fmt::format("DLPack type {} of {} bits", type.code, type.bits);
}

Device device_of(int type, int index, const std::string& name) {
  switch (type) {
    case nb::device::none::value:
    case nb::device::cpu::value:
    case nb::device::cuda_host::value:
      return Device::host();
    case nb::device::cuda::value:
    case nb::device::cuda_managed::value:
      return Device::cuda(index);
    default:
      break;
  }
  reject(name, "memory of the host or of a CUDA device",
         fmt::format("DLPack device type {}; copy it to one of them", type));
}

template <class AnyArray>
ArrayView make_view(const AnyArray& array, std::string name) {
  ArrayView view;
  view.device = device_of(array.device_type(), array.device_id(), name);
  view.name = std::move(name);
  view.data = static_cast<std::byte*>(array.data_handle()) + array.byte_offset();
  view.type = array.dtype();
  if (array.ndim() > 0) {
    view.shape.assign(array.shape_ptr(), array.shape_ptr() + array.ndim());
    view.strides.assign(array.stride_ptr(), array.stride_ptr() + array.ndim());
  }
  return view;
}

[[noreturn]] void reject_layout(const ArrayView& array, std::string_view expected) {
  reject(
      array.name, expected,
      fmt::format("{} with strides [{}]; copy it, e.g. by numpy.ascontiguousarray(a) or tensor.contiguous()",
                  array.describe(), fmt::join(array.strides, ", ")));
}

/// Elements from one row's start to the next.
int64_t row_stride(const ArrayView& array) {
  const int64_t rows = array.shape[0], cols = array.shape[1];
  if (rows > 0 && cols > 1 && array.strides[1] != 1)
    reject_layout(array, "the elements of a row side by side");
  if (rows <= 1) return cols;
  if (array.strides[0] < cols) reject_layout(array, "rows one after another");
  return array.strides[0];
}

template <class T>
MatrixView<T> matrix(const ArrayView& array, Element element) {
  array.require(element);
  array.require_dimensions(2);
  return {reinterpret_cast<T*>(array.data), array.shape.at(0), array.shape.at(1), row_stride(array),
          array.device};
}

size_t count_without_gaps(const ArrayView& array) {
  int64_t count = 1;
  for (size_t i = array.shape.size(); i-- > 0;) {
    if (array.shape[i] > 1 && array.strides[i] != count) reject_layout(array, "an array without gaps");
    count *= array.shape[i];
  }
  return static_cast<size_t>(count);
}

template <class T>
std::span<T> vector(const ArrayView& array, Element element) {
  array.require(element);
  array.require_dimensions(1);
  return {reinterpret_cast<T*>(array.data), count_without_gaps(array)};
}

}  // namespace

std::string ArrayView::describe() const {
  const std::string where =
      device.kind == Device::Kind::kHost ? "" : fmt::format(" on cuda:{}", device.index);
  return fmt::format("{} [{}]{}", type_name(type), fmt::join(shape, ", "), where);
}

void ArrayView::require_dimensions(size_t count) const {
  if (shape.size() != count) reject(name, fmt::format("{} dimensions", count), describe());
}

void ArrayView::require_shape(const std::vector<int64_t>& expected) const {
  if (shape != expected) reject(name, fmt::format("shape [{}]", fmt::join(expected, ", ")), describe());
}

bool ArrayView::is(Element element) const {
  switch (element) {
    case Element::kByte:
      return is_byte(type);
    case Element::kBf16:
      return is_type(type, Code::Bfloat, 16) || is_type(type, Code::UInt, 16);
    case Element::kF16:
      return is_type(type, Code::Float, 16);
    case Element::kF32:
      return is_type(type, Code::Float, 32);
    case Element::kI32:
      return is_type(type, Code::Int, 32);
    case Element::kI64:
      return is_type(type, Code::Int, 64);
  }
  return false;
}

void ArrayView::require(Element element) const {
  if (!is(element)) reject(name, expected_types(element), describe());
}

ArrayView ArrayView::slice(int64_t index) const {
  ArrayView part = *this;
  part.name = fmt::format("{}[{}]", name, index);
  const int64_t bytes_each = (type.bits * type.lanes + 7) / 8;
  part.data += index * strides.at(0) * bytes_each;
  part.shape.erase(part.shape.begin());
  part.strides.erase(part.strides.begin());
  return part;
}

ArrayView view_of(const Array& array, std::string name) {
  // A view of constant elements and one of mutable ones are read alike; who writes asks for a WritableArray.
  return make_view(nb::ndarray<>(array), std::move(name));
}
ArrayView view_of(const WritableArray& array, std::string name) {
  return make_view(array, std::move(name));
}

MatrixView<Bf16> bf16_matrix(const ArrayView& array) {
  return matrix<Bf16>(array, Element::kBf16);
}
MatrixView<float> f32_matrix(const ArrayView& array) {
  return matrix<float>(array, Element::kF32);
}
MatrixView<uint8_t> byte_matrix(const ArrayView& array) {
  return matrix<uint8_t>(array, Element::kByte);
}
MatrixView<int32_t> i32_matrix(const ArrayView& array) {
  return matrix<int32_t>(array, Element::kI32);
}
MatrixView<int64_t> i64_matrix(const ArrayView& array) {
  return matrix<int64_t>(array, Element::kI64);
}

DenseView dense_matrix(const ArrayView& array) {
  ArrayView rows = array;
  if (rows.shape.size() == 1) {
    rows.shape.insert(rows.shape.begin(), 1);
    rows.strides.insert(rows.strides.begin(), rows.shape[1]);
  }
  const auto view = [&](ElementType type, int64_t bytes_each) {
    return DenseView{type,       rows.data, rows.shape.at(0), rows.shape.at(1), row_stride(rows) * bytes_each,
                     rows.device};
  };
  if (rows.shape.size() == 2) {
    if (rows.is(Element::kBf16)) return view(ElementType::kBf16, 2);
    if (rows.is(Element::kF16)) return view(ElementType::kF16, 2);
    if (rows.is(Element::kF32)) return view(ElementType::kF32, 4);
  }
  reject(array.name, "a matrix of bfloat16, float16 or float32", array.describe());
}

std::span<float> f32_vector(const ArrayView& array) {
  return vector<float>(array, Element::kF32);
}
std::span<int32_t> i32_vector(const ArrayView& array) {
  return vector<int32_t>(array, Element::kI32);
}

std::span<uint8_t> bytes(const ArrayView& array) {
  array.require(Element::kByte);
  return {reinterpret_cast<uint8_t*>(array.data), count_without_gaps(array)};
}

std::shared_ptr<const void> keep_alive(std::vector<Array> arrays) {
  return std::shared_ptr<const std::vector<Array>>(new std::vector<Array>(std::move(arrays)),
                                                   [](const std::vector<Array>* owned) {
                                                     const nb::gil_scoped_acquire gil;
                                                     delete owned;
                                                   });
}

}  // namespace fourfold::python
