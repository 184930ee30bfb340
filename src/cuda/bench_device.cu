#include "cuda/bench_device.h"

#include <cuda_profiler_api.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <utility>

#include "cuda/check.cuh"

namespace fourfold::cuda {
namespace {

constexpr int kBenchThreads = 256;

/// Fills `words` 4-byte words of codes, or of scales.
template <bool kCodes>
__global__ void generate_kernel(uint64_t seed, int64_t words, uint32_t* out) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t word = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; word < words; word += stride) {
    out[word] = kCodes ? generated_codes(seed, word) : generated_scales(seed, word);
  }
}

/// Reads `count` 16-byte words; eight loads in flight a thread. `sink` is written only if their xor is
/// `never`, which keeps the loads alive.
__global__ void __launch_bounds__(kBenchThreads)
    read_kernel(const uint4* words, int64_t count, uint32_t never, uint32_t* sink) {
  constexpr int kUnroll = 8;
  const int64_t step = int64_t{gridDim.x} * kBenchThreads * kUnroll;
  uint32_t sum = 0;
  for (int64_t first = int64_t{blockIdx.x} * kBenchThreads * kUnroll + threadIdx.x;
       first + (kUnroll - 1) * kBenchThreads < count; first += step) {
    uint4 loaded[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) loaded[i] = __ldcs(words + first + i * kBenchThreads);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) sum ^= loaded[i].x ^ loaded[i].y ^ loaded[i].z ^ loaded[i].w;
  }
  if (sum == never) *sink = sum;
}

/// Keeps the stream busy while the host fills it.
__global__ void delay_kernel(int64_t nanoseconds) {
  int64_t start = 0, now = 0;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  do {
    __nanosleep(1000);
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - start < nanoseconds);
}

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"); }
  ~Stream() {
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  cudaStream_t get() const { return stream_; }
  cudaStream_t release() { return std::exchange(stream_, nullptr); }

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  Event() { check(cudaEventCreate(&event_), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(cudaStream_t stream) const { check(cudaEventRecord(event_, stream), "cudaEventRecord"); }
  /// A node of the graph that `stream` is being captured into.
  void record_in_graph(cudaStream_t stream) const {
    check(cudaEventRecordWithFlags(event_, stream, cudaEventRecordExternal), "cudaEventRecordWithFlags");
  }
  double seconds_since(const Event& start) const {
    float milliseconds = 0.0f;
    check(cudaEventElapsedTime(&milliseconds, start.event_, event_), "cudaEventElapsedTime");
    return 1e-3 * milliseconds;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

/// What `enqueue` enqueues on `stream`, as a graph ready to launch. A capture that fails is ended.
cudaGraphExec_t capture(cudaStream_t stream, const std::function<void()>& enqueue) {
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  cudaGraph_t graph = nullptr;
  try {
    enqueue();
  } catch (...) {
    cudaStreamEndCapture(stream, &graph);
    if (graph != nullptr) cudaGraphDestroy(graph);
    cudaGetLastError();
    throw;
  }
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t error = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check(error, "cudaGraphInstantiate");
  return executable;
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

/// Records an event after each stage, into the graph that is being captured.
class EventClock final : public StageObserver {
 public:
  explicit EventClock(cudaStream_t stream) : stream_(stream) {}

  void start_call() { add(""); }
  void after(std::string_view stage, void*) override { add(stage); }

  /// Adds seconds of stage after stage to `seconds`, one entry each.
  void read(std::vector<std::vector<double>>& seconds) const {
    size_t stage = 0;
    for (size_t i = 1; i < events_.size(); ++i) {
      if (!names_[i].empty()) seconds[stage++].push_back(events_[i]->seconds_since(*events_[i - 1]));
    }
  }
  std::vector<std::string> stages() const {
    std::vector<std::string> stages;
    std::copy_if(names_.begin(), names_.end(), std::back_inserter(stages),
                 [](const std::string& name) { return !name.empty(); });
    return stages;
  }

 private:
  void add(std::string_view name) {
    names_.emplace_back(name);
    events_.push_back(std::make_unique<Event>());
    events_.back()->record_in_graph(stream_);
  }

  cudaStream_t stream_;
  std::vector<std::string> names_;  // empty: the start of a call
  std::vector<std::unique_ptr<Event>> events_;
};

int grid_for(int64_t threads) {
  return static_cast<int>(std::clamp<int64_t>((threads + kBenchThreads - 1) / kBenchThreads, 1, 1 << 16));
}

}  // namespace

int64_t l2_cache_bytes() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device), "cudaDeviceGetAttribute");
  return bytes;
}

int64_t free_memory_bytes() {
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return static_cast<int64_t>(free);
}

ExpertWeights generate_experts(const GeneratedLayer& layer, const Memory& memory) {
  const auto bytes = static_cast<size_t>(layer.code_bytes() + layer.scale_bytes());
  auto storage = std::make_shared<Buffer>(memory.allocate(bytes));
  auto* const codes = reinterpret_cast<uint8_t*>(storage->data());
  uint8_t* const scales = codes + layer.code_bytes();
  ExpertWeights weights = generated_experts(layer, codes, scales, memory.device(), storage);
  const int64_t code_words = layer.code_bytes() / 4, scale_words = layer.scale_bytes() / 4;
  generate_kernel<true>
      <<<grid_for(code_words), kBenchThreads>>>(layer.seed, code_words, reinterpret_cast<uint32_t*>(codes));
  check_launch("generate_kernel of codes");
  generate_kernel<false><<<grid_for(scale_words), kBenchThreads>>>(layer.seed, scale_words,
                                                                   reinterpret_cast<uint32_t*>(scales));
  check_launch("generate_kernel of scales");
  memory.synchronize();
  return weights;
}

double measure_read_bandwidth(const Memory& memory, int64_t bytes) {
  constexpr int kPasses = 12, kBlocksAMultiprocessor = 8;
  constexpr int64_t kChunk = int64_t{kBenchThreads} * 8;
  int device = 0, multiprocessors = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  const int64_t count = bytes / static_cast<int64_t>(sizeof(uint4)) / kChunk * kChunk;
  const Buffer buffer = memory.allocate(static_cast<size_t>(count) * sizeof(uint4));
  const Buffer sink = memory.allocate(sizeof(uint32_t));
  const int64_t words = count * 4;
  generate_kernel<true>
      <<<grid_for(words), kBenchThreads>>>(1, words, reinterpret_cast<uint32_t*>(buffer.data()));
  check_launch("generate_kernel");
  memory.synchronize();

  const Stream stream;
  std::vector<std::unique_ptr<Event>> events;
  delay_kernel<<<1, 1, 0, stream.get()>>>(500'000);
  for (int pass = 0; pass <= kPasses; ++pass) {
    events.push_back(std::make_unique<Event>());
    events.back()->record(stream.get());
    if (pass == kPasses) break;
    read_kernel<<<multiprocessors * kBlocksAMultiprocessor, kBenchThreads, 0, stream.get()>>>(
        reinterpret_cast<const uint4*>(buffer.data()), count, 0x12345678u,
        reinterpret_cast<uint32_t*>(sink.data()));
    check_launch("read_kernel");
  }
  check(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
  std::vector<double> rates;
  for (int pass = 2; pass < kPasses; ++pass) {  // the first two warm up
    const double seconds =
        events[static_cast<size_t>(pass + 1)]->seconds_since(*events[static_cast<size_t>(pass)]);
    rates.push_back(static_cast<double>(count) * sizeof(uint4) / seconds);
  }
  return median(rates);
}

ReplayTimer::ReplayTimer(std::span<const EnqueueCall> calls) : calls_(calls.size()) {
  Stream stream;
  graph_ = capture(stream.get(), [&] {
    for (const EnqueueCall& call : calls) call(stream.get(), nullptr);
  });
  stream_ = stream.release();
}

ReplayTimer::~ReplayTimer() {
  cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph_));
  cudaStreamDestroy(as_stream(stream_));
}

/// Replays the graph `count` times back to back; appends seconds of a call; -> seconds of all.
double ReplayTimer::replay(int count, std::vector<double>& seconds) {
  const cudaStream_t stream = as_stream(stream_);
  std::vector<std::unique_ptr<Event>> events;
  delay_kernel<<<1, 1, 0, stream>>>(20'000 + int64_t{20'000} * count);
  check_launch("delay_kernel");
  for (int i = 0; i <= count; ++i) {
    events.push_back(std::make_unique<Event>());
    events.back()->record(stream);
    if (i < count) check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph_), stream), "cudaGraphLaunch");
  }
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  double total = 0.0;
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
    const double replay_seconds = events[i + 1]->seconds_since(*events[i]);
    seconds.push_back(replay_seconds / static_cast<double>(calls_));
    total += replay_seconds;
  }
  return total;
}

std::vector<double> ReplayTimer::time(const std::function<bool(int, double)>& is_enough) {
  constexpr double kBatchSeconds = 0.05;
  constexpr int kMostReplaysInBatch = 64;
  std::vector<double> warm_up;
  const double once = std::max(replay(1, warm_up), 1e-6);
  const int batch = std::clamp(static_cast<int>(kBatchSeconds / once), 1, kMostReplaysInBatch);
  std::vector<double> seconds;
  double total = 0.0;
  while (!is_enough(static_cast<int>(seconds.size()), total)) total += replay(batch, seconds);
  return seconds;
}

std::vector<std::pair<std::string, double>> time_stages(std::span<const EnqueueCall> calls) {
  constexpr int kReplays = 11;
  const Stream stream;
  EventClock clock(stream.get());
  const cudaGraphExec_t graph = capture(stream.get(), [&] {
    for (const EnqueueCall& call : calls) {
      clock.start_call();
      call(stream.get(), &clock);
    }
  });
  const std::vector<std::string> stages = clock.stages();
  std::vector<std::vector<double>> seconds(stages.size());
  for (int replay = 0; replay < kReplays; ++replay) {
    cudaError_t error = cudaGraphLaunch(graph, stream.get());
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream.get());
    if (error != cudaSuccess) {
      cudaGraphExecDestroy(graph);
      check(error, "replay of a graph with events");
    }
    if (replay > 0) clock.read(seconds);  // the first warms up
  }
  cudaGraphExecDestroy(graph);
  std::vector<std::pair<std::string, double>> result;
  for (size_t i = 0; i < stages.size(); ++i) result.emplace_back(stages[i], median(seconds[i]));
  return result;
}

void profile_call(const EnqueueCall& call) {
  struct Range {
    Range() { check(cudaProfilerStart(), "cudaProfilerStart"); }
    ~Range() { cudaProfilerStop(); }
    Range(const Range&) = delete;
    Range& operator=(const Range&) = delete;
  };
  const Stream stream;
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  const Range range;
  call(stream.get(), nullptr);
  check(cudaStreamSynchronize(stream.get()), "a profiled call");
}

}  // namespace fourfold::cuda
