// The testbed of backends that compute on the host.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <numeric>

#include "base/fail.h"
#include "reference/sampled_multiply.h"
#include "tools/testbed.h"

namespace fourfold {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_between(Clock::time_point start, Clock::time_point end) {
  return std::chrono::duration<double>(end - start).count();
}

/// Wall-clock time between stages.
class HostStageClock final : public StageObserver {
 public:
  explicit HostStageClock(StageSums& sums) : sums_(sums) {}

  void start() { last_ = Clock::now(); }
  void after(std::string_view stage, void* /*stream*/) override {
    const auto now = Clock::now();
    sums_.add(stage, seconds_between(last_, now));
    last_ = Clock::now();
  }

 private:
  StageSums& sums_;
  Clock::time_point last_;
};

/// MemAvailable of /proc/meminfo; a guess where there is none.
int64_t available_memory_bytes() {
  std::ifstream file("/proc/meminfo");
  std::string name;
  int64_t kilobytes = 0;
  for (std::string unit; file >> name >> kilobytes; std::getline(file, unit)) {
    if (name == "MemAvailable:") return kilobytes * 1024;
  }
  return int64_t{4} << 30;
}

/// Memory in large pages where the system gives them: a checkpoint that a backend reads in place.
std::shared_ptr<Buffer> allocate_huge(size_t bytes) {
  constexpr size_t kPage = size_t{2} << 20;
  auto buffer = std::make_shared<Buffer>(host_memory().allocate(bytes));
  const auto address = reinterpret_cast<uintptr_t>(buffer->data());
  const uintptr_t first = (address + kPage - 1) / kPage * kPage, last = (address + bytes) / kPage * kPage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  return buffer;
}

class CpuTestbed final : public Testbed {
 public:
  const Memory& memory() const override { return host_memory(); }
  std::string machine() const override { return cpu_name(); }
  int64_t cache_bytes() const override { return last_level_cache_bytes(); }
  int64_t free_bytes() const override { return available_memory_bytes(); }

  ExpertWeights generate(const GeneratedLayer& layer) const override {
    const auto code_bytes = static_cast<size_t>(layer.code_bytes());
    auto storage = allocate_huge(code_bytes + static_cast<size_t>(layer.scale_bytes()));
    auto* const codes = reinterpret_cast<uint8_t*>(storage->data());
    generate_on_host(layer, codes, codes + code_bytes);
    return generated_experts(layer, codes, codes + code_bytes, Device::host(), storage);
  }

  Ceiling read_bandwidth(const TimingLimits& limits) const override {
    // Beyond the cache by far, but no more than a quarter of what is there.
    const int64_t wanted = std::max<int64_t>(3 * cache_bytes(), int64_t{512} << 20);
    return measure_dram_read(std::min(wanted, free_bytes() / 4), limits.min_seconds);
  }

  std::vector<Ceiling> peaks(const TimingLimits& limits) const override {
    return measure_cpu_peaks(limits.min_seconds);
  }
  std::optional<Ceiling> operand_peak(const OperandSample&) const override { return std::nullopt; }

  std::optional<double> peak_between(std::span<const LayerCall> rotation,
                                     const Ceiling& peak) const override {
    size_t turn = 0;
    return measure_cpu_peak_behind(peak, [&] { rotation[turn++ % rotation.size()](nullptr, nullptr); });
  }

  std::vector<double> time(std::span<const LayerCall> rotation, const TimingLimits& limits) const override {
    std::vector<double> samples;
    double total = 0.0;
    for (const LayerCall& call : rotation) {
      const double seconds = time_call(call);
      total += seconds;
      if (total > kMostOvertime * limits.min_seconds) break;  // warm enough
    }
    total = 0.0;
    for (size_t i = 0; !is_enough(limits, static_cast<int>(samples.size()), total); ++i) {
      samples.push_back(time_call(rotation[i % rotation.size()]));
      total += samples.back();
    }
    return samples;
  }

  void run_side_by_side(std::span<const LayerCall> calls, int times) const override {
    run_on_threads(calls.size(), [&](size_t i) {
      for (int time = 0; time < times; ++time) calls[i](nullptr, nullptr);
    });
  }
  std::function<void()> capture(const LayerCall&) const override { return {}; }

  std::vector<StageTime> time_stages(std::span<const LayerCall> rotation) const override {
    StageSums sums;
    HostStageClock clock(sums);
    for (const LayerCall& call : rotation) {
      clock.start();
      call(nullptr, &clock);
    }
    return sums.means(rotation.size());
  }

  void profile(const LayerCall&) const override {
    fail(
        ErrorCode::kInvalidArgument,
        "--profile: expected a backend on a GPU, found one that computes on the CPU, whose profilers need no "
        "mark");
  }

  std::vector<float> multiply(const ExpertWeights& weights, ExpertGemm gemm, const SampledRows& rows,
                              std::span<const int64_t> columns) const override {
    return reference::multiply_sampled(weights, gemm, rows, columns);
  }
  int64_t most_checked_columns() const override { return 96; }
  int64_t most_checked_rows_of_expert() const override { return 128; }
  int64_t most_checked_tokens() const override { return 16; }

 private:
  static double time_call(const LayerCall& call) {
    const auto start = Clock::now();
    call(nullptr, nullptr);
    return seconds_between(start, Clock::now());
  }
};

}  // namespace

std::unique_ptr<Testbed> make_cpu_testbed() {
  return std::make_unique<CpuTestbed>();
}

}  // namespace fourfold
