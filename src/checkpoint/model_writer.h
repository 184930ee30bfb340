// Writing a whole model directory from a plan: tensors carried over or produced, configs, other files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "fourfold/safetensors.h"

namespace fourfold {

/// A tensor of the model to be.
struct PlannedTensor {
  TensorSpec spec;
  /// Carried over: where its bytes are, as many as `spec` says; they outlive the writing. Null: tasks
  /// produce it.
  const std::byte* carried = nullptr;
};

/// Writes a part of a tensor of the plan, from byte `offset` on. May be called from any thread.
using WritePart =
    std::function<void(const std::string& tensor, int64_t offset, std::span<const std::byte> data)>;

/// Work that produces tensors, or parts of them. Runs in one thread, beside others.
struct WriteTask {
  std::string first_tensor;  ///< of those that it writes: tasks run in the order of the plan
  /// What it reads of mapped files: fetched before it runs, given back after; its share of the progress.
  std::vector<std::span<const std::byte>> reads;
  int64_t scratch_bytes = 0;  ///< of memory that it allocates, at most
  std::function<void(const WritePart& write)> run;
};

/// A file of the model directory beside its tensors.
struct PlannedFile {
  std::filesystem::path name;         ///< in the directory; may lie in folders of it
  std::filesystem::path copied_from;  ///< empty: `content` is what it holds
  std::string content;
};

/// As transformers splits models by default, up to version 4.
inline constexpr int64_t kShardBytes = 5'000'000'000;
/// Of all tasks that run at a time, together.
inline constexpr int64_t kTaskMemoryBytes = int64_t{512} << 20;

struct ModelPlan {
  std::vector<PlannedTensor> tensors;  ///< in the order of shards
  std::vector<WriteTask> tasks;        ///< that write every byte of every tensor that is not carried
  std::vector<PlannedFile> files;      ///< config.json among them; the index is written unasked
  int64_t shard_bytes = kShardBytes;
  int64_t memory_bytes = kTaskMemoryBytes;
};

/// Called now and then, by one thread at a time: bytes that were read or carried, of how many.
using WriteProgress = std::function<void(int64_t done, int64_t total)>;

struct WrittenModel {
  int64_t tensor_bytes = 0, files = 0;
};

/// Writes `plan` as the model directory `target`, which appears whole or not at all (base/new_directory.h):
/// before it gets its name, everything is on the disk, and no mapped file was damaged while it was read
/// (require_mapped_files_intact). OpenMP inside. Memory: the plan's limit, and what tasks read. Throws Error
/// where `target` exists, the disk is too small, a task throws, or a tensor was not written.
WrittenModel write_model(
    const std::filesystem::path& target, const ModelPlan& plan,
    const WriteProgress& progress = [](int64_t, int64_t) {});

}  // namespace fourfold
