#include "checkpoint/shard_writer.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/fail.h"
#include "base/files.h"

namespace fourfold {
namespace {

const std::map<std::string, std::string> kMetadata = {{"format", "pt"}};

std::string shard_name(size_t shard, int64_t count) {
  if (count == 1) return "model.safetensors";
  return fmt::format("model-{:05}-of-{:05}.safetensors", shard + 1, count);
}

}  // namespace

ShardWriter::ShardWriter(std::filesystem::path directory, const std::vector<TensorSpec>& tensors,
                         const ShardSizes& sizes)
    : directory_(std::move(directory)) {
  for (const TensorSpec& tensor : tensors) total_bytes_ += tensor.bytes();
  const int64_t places = std::max(sizes.fewest, (total_bytes_ + sizes.bytes - 1) / sizes.bytes);
  std::vector<std::vector<TensorSpec>> parts(static_cast<size_t>(places));
  double bytes_before = 0.0;  // the product below would overflow an int64
  for (const TensorSpec& tensor : tensors) {
    const auto shard = static_cast<size_t>(bytes_before * static_cast<double>(places) /
                                           (static_cast<double>(total_bytes_) + 1.0));
    placement_[tensor.name] = shard;
    parts[shard].push_back(tensor);
    bytes_before += static_cast<double>(tensor.bytes());
  }
  // A tensor larger than a shard leaves places behind it empty.
  std::vector<size_t> place(parts.size());
  size_t used = 0;
  for (size_t shard = 0; shard < parts.size(); ++shard) {
    place[shard] = used;
    if (!parts[shard].empty()) std::swap(parts[used++], parts[shard]);
  }
  const auto count = std::max<int64_t>({sizes.fewest, static_cast<int64_t>(used), 1});
  parts.resize(static_cast<size_t>(count));
  for (auto& [name, shard] : placement_) shard = place[shard];
  std::filesystem::create_directories(directory_);
  for (size_t shard = 0; shard < parts.size(); ++shard) {
    std::stable_sort(parts[shard].begin(), parts[shard].end(), [](const TensorSpec& a, const TensorSpec& b) {
      return bits_of(a.dtype) > bits_of(b.dtype);
    });
    files_.push_back(shard_name(shard, count));
    shards_.push_back(
        std::make_unique<SafetensorsWriter>(directory_ / files_.back(), parts[shard], kMetadata));
  }
}

SafetensorsWriter& ShardWriter::shard_of(const std::string& name) {
  const auto it = placement_.find(name);
  if (it != placement_.end()) return *shards_[it->second];
  fail(ErrorCode::kInvalidArgument, "{}: tensor '{}' was not declared", directory_.string(), name);
}

void ShardWriter::write(const std::string& name, std::span<const std::byte> data) {
  shard_of(name).write(name, data);
}

void ShardWriter::write_part(const std::string& name, int64_t offset, std::span<const std::byte> data) {
  shard_of(name).write_part(name, offset, data);
}

void ShardWriter::finish() {
  for (const auto& shard : shards_) shard->finish();
  if (shards_.size() == 1) return;
  nlohmann::ordered_json index;
  index["metadata"]["total_size"] = total_bytes_;
  for (const auto& [name, shard] : placement_) index["weight_map"][name] = files_[shard];
  write_file(directory_ / "model.safetensors.index.json", index.dump(2) + "\n");
}

}  // namespace fourfold
