// Writing a model directory: shards, their index, configs.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "fourfold/safetensors.h"

namespace fourfold {

/// Writes tensors declared up front into at least two shards, as large models are stored, and their index.
/// The directory is the caller's; it is complete only after finish().
class ModelWriter {
 public:
  ModelWriter(std::filesystem::path directory, const std::vector<TensorSpec>& tensors);

  void write(const std::string& name, std::span<const std::byte> data);
  void write_json(const std::string& file, const nlohmann::ordered_json& json) const;
  void finish();

  int64_t total_bytes() const { return total_bytes_; }

 private:
  std::filesystem::path directory_;
  std::vector<std::unique_ptr<SafetensorsWriter>> shards_;
  std::map<std::string, std::pair<size_t, std::string>> shard_of_;  // tensor -> shard, its file name
  int64_t total_bytes_ = 0;
};

}  // namespace fourfold
