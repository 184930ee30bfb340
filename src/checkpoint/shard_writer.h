// Writing tensors into shards and their index.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "fourfold/safetensors.h"

namespace fourfold {

struct ShardSizes {
  int64_t bytes = 0;   ///< a shard holds about as many, or one tensor that is larger
  int64_t fewest = 1;  ///< as many shards at least
};

/// Writes tensors declared up front into shards of about the same size, in the order in which they were
/// declared, and their index; one shard alone is model.safetensors, without an index. Inside a shard wider
/// types come first, so that every tensor is aligned to its elements, as loaders of PyTorch expect. The
/// directory is the caller's; it is complete only after finish(). Writes may come from any thread.
class ShardWriter {
 public:
  ShardWriter(std::filesystem::path directory, const std::vector<TensorSpec>& tensors,
              const ShardSizes& sizes);

  /// As SafetensorsWriter has them.
  void write(const std::string& name, std::span<const std::byte> data);
  void write_part(const std::string& name, int64_t offset, std::span<const std::byte> data);
  void finish();

  int64_t total_bytes() const { return total_bytes_; }

 private:
  SafetensorsWriter& shard_of(const std::string& name);

  std::filesystem::path directory_;
  std::vector<std::unique_ptr<SafetensorsWriter>> shards_;
  std::vector<std::string> files_;           // of the shards
  std::map<std::string, size_t> placement_;  // tensor -> shard
  int64_t total_bytes_ = 0;
};

}  // namespace fourfold
