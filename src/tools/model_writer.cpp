#include "tools/model_writer.h"

#include <algorithm>

#include "base/fail.h"
#include "base/files.h"

namespace fourfold {
namespace {

constexpr int64_t kShardBytes = int64_t{2} << 30;
constexpr int64_t kFewestShards = 2;  // so that the index is exercised at every size

}  // namespace

ModelWriter::ModelWriter(std::filesystem::path directory, const std::vector<TensorSpec>& tensors)
    : directory_(std::move(directory)) {
  for (const TensorSpec& tensor : tensors) total_bytes_ += tensor.bytes();
  const int64_t count = std::max(kFewestShards, (total_bytes_ + kShardBytes - 1) / kShardBytes);
  std::vector<std::vector<TensorSpec>> parts(static_cast<size_t>(count));
  int64_t bytes_before = 0;
  for (const TensorSpec& tensor : tensors) {
    const auto shard = static_cast<size_t>(bytes_before * count / (total_bytes_ + 1));
    shard_of_[tensor.name] = {shard, fmt::format("model-{:05}-of-{:05}.safetensors", shard + 1, count)};
    parts[shard].push_back(tensor);
    bytes_before += tensor.bytes();
  }
  std::filesystem::create_directories(directory_);
  for (size_t shard = 0; shard < parts.size(); ++shard) {
    const std::string file = fmt::format("model-{:05}-of-{:05}.safetensors", shard + 1, count);
    shards_.push_back(std::make_unique<SafetensorsWriter>(directory_ / file, parts[shard]));
  }
}

void ModelWriter::write(const std::string& name, std::span<const std::byte> data) {
  const auto it = shard_of_.find(name);
  if (it == shard_of_.end())
    fail(ErrorCode::kInvalidArgument, "{}: tensor '{}' was not declared", directory_.string(), name);
  shards_[it->second.first]->write(name, data);
}

void ModelWriter::write_json(const std::string& file, const nlohmann::ordered_json& json) const {
  write_file(directory_ / file, json.dump(2) + "\n");
}

void ModelWriter::finish() {
  nlohmann::ordered_json index;
  index["metadata"]["total_size"] = total_bytes_;
  for (const auto& [name, shard] : shard_of_) index["weight_map"][name] = shard.second;
  for (const auto& shard : shards_) shard->finish();
  write_json("model.safetensors.index.json", index);
}

}  // namespace fourfold
