// Fuzzes the header of safetensors files. Data lies in a block of its own of exactly its size, so that the
// address sanitizer sees a read that is one byte off.
#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/safetensors_header.h"
#include "fuzz_target.h"
#include "json_mutator.h"

namespace fourfold {
namespace {

constexpr size_t kMostData = 1 << 16;  // that the mutator adds

/// What holds for a header that was accepted.
void check(const TensorMap& tensors, const std::byte* data, uint64_t data_bytes) {
  uint64_t covered = 0;
  unsigned sum = 0;
  for (const auto& [name, tensor] : tensors) {
    fuzz::require(tensor.name == name, "a tensor knows its name");
    fuzz::require(tensor.bytes >= 0 && tensor.data >= data && tensor.data + tensor.bytes <= data + data_bytes,
                  "a tensor lies within the data");
    double bits = bits_of(tensor.dtype);  // can't wrap around, as a product of integers could
    for (const int64_t extent : tensor.shape) bits *= static_cast<double>(extent);
    fuzz::require(bits == 8.0 * static_cast<double>(tensor.bytes), "type and shape make the size");
    covered += static_cast<uint64_t>(tensor.bytes);
    if (tensor.bytes > 0)
      sum += static_cast<unsigned>(tensor.data[0]) + static_cast<unsigned>(tensor.data[tensor.bytes - 1]);
    fuzz::require(!tensor.describe().empty(), "a tensor can be described");
  }
  fuzz::require(covered == data_bytes, "tensors tile the data");
  volatile unsigned sink = sum;  // the reads happen
  static_cast<void>(sink);
}

/// Makes data_offsets of a mutated header fit its types and shapes, as far as they are sane: what lies behind
/// the checks of offsets is reached then.
uint64_t lay_out_again(nlohmann::ordered_json& header) {
  uint64_t offset = 0;
  for (auto& [name, entry] : header.items()) {
    if (!entry.is_object() || !entry.contains("shape") || !entry["shape"].is_array()) continue;
    uint64_t bytes = 1;
    for (const auto& extent : entry["shape"]) {
      bytes *= extent.is_number_unsigned() ? extent.get<uint64_t>() % kMostData : 1;
      bytes %= kMostData;
    }
    const std::string dtype =
        entry.contains("dtype") && entry["dtype"].is_string() ? entry["dtype"].get<std::string>() : "";
    if (dtype.ends_with("16")) bytes *= 2;
    if (dtype.ends_with("32")) bytes *= 4;
    if (dtype.ends_with("64")) bytes *= 8;
    if (offset + bytes > kMostData) continue;
    entry["data_offsets"] = {offset, offset + bytes};
    offset += bytes;
  }
  return offset;
}

/// Length, header and data of a file, apart.
struct Parts {
  std::string header;
  std::string data;
};

Parts split(const uint8_t* bytes, size_t size) {
  if (size < kSafetensorsLengthBytes) return {std::string(reinterpret_cast<const char*>(bytes), size), ""};
  uint64_t length = 0;
  std::memcpy(&length, bytes, sizeof(length));
  const std::string rest(reinterpret_cast<const char*>(bytes) + kSafetensorsLengthBytes,
                         size - kSafetensorsLengthBytes);
  length = std::min<uint64_t>(length, rest.size());
  return {rest.substr(0, length), rest.substr(length)};
}

}  // namespace
}  // namespace fourfold

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace fourfold;
  if (size < kSafetensorsLengthBytes) return 0;
  try {
    const std::span<const std::byte> file = std::as_bytes(std::span(data, size));
    const uint64_t header_bytes =
        safetensors_header_bytes(file.first<kSafetensorsLengthBytes>(), size, "file");
    const std::string header(reinterpret_cast<const char*>(data) + kSafetensorsLengthBytes, header_bytes);
    const size_t data_bytes = size - kSafetensorsLengthBytes - header_bytes;
    const auto copy = std::make_unique<std::byte[]>(data_bytes);
    std::memcpy(copy.get(), data + kSafetensorsLengthBytes + header_bytes, data_bytes);
    check(parse_safetensors_header(header, "file", copy.get(), data_bytes), copy.get(), data_bytes);
  } catch (const Error&) {
  }
  return 0;
}

/// Structure-aware: the header stays JSON, its length true, its offsets often.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned int seed) {
  using namespace fourfold;
  std::minstd_rand random(seed);
  if (random() % 4 == 0) return LLVMFuzzerMutate(data, size, max_size);
  Parts parts = split(data, size);
  std::string text = fuzz::mutate_json(parts.header, random);
  if (random() % 2 == 0) {
    auto json = nlohmann::ordered_json::parse(text, nullptr, false);
    if (json.is_object()) {
      parts.data.resize(lay_out_again(json), '\x5a');
      text = json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
    }
  }
  const uint64_t length = text.size();
  const size_t total = kSafetensorsLengthBytes + text.size() + parts.data.size();
  if (total > max_size) return LLVMFuzzerMutate(data, size, max_size);
  std::memcpy(data, &length, sizeof(length));
  uint8_t* const end = std::copy(text.begin(), text.end(), data + kSafetensorsLengthBytes);
  std::copy(parts.data.begin(), parts.data.end(), end);
  return total;
}
