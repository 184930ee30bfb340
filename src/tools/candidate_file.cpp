#include "tools/candidate_file.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <regex>

#include "base/fail.h"
#include "base/files.h"
#include "fourfold/tensor.h"

namespace fourfold {
namespace {

constexpr int64_t kLargestFile = int64_t{1} << 34;
constexpr int64_t kMostElements = int64_t{1} << 31;

[[noreturn]] void bad_file(const std::string& file, const std::string& expected, const std::string& found) {
  fail(ErrorCode::kBadFile, "{}: expected {}, found {}", file, expected, found);
}

/// Little-endian number at `offset`; the caller has checked the bounds.
template <class T>
T number_at(std::string_view bytes, size_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof(T));
  return value;
}

int64_t elements_of(const std::vector<int64_t>& shape, const std::string& file) {
  int64_t count = 1;
  for (const int64_t extent : shape) {
    if (extent < 0 || __builtin_mul_overflow(count, extent, &count) || count > kMostElements) {
      bad_file(file, fmt::format("up to {} elements", kMostElements), "more");
    }
  }
  return count;
}

DType dtype_of_numpy(const std::string& code, const std::string& file) {
  static const std::map<std::string, DType> kTypes = {
      {"<f2", DType::kF16}, {"<f4", DType::kF32}, {"<f8", DType::kF64}, {"<i4", DType::kI32},
      {"<i8", DType::kI64}, {"|u1", DType::kU8},  {"|i1", DType::kI8},  {"<i2", DType::kI16}};
  const auto found = kTypes.find(code);
  if (found == kTypes.end()) {
    bad_file(
        file,
        "little-endian float16, float32, float64, int32, int64, int16, int8 or uint8 (bfloat16: as float32)",
        fmt::format("the numpy type '{}'", code.substr(0, 40)));
  }
  return found->second;
}

/// One .npy file: magic, version, a Python dictionary, the elements.
DumpedTensor parse_npy(std::string_view bytes, const std::string& file) {
  constexpr std::string_view kMagic = "\x93NUMPY";
  if (bytes.size() < 12 || bytes.substr(0, 6) != kMagic) bad_file(file, "a .npy file", "another beginning");
  const bool is_first_version = bytes[6] == 1;
  const size_t start = is_first_version ? 10 : 12;
  const size_t length = is_first_version ? number_at<uint16_t>(bytes, 8) : number_at<uint32_t>(bytes, 8);
  if (length > 65536 || bytes.size() - start < length)
    bad_file(file, "a whole .npy header", "an end before it");
  const std::string header(bytes.substr(start, length));
  static const std::regex kDescription("'descr': *'([^']{1,40})'"), kOrder("'fortran_order': *(True|False)"),
      kShape("'shape': *\\(([0-9, ]*)\\)");
  std::smatch type, order, shape;
  if (!std::regex_search(header, type, kDescription) || !std::regex_search(header, order, kOrder) ||
      !std::regex_search(header, shape, kShape)) {
    bad_file(file, "a .npy header with descr, fortran_order and shape", "something else");
  }
  if (order[1] == "True") bad_file(file, "elements in C order (np.ascontiguousarray)", "Fortran order");
  DumpedTensor tensor{dtype_of_numpy(type[1], file), {}, {}, file};
  static const std::regex kNumber("[0-9]{1,15}");
  const std::string extents = shape[1];
  for (std::sregex_iterator it(extents.begin(), extents.end(), kNumber), end; it != end; ++it) {
    tensor.shape.push_back(std::stoll(it->str()));
  }
  const int64_t size = elements_of(tensor.shape, file) * bits_of(tensor.dtype) / 8;
  const std::string_view data = bytes.substr(start + length);
  if (static_cast<int64_t>(data.size()) < size) {
    bad_file(file, fmt::format("{} bytes of elements", size), fmt::format("{}", data.size()));
  }
  tensor.bytes.resize(static_cast<size_t>(size));
  std::memcpy(tensor.bytes.data(), data.data(), tensor.bytes.size());
  return tensor;
}

/// A zip file's members, by its central directory; stored, not compressed.
DumpedTensors parse_npz(std::string_view bytes, const std::string& file) {
  constexpr std::string_view kEnd = "PK\x05\x06", kEntry = "PK\x01\x02", kLocal = "PK\x03\x04";
  const size_t end = bytes.rfind(kEnd);
  if (end == std::string_view::npos || bytes.size() - end < 22)
    bad_file(file, "an .npz (zip) file", "no directory in it");
  const size_t count = number_at<uint16_t>(bytes, end + 10);
  size_t at = number_at<uint32_t>(bytes, end + 16);
  DumpedTensors tensors;
  for (size_t i = 0; i < count; ++i) {
    if (at > bytes.size() || bytes.size() - at < 46 || bytes.substr(at, 4) != kEntry)
      bad_file(file, "a zip directory", "damage");
    const size_t name_length = number_at<uint16_t>(bytes, at + 28),
                 extra = number_at<uint16_t>(bytes, at + 30), comment = number_at<uint16_t>(bytes, at + 32),
                 local = number_at<uint32_t>(bytes, at + 42);
    if (bytes.size() - at - 46 < name_length) bad_file(file, "a zip directory", "damage");
    std::string name(bytes.substr(at + 46, name_length));
    if (number_at<uint16_t>(bytes, at + 10) != 0)
      bad_file(file, "members that are stored (np.savez, not savez_compressed)", "a compressed one");
    if (local > bytes.size() || bytes.size() - local < 30 || bytes.substr(local, 4) != kLocal)
      bad_file(file, "zip members", "damage");
    const size_t data =
        local + 30 + number_at<uint16_t>(bytes, local + 26) + number_at<uint16_t>(bytes, local + 28);
    if (data > bytes.size()) bad_file(file, "zip members", "an end before them");
    if (name.ends_with(".npy")) name.resize(name.size() - 4);
    tensors[name] = parse_npy(bytes.substr(data), fmt::format("{}: {}", file, name));
    at += 46 + name_length + extra + comment;
  }
  return tensors;
}

template <class T>
T element(const DumpedTensor& tensor, size_t index) {
  T value;
  std::memcpy(&value, tensor.bytes.data() + index * sizeof(T), sizeof(T));
  return value;
}

template <class T, class Out>
std::vector<Out> convert(const DumpedTensor& tensor) {
  std::vector<Out> values(tensor.bytes.size() / sizeof(T));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<Out>(element<T>(tensor, i));
  return values;
}

}  // namespace

std::string DumpedTensor::describe() const {
  std::string text(to_string(dtype));
  return fmt::format("{} [{}]", text, fmt::join(shape, ", "));
}

std::vector<float> DumpedTensor::floats(const std::string& name) const {
  switch (dtype) {
    case DType::kF64:
      return convert<double, float>(*this);
    case DType::kBf16:
    case DType::kF16:
    case DType::kF32: {
      const auto type = dtype == DType::kBf16  ? ElementType::kBf16
                        : dtype == DType::kF16 ? ElementType::kF16
                                               : ElementType::kF32;
      const int64_t count = static_cast<int64_t>(bytes.size()) * 8 / bits_of(dtype);
      std::vector<float> values(static_cast<size_t>(count));
      if (count > 0)
        decode_row(DenseView{type, bytes.data(), 1, count, static_cast<int64_t>(bytes.size()), {}}, 0,
                   values.data());
      return values;
    }
    default:
      fail(ErrorCode::kBadFile, "{}: tensor '{}': expected BF16, F16, F32 or F64, found {}", file, name,
           describe());
  }
}

std::vector<int64_t> DumpedTensor::integers(const std::string& name) const {
  switch (dtype) {
    case DType::kI64:
      return convert<int64_t, int64_t>(*this);
    case DType::kI32:
      return convert<int32_t, int64_t>(*this);
    case DType::kU32:
      return convert<uint32_t, int64_t>(*this);
    case DType::kI16:
      return convert<int16_t, int64_t>(*this);
    case DType::kU8:
      return convert<uint8_t, int64_t>(*this);
    default:
      fail(ErrorCode::kBadFile, "{}: tensor '{}': expected I32 or I64, found {}", file, name, describe());
  }
}

DumpedTensors read_dumped_tensors(const std::filesystem::path& path) {
  const std::string extension = path.extension().string();
  if (extension == ".npy") return {{"output", parse_npy(read_file(path, kLargestFile), path.string())}};
  if (extension == ".npz") return parse_npz(read_file(path, kLargestFile), path.string());
  const auto file = SafetensorsFile::open(path);
  DumpedTensors tensors;
  for (const auto& [name, tensor] : file->tensors()) {
    tensors[name] = {tensor.dtype, tensor.shape, {tensor.data, tensor.data + tensor.bytes}, path.string()};
  }
  return tensors;
}

}  // namespace fourfold
