// Where a backend's layers are measured: the memory, clock, ceilings and oracle of one kind of machine. The
// benchmark itself (bench.h) is the same for all.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "fourfold/moe_layer.h"
#include "moe/generated_experts.h"
#include "moe/sampled_rows.h"
#include "tools/bench_statistics.h"
#include "tools/cpu_ceilings.h"

namespace fourfold {

/// Enqueues one call of a layer on `stream`; `observer` may be null. It can be called any number of times.
using LayerCall = std::function<void(void* stream, StageObserver* observer)>;

struct StageTime {
  std::string stage;
  double seconds = 0.0;  ///< in the mean over the calls
};

/// bf16 values as a GEMM of the case reads them, for ceilings that depend on the data.
struct OperandSample {
  const ExpertWeights* weights = nullptr;  ///< in the testbed's memory
  std::span<const Bf16> activations;       ///< decoded, on the host
};

class Testbed {
 public:
  virtual ~Testbed() = default;

  virtual const Memory& memory() const = 0;
  virtual std::string machine() const = 0;
  virtual int64_t cache_bytes() const = 0;  ///< of the last level
  virtual int64_t free_bytes() const = 0;

  virtual ExpertWeights generate(const GeneratedLayer& layer) const = 0;

  virtual Ceiling read_bandwidth(const TimingLimits& limits) const = 0;
  /// Arithmetic peaks that are the machine's alone.
  virtual std::vector<Ceiling> peaks(const TimingLimits& limits) const = 0;
  /// The peak on operands of a case; nullopt where it does not depend on them.
  virtual std::optional<Ceiling> operand_peak(const OperandSample& sample) const = 0;

  /// Operations a second that `peak` reaches between calls, as these leave the core; nullopt where that
  /// is not measured.
  virtual std::optional<double> peak_between(std::span<const LayerCall> rotation,
                                             const Ceiling& peak) const = 0;

  /// Seconds of a call, sample by sample, the calls of `rotation` taking turns; one turn before the clock
  /// starts.
  virtual std::vector<double> time(std::span<const LayerCall> rotation, const TimingLimits& limits) const = 0;
  /// Runs every call `times` times, all calls at once: on threads, and where there are streams on streams, of
  /// their own. Throws the first Error of a call.
  virtual void run_side_by_side(std::span<const LayerCall> calls, int times) const = 0;
  /// Captures a call into a graph; what comes back replays it and waits. Empty where there are no graphs.
  virtual std::function<void()> capture(const LayerCall& call) const = 0;
  virtual std::vector<StageTime> time_stages(std::span<const LayerCall> rotation) const = 0;
  /// Runs a call so that a profiler can be told to see nothing else. Throws Error where there is no such
  /// mark.
  virtual void profile(const LayerCall& call) const = 0;

  /// The GEMM of sampled rows in float64; reference/sampled_multiply.h is the contract.
  virtual std::vector<float> multiply(const ExpertWeights& weights, ExpertGemm gemm, const SampledRows& rows,
                                      std::span<const int64_t> columns) const = 0;
  /// How much of a case the oracle can afford: columns of an output, rows of one expert, and whole tokens
  /// from end to end.
  virtual int64_t most_checked_columns() const = 0;
  virtual int64_t most_checked_rows_of_expert() const = 0;
  virtual int64_t most_checked_tokens() const = 0;
};

/// Its ceilings and times are those of as many threads as OpenMP takes when they are measured.
std::unique_ptr<Testbed> make_cpu_testbed();

/// The testbed of the memory in which `backend` computes. Throws Error when this build has none for it.
std::unique_ptr<Testbed> make_testbed(const Backend& backend);

/// Runs `work(i)` for i below `count` on as many threads; throws the first Error when all have ended.
void run_on_threads(size_t count, const std::function<void(size_t)>& work);

/// Adds up what an observer is told, call by call.
class StageSums {
 public:
  void add(std::string_view stage, double seconds);
  std::vector<StageTime> means(size_t calls) const;

 private:
  std::vector<StageTime> sums_;  // in the order in which stages were first seen
};

/// An array in a testbed's memory.
template <class T>
class TestbedArray {
 public:
  TestbedArray() = default;
  TestbedArray(const Memory& memory, int64_t count)
      : memory_(&memory), buffer_(memory.allocate(static_cast<size_t>(count) * sizeof(T))), count_(count) {}
  TestbedArray(const Memory& memory, std::span<const T> values)
      : TestbedArray(memory, static_cast<int64_t>(values.size())) {
    memory.copy_from_host(data(), values.data(), values.size_bytes());
  }

  T* data() const { return reinterpret_cast<T*>(buffer_.data()); }
  int64_t size() const { return count_; }
  std::span<T> span() const { return {data(), static_cast<size_t>(count_)}; }
  MatrixView<T> matrix(int64_t rows, int64_t cols) const {
    return {data(), rows, cols, cols, memory_->device()};
  }
  /// All bits set: NaN in every float format, so that what is left unwritten shows.
  void poison() const { memory_->fill(data(), 0xFF, static_cast<size_t>(count_) * sizeof(T)); }
  std::vector<T> download() const {
    std::vector<T> values(static_cast<size_t>(count_));
    memory_->copy_to_host(values.data(), data(), values.size() * sizeof(T));
    return values;
  }

 private:
  const Memory* memory_ = nullptr;
  Buffer buffer_;
  int64_t count_ = 0;
};

}  // namespace fourfold
