// The safetensors reader and writer.
//
// A file is: u64 header length (little endian), the header as JSON {name: {dtype, shape, data_offsets}}, the
// data.
#include "fourfold/safetensors.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/fail.h"
#include "base/files.h"
#include "base/mapped_file.h"
#include "checkpoint/safetensors_header.h"
#include "checkpoint/strict_json.h"

namespace fourfold {
namespace {

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the limit of the format's reference implementation
constexpr size_t kMaxRank = 8;

struct DTypeTraits {
  DType type;
  std::string_view name;
  int bits;
};

constexpr std::array<DTypeTraits, 20> kTypes = {{
    {DType::kBool, "BOOL", 8},      {DType::kU8, "U8", 8},          {DType::kI8, "I8", 8},
    {DType::kF8E4m3, "F8_E4M3", 8}, {DType::kF8E5m2, "F8_E5M2", 8}, {DType::kF8E8m0, "F8_E8M0", 8},
    {DType::kF4, "F4", 4},          {DType::kF6E2m3, "F6_E2M3", 6}, {DType::kF6E3m2, "F6_E3M2", 6},
    {DType::kU16, "U16", 16},       {DType::kI16, "I16", 16},       {DType::kF16, "F16", 16},
    {DType::kBf16, "BF16", 16},     {DType::kU32, "U32", 32},       {DType::kI32, "I32", 32},
    {DType::kF32, "F32", 32},       {DType::kU64, "U64", 64},       {DType::kI64, "I64", 64},
    {DType::kF64, "F64", 64},       {DType::kC64, "C64", 64},
}};

const DTypeTraits& traits_of(DType type) {
  return *std::find_if(kTypes.begin(), kTypes.end(), [&](const DTypeTraits& t) { return t.type == type; });
}

std::string shape_text(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

/// Product of a shape; -1 when it does not fit an int64.
int64_t checked_elements(const std::vector<int64_t>& shape) {
  int64_t product = 1;
  for (const int64_t extent : shape) {
    if (__builtin_mul_overflow(product, extent, &product)) return -1;
  }
  return product;
}

/// Reads one entry of the header, refusing what does not hold together.
class EntryReader {
 public:
  EntryReader(const std::string& file, const std::string& name, const nlohmann::json& entry,
              uint64_t data_bytes)
      : file_(file), name_(name), entry_(entry), data_bytes_(data_bytes) {}

  Tensor read(const std::byte* data) const {
    if (!entry_.is_object()) bad("an object with dtype, shape and data_offsets", entry_.type_name());
    Tensor tensor;
    tensor.name = name_;
    tensor.file = file_;
    tensor.dtype = dtype();
    tensor.shape = shape();
    const auto [begin, end] = offsets();
    tensor.data = data + begin;
    tensor.bytes = static_cast<int64_t>(end - begin);
    int64_t bits = checked_elements(tensor.shape);
    if (bits < 0 || __builtin_mul_overflow(bits, int64_t{bits_of(tensor.dtype)}, &bits)) {
      bad("a shape whose size fits 63 bits", shape_text(tensor.shape));
    }
    if (bits % 8 != 0 || bits / 8 != tensor.bytes) {
      bad(fmt::format("{} bytes for {}", bits / 8, tensor.describe()),
          fmt::format("{} between its data_offsets", tensor.bytes));
    }
    return tensor;
  }

  [[noreturn]] void bad(const std::string& expected, const std::string& found) const {
    fail(ErrorCode::kBadFile, "{}: tensor '{}': expected {}, found {}", file_, name_, expected, found);
  }

 private:
  const nlohmann::json& member(const char* key) const {
    const auto it = entry_.find(key);
    if (it == entry_.end()) bad(fmt::format("a member '{}'", key), "none");
    return *it;
  }

  DType dtype() const {
    const nlohmann::json& value = member("dtype");
    if (!value.is_string()) bad("dtype to be a string", value.type_name());
    const auto& name = value.get_ref<const std::string&>();
    for (const DTypeTraits& type : kTypes) {
      if (type.name == name) return type.type;
    }
    bad("a dtype of the safetensors format (F8_E4M3, BF16, ...)", "'" + name + "'");
  }

  uint64_t number(const nlohmann::json& value, const char* what) const {
    if (!value.is_number_unsigned()) bad(fmt::format("{} to hold whole numbers from 0", what), value.dump());
    return value.get<uint64_t>();
  }

  std::vector<int64_t> shape() const {
    const nlohmann::json& value = member("shape");
    if (!value.is_array()) bad("shape to be an array", value.type_name());
    if (value.size() > kMaxRank)
      bad(fmt::format("at most {} dimensions", kMaxRank), std::to_string(value.size()));
    std::vector<int64_t> shape;
    for (const nlohmann::json& extent : value) {
      const uint64_t wide = number(extent, "shape");
      if (wide > static_cast<uint64_t>(INT64_MAX)) bad("extents below 2^63", std::to_string(wide));
      shape.push_back(static_cast<int64_t>(wide));
    }
    return shape;
  }

  std::pair<uint64_t, uint64_t> offsets() const {
    const nlohmann::json& value = member("data_offsets");
    if (!value.is_array() || value.size() != 2) bad("data_offsets [begin, end]", value.dump().substr(0, 80));
    const uint64_t begin = number(value[0], "data_offsets"), end = number(value[1], "data_offsets");
    if (begin > end) bad("data_offsets that ascend", fmt::format("[{}, {}]", begin, end));
    if (end > data_bytes_) {
      bad(fmt::format("data_offsets within the {} bytes of data", data_bytes_),
          fmt::format("[{}, {}]; is the file truncated?", begin, end));
    }
    return {begin, end};
  }

  const std::string& file_;
  const std::string& name_;
  const nlohmann::json& entry_;
  uint64_t data_bytes_;
};

/// Tensors must tile the data: no byte shared, none unaccounted for.
void require_tiling(const std::string& file, const std::map<std::string, Tensor, std::less<>>& tensors,
                    const std::byte* data, uint64_t data_bytes) {
  std::vector<const Tensor*> by_offset;
  for (const auto& [name, tensor] : tensors) by_offset.push_back(&tensor);
  std::sort(by_offset.begin(), by_offset.end(), [](const Tensor* a, const Tensor* b) {
    return std::pair(a->data, a->bytes) < std::pair(b->data, b->bytes);
  });
  const std::byte* covered = data;
  for (const Tensor* tensor : by_offset) {
    if (tensor->data != covered) {
      fail(ErrorCode::kBadFile, "{}: tensor '{}': expected its data to start at offset {}, found {}: it {}",
           file, tensor->name, covered - data, tensor->data - data,
           tensor->data < covered ? "overlaps the tensor before it" : "leaves a hole");
    }
    covered += tensor->bytes;
  }
  if (covered != data + data_bytes) {
    fail(ErrorCode::kBadFile, "{}: expected the tensors to cover {} bytes of data, found {} covered", file,
         data_bytes, covered - data);
  }
}

}  // namespace

std::string_view to_string(DType type) {
  return traits_of(type).name;
}
int bits_of(DType type) {
  return traits_of(type).bits;
}

int64_t Tensor::elements() const {
  return checked_elements(shape);
}
std::string Tensor::describe() const {
  return fmt::format("{} {}", to_string(dtype), shape_text(shape));
}

TensorMap parse_safetensors_header(std::string_view text, const std::string& file, const std::byte* data,
                                   uint64_t data_bytes) {
  const nlohmann::json header = parse_strict_json(text, file + ": header");
  if (!header.is_object()) {
    fail(ErrorCode::kBadFile, "{}: header: expected a JSON object, found {}", file, header.type_name());
  }
  TensorMap tensors;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    tensors.emplace(name, EntryReader(file, name, entry, data_bytes).read(data));
  }
  require_tiling(file, tensors, data, data_bytes);
  return tensors;
}

uint64_t safetensors_header_bytes(std::span<const std::byte, kSafetensorsLengthBytes> start,
                                  uint64_t file_bytes, const std::string& file) {
  uint64_t header_bytes = 0;  // little endian, as every machine that this runs on
  std::memcpy(&header_bytes, start.data(), start.size());
  if (header_bytes > file_bytes - start.size()) {
    fail(ErrorCode::kBadFile,
         "{}: expected a header within the file's {} bytes, found a header length of {}; is it a safetensors "
         "file, and whole?",
         file, file_bytes, header_bytes);
  }
  if (header_bytes > kMaxHeaderBytes) {
    fail(ErrorCode::kBadFile, "{}: expected a header of at most {} bytes, found {}", file, kMaxHeaderBytes,
         header_bytes);
  }
  return header_bytes;
}

std::shared_ptr<const SafetensorsFile> SafetensorsFile::open(const std::filesystem::path& path) {
  return std::shared_ptr<const SafetensorsFile>(new SafetensorsFile(path));
}

/// The header is read by system calls, whose failure is an error; the data alone are mapped.
SafetensorsFile::SafetensorsFile(const std::filesystem::path& path)
    : path_(path), file_(std::make_unique<const MappedFile>(path)) {
  const std::string file = path_.string();
  const std::span<const std::byte> bytes = file_->bytes();
  if (bytes.size() < kSafetensorsLengthBytes) {
    fail(ErrorCode::kBadFile, "{}: expected a safetensors file of at least 8 bytes, found {}", file,
         bytes.size());
  }
  std::array<std::byte, kSafetensorsLengthBytes> start;
  file_->read_at(start, 0);
  const uint64_t header_bytes = safetensors_header_bytes(start, bytes.size(), file);
  std::string text(header_bytes, '\0');
  file_->read_at(std::as_writable_bytes(std::span(text)), kSafetensorsLengthBytes);
  const auto data = bytes.subspan(kSafetensorsLengthBytes + header_bytes);
  tensors_ = parse_safetensors_header(text, file, data.data(), data.size());
}

SafetensorsFile::~SafetensorsFile() = default;

void SafetensorsFile::require_intact() const {
  file_->require_intact();
}

void SafetensorsFile::drop_pages() const {
  file_->drop_pages();
}

const Tensor* SafetensorsFile::find(std::string_view name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

const Tensor& SafetensorsFile::at(std::string_view name) const {
  if (const Tensor* tensor = find(name)) return *tensor;
  std::vector<std::string> names;
  for (const auto& [other, tensor] : tensors_) {
    if (names.size() == 6) {
      names.emplace_back("...");
      break;
    }
    names.push_back(other);
  }
  fail(ErrorCode::kNotFound, "{}: expected a tensor '{}', found {}", path_.string(), name,
       names.empty() ? "no tensors" : fmt::format("{}", fmt::join(names, ", ")));
}

int64_t TensorSpec::bytes() const {
  int64_t bits = checked_elements(shape);
  const bool negative = std::any_of(shape.begin(), shape.end(), [](int64_t extent) { return extent < 0; });
  if (negative || bits < 0 || __builtin_mul_overflow(bits, int64_t{bits_of(dtype)}, &bits) || bits % 8 != 0) {
    fail(ErrorCode::kInvalidArgument, "tensor '{}': expected a shape of whole bytes below 2^60, found {} {}",
         name, to_string(dtype), shape_text(shape));
  }
  return bits / 8;
}

SafetensorsWriter::SafetensorsWriter(std::filesystem::path path, const std::vector<TensorSpec>& tensors,
                                     const std::map<std::string, std::string>& metadata)
    : path_(std::move(path)) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  int64_t offset = 0;
  for (const TensorSpec& tensor : tensors) {
    const int64_t bytes = tensor.bytes();
    const int64_t begin = offset;
    if (__builtin_add_overflow(offset, bytes, &offset)) {
      fail(ErrorCode::kInvalidArgument, "{}: tensor '{}': expected less than 2^63 bytes in all, found more",
           path_.string(), tensor.name);
    }
    header[tensor.name] = {
        {"dtype", to_string(tensor.dtype)}, {"shape", tensor.shape}, {"data_offsets", {begin, offset}}};
    const auto [slot, is_new] = slots_.try_emplace(tensor.name);
    if (!is_new) {
      fail(ErrorCode::kInvalidArgument, "{}: tensor '{}' is declared twice", path_.string(), tensor.name);
    }
    slot->second.offset = begin;
    slot->second.bytes = bytes;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // data starts at a multiple of 8

  const uint64_t length = text.size();
  file_ = std::make_unique<PartialFile>(path_);
  file_->write_at(std::as_bytes(std::span(&length, 1)), 0);
  file_->write_at(std::as_bytes(std::span(text)), kSafetensorsLengthBytes);
  for (auto& [name, slot] : slots_) slot.offset += static_cast<int64_t>(kSafetensorsLengthBytes + length);
}

SafetensorsWriter::~SafetensorsWriter() = default;

SafetensorsWriter::Slot& SafetensorsWriter::slot_of(std::string_view name) {
  const auto it = slots_.find(name);
  if (it != slots_.end()) return it->second;
  fail(ErrorCode::kInvalidArgument, "{}: tensor '{}' was not declared", path_.string(), name);
}

void SafetensorsWriter::write(std::string_view name, std::span<const std::byte> data) {
  Slot& slot = slot_of(name);
  if (static_cast<int64_t>(data.size()) != slot.bytes) {
    fail(ErrorCode::kInvalidArgument, "{}: tensor '{}': expected {} bytes, found {}", path_.string(), name,
         slot.bytes, data.size());
  }
  file_->write_at(data, slot.offset);
  slot.written = slot.bytes;
}

void SafetensorsWriter::write_part(std::string_view name, int64_t offset, std::span<const std::byte> data) {
  Slot& slot = slot_of(name);
  const auto bytes = static_cast<int64_t>(data.size());
  if (offset < 0 || bytes > slot.bytes || offset > slot.bytes - bytes) {
    fail(ErrorCode::kInvalidArgument, "{}: tensor '{}': expected a part of {} bytes, found {} from {} on",
         path_.string(), name, slot.bytes, bytes, offset);
  }
  file_->write_at(data, slot.offset + offset);
  slot.written += bytes;
}

void SafetensorsWriter::finish() {
  for (const auto& [name, slot] : slots_) {
    if (slot.written != slot.bytes) {
      fail(ErrorCode::kInvalidArgument, "{}: tensor '{}' was declared and not written{}", path_.string(),
           name, slot.written > 0 ? ", but in part" : "");
    }
  }
  file_->commit();
}

void write_safetensors(const std::filesystem::path& path, std::span<const TensorData> tensors) {
  std::vector<TensorSpec> specs;
  for (const TensorData& tensor : tensors) specs.push_back(tensor.spec);
  SafetensorsWriter writer(path, specs);
  for (const TensorData& tensor : tensors) writer.write(tensor.spec.name, tensor.bytes);
  writer.finish();
}

}  // namespace fourfold
