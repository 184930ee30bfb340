// safetensors files: a reader that maps the file and trusts nothing in it, and a writer.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "fourfold/export.h"

namespace FOURFOLD_EXPORT fourfold {

class MappedFile;
class PartialFile;

/// Element types of the safetensors format.
enum class DType : uint8_t {
  kBool,
  kU8,
  kI8,
  kF8E4m3,
  kF8E5m2,
  kF8E8m0,
  kF4,
  kF6E2m3,
  kF6E3m2,
  kU16,
  kI16,
  kF16,
  kBf16,
  kU32,
  kI32,
  kF32,
  kU64,
  kI64,
  kF64,
  kC64,
};

std::string_view to_string(DType type);  ///< as the file spells it, e.g. "F8_E4M3"
int bits_of(DType type);

/// One tensor of a mapped file. Data may lie at any address: safetensors promises no alignment.
struct Tensor {
  std::string name;
  DType dtype = DType::kU8;
  std::vector<int64_t> shape;
  const std::byte* data = nullptr;
  int64_t bytes = 0;
  std::string file;  ///< path, for messages

  int64_t elements() const;
  std::string describe() const;  ///< e.g. "F8_E4M3 [2048, 448]"
};

/// A mapped safetensors file. Construction checks the whole header: lengths, JSON depth and duplicate keys,
/// dtypes, shapes, offsets (in range, ordered, neither overlapping nor leaving holes). Throws Error naming
/// file and tensor.
class SafetensorsFile {
 public:
  static std::shared_ptr<const SafetensorsFile> open(const std::filesystem::path& path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::filesystem::path& path() const { return path_; }
  const std::map<std::string, Tensor, std::less<>>& tensors() const { return tensors_; }
  /// Throws Error listing some of the names that are there.
  const Tensor& at(std::string_view name) const;
  const Tensor* find(std::string_view name) const;
  /// Throws Error where the file was truncated, or could not be read, while mapped (docs/checkpoints.md).
  void require_intact() const;
  /// Gives the pages that were read back to the system: for those who go through files larger than memory.
  void drop_pages() const;

 private:
  explicit SafetensorsFile(const std::filesystem::path& path);

  std::filesystem::path path_;
  std::unique_ptr<const MappedFile> file_;
  std::map<std::string, Tensor, std::less<>> tensors_;
};

/// A tensor yet to be written.
struct TensorSpec {
  std::string name;
  DType dtype = DType::kU8;
  std::vector<int64_t> shape;

  /// Throws Error for a shape that is negative, too large, or no whole number of bytes.
  int64_t bytes() const;
};

/// Writes one file of tensors declared up front, in any order, from any thread. The file appears under its
/// name at finish(), whole; without it nothing is left behind. Throws Error when the system refuses to write.
class SafetensorsWriter {
 public:
  /// `metadata`: the header's "__metadata__"; loaders for PyTorch want {"format": "pt"}.
  SafetensorsWriter(std::filesystem::path path, const std::vector<TensorSpec>& tensors,
                    const std::map<std::string, std::string>& metadata = {});
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  /// `data` must have exactly the declared size.
  void write(std::string_view name, std::span<const std::byte> data);
  /// A part of a tensor, from byte `offset` on. Parts may come in any order, each once.
  void write_part(std::string_view name, int64_t offset, std::span<const std::byte> data);
  /// Throws Error naming a tensor that was declared and not written, or in part.
  void finish();

 private:
  struct Slot {
    int64_t offset = 0;
    int64_t bytes = 0;
    std::atomic<int64_t> written = 0;
  };
  Slot& slot_of(std::string_view name);

  std::filesystem::path path_;
  std::unique_ptr<PartialFile> file_;
  std::map<std::string, Slot, std::less<>> slots_;
};

/// A tensor in memory, to write.
struct TensorData {
  TensorSpec spec;
  std::span<const std::byte> bytes;
};

/// All tensors at once.
void write_safetensors(const std::filesystem::path& path, std::span<const TensorData> tensors);

}  // namespace fourfold
