// Measuring on the current device: weights made where they are used, the memory's speed, and calls timed as
// graph replays.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "fourfold/moe_layer.h"
#include "moe/generated_experts.h"

namespace fourfold::cuda {

/// Bytes of the current device's last-level cache, and of its memory that is free.
int64_t l2_cache_bytes();
int64_t free_memory_bytes();

/// The bytes of generate_on_host, made on the device of `memory`. Codes of all experts are one array, and so
/// are scales.
ExpertWeights generate_experts(const GeneratedLayer& layer, const Memory& memory);

/// Bytes a second of reading `bytes` of memory once, all multiprocessors, 16 bytes a load: the median of
/// several passes.
double measure_read_bandwidth(const Memory& memory, int64_t bytes);

/// Enqueues one call on `stream`; `observer` may be null.
using EnqueueCall = std::function<void(void* stream, StageObserver* observer)>;

/// Calls captured one after another into one graph, as the layers of a model are; a replay is a sample. The
/// clock runs between events on a stream that never empties, so that no launch of the host is in it.
class ReplayTimer {
 public:
  /// Captures. Throws Error when a call does what can't be captured.
  explicit ReplayTimer(std::span<const EnqueueCall> calls);
  ~ReplayTimer();
  ReplayTimer(const ReplayTimer&) = delete;
  ReplayTimer& operator=(const ReplayTimer&) = delete;

  /// Seconds of a call in the mean over a replay, replay by replay, until `is_enough(samples, seconds of all
  /// of them)`. One replay goes before.
  std::vector<double> time(const std::function<bool(int samples, double seconds)>& is_enough);

 private:
  double replay(int count, std::vector<double>& seconds);

  size_t calls_ = 0;
  void* stream_ = nullptr;
  void* graph_ = nullptr;
};

/// Seconds of every stage of every call, in order, from events between the kernels of one graph that holds
/// all calls; the median of several replays.
std::vector<std::pair<std::string, double>> time_stages(std::span<const EnqueueCall> calls);

/// Runs a call between cudaProfilerStart and cudaProfilerStop, for which profilers can be told to wait (ncu's
/// --profile-from-start off).
void profile_call(const EnqueueCall& call);

}  // namespace fourfold::cuda
