#include "tools/candidate_file.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

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
      {"<i8", DType::kI64}, {"|u1", DType::kU8},  {"|i1", DType::kI8},  {"<i2", DType::kI16},
      {"<u2", DType::kU16}, {"<u4", DType::kU32}};
  const auto found = kTypes.find(code);
  if (found == kTypes.end()) {
    bad_file(file,
             "little-endian float16, float32, float64, or an integer type up to int64 (bfloat16: as float32)",
             fmt::format("the numpy type '{}'", code.substr(0, 40)));
  }
  return found->second;
}

/// What an .npy header, a dictionary of Python, has under `key`: between `begin` and the next `end`. nullopt
/// where it has no such entry.
std::optional<std::string_view> entry_of(std::string_view header, std::string_view key,
                                         std::string_view begin, char end) {
  const std::string quoted = fmt::format("'{}':", key);
  size_t at = header.find(quoted);
  if (at == std::string_view::npos) return std::nullopt;
  at = header.find_first_not_of(' ', at + quoted.size());
  if (at == std::string_view::npos || !header.substr(at).starts_with(begin)) return std::nullopt;
  at += begin.size();
  const size_t last = header.find(end, at);
  if (last == std::string_view::npos) return std::nullopt;
  return header.substr(at, last - at);
}

/// A tuple's numbers: "3, 4", "3," or nothing.
std::vector<int64_t> extents_in(std::string_view text, const std::string& file) {
  std::vector<int64_t> extents;
  for (size_t at = text.find_first_not_of(", "); at != std::string_view::npos;
       at = text.find_first_not_of(", ", at)) {
    int64_t extent = -1;
    const auto [end, error] = std::from_chars(text.data() + at, text.data() + text.size(), extent);
    if (error != std::errc() || extent < 0) {
      bad_file(file, "a shape of numbers from 0 on", fmt::format("({})", text));
    }
    extents.push_back(extent);
    at = static_cast<size_t>(end - text.data());
  }
  return extents;
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
  const std::string_view header = bytes.substr(start, length);
  const auto type = entry_of(header, "descr", "'", '\''), shape = entry_of(header, "shape", "(", ')'),
             order = entry_of(header, "fortran_order", "", ',');
  if (!type || !shape || (order != "True" && order != "False")) {
    bad_file(file, "a .npy header with descr, fortran_order and shape", "something else");
  }
  if (order == "True") bad_file(file, "elements in C order (np.ascontiguousarray)", "Fortran order");
  DumpedTensor tensor{dtype_of_numpy(std::string(*type), file), extents_in(*shape, file), {}, file};
  const int64_t size = elements_of(tensor.shape, file) * bits_of(tensor.dtype) / 8;
  const std::string_view data = bytes.substr(start + length);
  if (static_cast<int64_t>(data.size()) < size) {
    bad_file(file, fmt::format("{} bytes of elements", size), fmt::format("{}", data.size()));
  }
  tensor.bytes.resize(static_cast<size_t>(size));
  std::memcpy(tensor.bytes.data(), data.data(), tensor.bytes.size());
  return tensor;
}

/// A zip file's members; stored, not compressed. Zip64 records (PKWARE's APPNOTE.TXT, 4.3.14 and 4.5.3) where
/// the file has them.
class ZipReader {
 public:
  ZipReader(std::string_view bytes, const std::string& file) : bytes_(bytes), file_(file) {}

  DumpedTensors read() {
    find_directory();
    DumpedTensors tensors;
    for (uint64_t i = 0; i < count_; ++i) read_entry(tensors);
    return tensors;
  }

 private:
  static constexpr uint16_t kSeeZip64Short = 0xFFFF;
  static constexpr uint32_t kSeeZip64 = 0xFFFFFFFF;

  /// Throws unless `size` bytes lie at `offset`.
  void need(uint64_t offset, uint64_t size) const {
    if (offset > bytes_.size() || bytes_.size() - offset < size)
      bad_file(file_, "a whole .npz (zip) file", "an end before it");
  }
  template <class T>
  T number(uint64_t offset) const {
    need(offset, sizeof(T));
    return number_at<T>(bytes_, offset);
  }
  bool has_signature(uint64_t offset, std::string_view signature) const {
    need(offset, signature.size());
    return bytes_.substr(offset, signature.size()) == signature;
  }

  void find_directory() {
    const size_t end = bytes_.rfind("PK\x05\x06");
    if (end == std::string_view::npos) bad_file(file_, "an .npz (zip) file", "no directory in it");
    count_ = number<uint16_t>(end + 10);
    at_ = number<uint32_t>(end + 16);
    if (count_ != kSeeZip64Short && at_ != kSeeZip64) return;
    constexpr uint64_t kLocatorBytes = 20;
    if (end < kLocatorBytes || !has_signature(end - kLocatorBytes, "PK\x06\x07")) return;
    const auto record = number<uint64_t>(end - kLocatorBytes + 8);
    if (!has_signature(record, "PK\x06\x06")) bad_file(file_, "a zip64 directory", "damage");
    count_ = number<uint64_t>(record + 32);
    at_ = number<uint64_t>(record + 48);
  }

  void read_entry(DumpedTensors& tensors) {
    need(at_, 46);
    if (!has_signature(at_, "PK\x01\x02")) bad_file(file_, "a zip directory", "damage");
    const auto name_bytes = number<uint16_t>(at_ + 28), extra_bytes = number<uint16_t>(at_ + 30),
               comment_bytes = number<uint16_t>(at_ + 32);
    need(at_ + 46, uint64_t{name_bytes} + extra_bytes);
    std::string name(bytes_.substr(at_ + 46, name_bytes));
    if (number<uint16_t>(at_ + 10) != 0)
      bad_file(file_, "members that are stored (np.savez, not savez_compressed)", "a compressed one");
    const uint64_t local = local_header(at_ + 46 + name_bytes, extra_bytes);
    if (!has_signature(local, "PK\x03\x04")) bad_file(file_, "zip members", "damage");
    const uint64_t data = local + 30 + number<uint16_t>(local + 26) + uint64_t{number<uint16_t>(local + 28)};
    need(data, 0);
    if (name.ends_with(".npy")) name.resize(name.size() - 4);
    tensors[name] = parse_npy(bytes_.substr(data), fmt::format("{}: {}", file_, name));
    at_ += 46 + uint64_t{name_bytes} + extra_bytes + comment_bytes;
  }

  /// Where the member of the entry at at_ begins; `extra`: where the entry's extra fields do.
  uint64_t local_header(uint64_t extra, uint64_t extra_bytes) const {
    const auto offset = number<uint32_t>(at_ + 42);
    if (offset != kSeeZip64) return offset;
    // The zip64 field holds, in this order, those of size, compressed size and offset that did not fit.
    const uint64_t skipped =
        8 * ((number<uint32_t>(at_ + 24) == kSeeZip64) + (number<uint32_t>(at_ + 20) == kSeeZip64));
    for (uint64_t at = extra; at + 4 <= extra + extra_bytes; at += 4 + uint64_t{number<uint16_t>(at + 2)}) {
      if (number<uint16_t>(at) == 1) return number<uint64_t>(at + 4 + skipped);
    }
    bad_file(file_, "a zip64 offset", "none");
  }

  std::string_view bytes_;
  const std::string& file_;
  uint64_t count_ = 0, at_ = 0;  // entries of the directory, and where the next one is
};

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
    case DType::kF64: {
      const auto values = convert<double, double>(*this);
      for (const double value : values) {
        if (std::isfinite(value) && std::abs(value) > std::numeric_limits<float>::max())
          fail(ErrorCode::kBadFile, "{}: tensor '{}': expected numbers that float32 holds, found {}", file,
               name, value);
      }
      return {values.begin(), values.end()};
    }
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
    case DType::kU16:
      return convert<uint16_t, int64_t>(*this);
    case DType::kI8:
      return convert<int8_t, int64_t>(*this);
    case DType::kU8:
      return convert<uint8_t, int64_t>(*this);
    default:
      fail(ErrorCode::kBadFile, "{}: tensor '{}': expected whole numbers, e.g. I32 or I64, found {}", file,
           name, describe());
  }
}

DumpedTensors read_dumped_tensors(const std::filesystem::path& path) {
  const std::string extension = path.extension().string();
  if (extension == ".npy")
    return {{path.stem().string(), parse_npy(read_file(path, kLargestFile), path.string())}};
  if (extension == ".npz") {
    const std::string bytes = read_file(path, kLargestFile), name = path.string();
    return ZipReader(bytes, name).read();
  }
  const auto file = SafetensorsFile::open(path);
  DumpedTensors tensors;
  for (const auto& [name, tensor] : file->tensors()) {
    tensors[name] = {tensor.dtype, tensor.shape, {tensor.data, tensor.data + tensor.bytes}, path.string()};
  }
  return tensors;
}

}  // namespace fourfold
