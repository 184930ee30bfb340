#include "checkpoint/model_writer.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <map>
#include <mutex>
#include <system_error>

#include "base/fail.h"
#include "base/files.h"
#include "base/mapped_file.h"
#include "base/new_directory.h"
#include "checkpoint/shard_writer.h"

namespace fourfold {
namespace {

/// Carried tensors are copied in pieces of this size: what a task has of its source in memory at a time.
constexpr int64_t kPieceBytes = int64_t{16} << 20;

/// What the system is asked to read ahead of the tasks that run: enough to keep a disk busy.
constexpr int64_t kReadAheadBytes = int64_t{64} << 20;

int64_t bytes_read(const WriteTask& task) {
  int64_t bytes = 0;
  for (const auto& part : task.reads) bytes += static_cast<int64_t>(part.size());
  return bytes;
}

WriteTask carry(const TensorSpec& spec, std::span<const std::byte> piece, int64_t offset) {
  return {spec.name, {piece}, 0, [name = spec.name, piece, offset](const WritePart& write) {
            write(name, offset, piece);
          }};
}

/// The plan's tasks and those that carry, in the order of the plan: sources are read from front to back.
std::vector<WriteTask> ordered_tasks(const ModelPlan& plan) {
  std::map<std::string, size_t> position;
  std::vector<WriteTask> tasks = plan.tasks;
  for (const PlannedTensor& tensor : plan.tensors) {
    position.emplace(tensor.spec.name, position.size());
    if (tensor.carried == nullptr) continue;
    const int64_t bytes = tensor.spec.bytes();
    for (int64_t offset = 0; offset < bytes; offset += kPieceBytes) {
      const auto size = static_cast<size_t>(std::min(kPieceBytes, bytes - offset));
      tasks.push_back(carry(tensor.spec, {tensor.carried + offset, size}, offset));
    }
  }
  const auto earlier = [&](const WriteTask& a, const WriteTask& b) {
    return position.at(a.first_tensor) < position.at(b.first_tensor);
  };
  for (const WriteTask& task : tasks) {
    if (position.contains(task.first_tensor)) continue;
    fail(ErrorCode::kInvalidArgument, "plan of a model: tensor '{}': expected a planned one, found a task's",
         task.first_tensor);
  }
  std::stable_sort(tasks.begin(), tasks.end(), earlier);
  return tasks;
}

/// Runs tasks on all cores; the first exception ends all.
class TaskRunner {
 public:
  TaskRunner(const std::vector<WriteTask>& tasks, const WritePart& write, const WriteProgress& progress)
      : tasks_(tasks), write_(write), progress_(progress) {
    for (const WriteTask& task : tasks) total_ += bytes_read(task);
  }

  void run(int64_t memory_bytes) {
    int64_t most = 1;
    for (const WriteTask& task : tasks_) most = std::max(most, task.scratch_bytes);
    const auto fitting = std::clamp<int64_t>(memory_bytes / most, 1, omp_get_max_threads());
    const auto count = static_cast<int64_t>(tasks_.size());
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast <int>(fitting))
    for (int64_t index = 0; index < count; ++index) {
      if (failed_) continue;
      try {
        run_task(static_cast<size_t>(index));
      } catch (...) {
        const std::lock_guard lock(mutex_);
        if (!failed_.exchange(true)) error_ = std::current_exception();
      }
    }
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void run_task(size_t index) {
    const WriteTask& task = tasks_[index];
    read_ahead();
    task.run(write_);
    for (const auto& part : task.reads) release_mapped(part);
    const std::lock_guard lock(mutex_);
    done_ += bytes_read(task);
    progress_(done_, total_);
  }

  /// While tasks compute, the system reads what the next ones need.
  void read_ahead() {
    const std::lock_guard lock(mutex_);
    while (next_ < tasks_.size() && asked_ - done_ < kReadAheadBytes) {
      const WriteTask& task = tasks_[next_++];
      for (const auto& part : task.reads) prefetch_mapped(part);
      asked_ += bytes_read(task);
    }
  }

  const std::vector<WriteTask>& tasks_;
  const WritePart& write_;
  const WriteProgress& progress_;
  std::mutex mutex_;
  int64_t done_ = 0, total_ = 0;
  size_t next_ = 0;    // task to be read ahead
  int64_t asked_ = 0;  // bytes of those before it
  std::atomic<bool> failed_ = false;
  std::exception_ptr error_;
};

int64_t file_bytes(const PlannedFile& file) {
  return file.copied_from.empty() ? static_cast<int64_t>(file.content.size())
                                  : require_regular_file(file.copied_from);
}

void require_space(const std::filesystem::path& directory, int64_t bytes) {
  std::error_code error;
  const auto space = std::filesystem::space(directory, error);
  if (error || static_cast<int64_t>(space.available) >= bytes) return;
  fail(ErrorCode::kIo, "{}: expected {:.1f} MB of free disk, found {:.1f} MB",
       directory.parent_path().empty() ? "." : directory.parent_path().string(),
       static_cast<double>(bytes) / 1e6, static_cast<double>(space.available) / 1e6);
}

void write_planned_file(const std::filesystem::path& directory, const PlannedFile& file) {
  const std::filesystem::path path = directory / file.name;
  std::error_code error;
  std::filesystem::create_directories(path.parent_path(), error);
  if (file.copied_from.empty()) return write_file(path, file.content);
  if (!error) std::filesystem::copy_file(file.copied_from, path, error);
  if (error) {
    fail(ErrorCode::kIo, "{}: can't copy it to {}: {}", file.copied_from.string(), path.string(),
         error.message());
  }
}

}  // namespace

WrittenModel write_model(const std::filesystem::path& target, const ModelPlan& plan,
                         const WriteProgress& progress) {
  std::vector<TensorSpec> specs;
  int64_t bytes = 0;
  for (const PlannedTensor& tensor : plan.tensors) {
    specs.push_back(tensor.spec);
    bytes += tensor.spec.bytes();
  }
  for (const PlannedFile& file : plan.files) bytes += file_bytes(file);
  const std::vector<WriteTask> tasks = ordered_tasks(plan);

  NewDirectory directory(target);
  require_space(directory.path(), bytes);
  ShardWriter shards(directory.path(), specs, {.bytes = plan.shard_bytes});
  const WritePart write = [&](const std::string& tensor, int64_t offset, std::span<const std::byte> data) {
    shards.write_part(tensor, offset, data);
  };
  TaskRunner(tasks, write, progress).run(plan.memory_bytes);
  require_mapped_files_intact();
  for (const PlannedFile& file : plan.files) write_planned_file(directory.path(), file);
  shards.finish();
  directory.commit();
  return {shards.total_bytes(), static_cast<int64_t>(plan.files.size())};
}

}  // namespace fourfold
