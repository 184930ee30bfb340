#include "tools/cuda_testbed.h"

#include <algorithm>
#include <limits>
#include <variant>

#include "base/fail.h"
#include "cuda/bench_device.h"
#include "cuda/cublas_peak.h"
#include "cuda/device.h"
#include "cuda/naive_multiply.h"

namespace fourfold {
namespace {

class CudaTestbed final : public Testbed {
 public:
  explicit CudaTestbed(const Memory& memory) : memory_(memory) {}

  const Memory& memory() const override { return memory_; }
  std::string machine() const override {
    const cuda::GpuProbe probe = cuda::probe_gpu();
    if (!probe.gpu) return probe.why_none;
    return fmt::format("{}, {} multiprocessors", probe.gpu->name, probe.gpu->multiprocessors);
  }
  int64_t cache_bytes() const override { return cuda::l2_cache_bytes(); }
  int64_t free_bytes() const override { return cuda::free_memory_bytes(); }

  ExpertWeights generate(const GeneratedLayer& layer) const override {
    return cuda::generate_experts(layer, memory_);
  }

  Ceiling read_bandwidth(const TimingLimits&) const override {
    const int64_t bytes = std::min<int64_t>(int64_t{4} << 30, free_bytes() / 4);
    return {"device memory read", cuda::measure_read_bandwidth(memory_, bytes),
            fmt::format("{:.1f} GB, sequential", 1e-9 * static_cast<double>(bytes))};
  }

  std::vector<Ceiling> peaks(const TimingLimits&) const override { return {}; }
  /// The operands' peak is measured long enough for the chip's power to limit it.
  std::optional<double> peak_between(std::span<const LayerCall>, const Ceiling&) const override {
    return std::nullopt;
  }
  std::optional<Ceiling> operand_peak(const OperandSample& sample) const override {
    // Generated codes are one array, and so are scales: gate of the first expert is where both start.
    const ExpertWeights& weights = *sample.weights;
    const auto& gate = std::get<BlockScaledView>(weights.experts.front().gate);
    const int64_t values = 3 * weights.count() * weights.hidden * weights.intermediate;
    const cuda::MeasuredPeak peak =
        cuda::measure_bf16_peak(memory_, gate.codes.data, gate.scales, values, sample.activations);
    return Ceiling{"bf16 tensor cores", peak.operations_per_second, peak.note};
  }

  std::vector<double> time(std::span<const LayerCall> rotation, const TimingLimits& limits) const override {
    cuda::ReplayTimer timer(rotation);
    return timer.time([&](int samples, double seconds) { return is_enough(limits, samples, seconds); });
  }

  void run_side_by_side(std::span<const LayerCall> calls, int times) const override {
    run_on_threads(calls.size(), [&](size_t i) {
      const cuda::DeviceScope device(memory_.device().index);
      cuda::ReplayTimer timer(calls.subspan(i, 1));  // a graph, on a stream of its own
      timer.time([&](int samples, double) { return samples >= times; });
    });
  }
  std::function<void()> capture(const LayerCall& call) const override {
    const auto timer = std::make_shared<cuda::ReplayTimer>(std::span(&call, 1));
    return [timer] { timer->time([](int samples, double) { return samples >= 1; }); };
  }

  std::vector<StageTime> time_stages(std::span<const LayerCall> rotation) const override {
    StageSums sums;
    for (const auto& [stage, seconds] : cuda::time_stages(rotation)) sums.add(stage, seconds);
    return sums.means(rotation.size());
  }

  void profile(const LayerCall& call) const override { cuda::profile_call(call); }

  std::vector<float> multiply(const ExpertWeights& weights, ExpertGemm gemm, const SampledRows& rows,
                              std::span<const int64_t> columns) const override {
    return cuda::multiply_sampled(memory_, weights, gemm, rows, columns);
  }
  int64_t most_checked_columns() const override { return std::numeric_limits<int64_t>::max(); }
  int64_t most_checked_rows_of_expert() const override { return 2048; }
  int64_t most_checked_tokens() const override { return 64; }

 private:
  const Memory& memory_;
};

}  // namespace

std::unique_ptr<Testbed> make_cuda_testbed(const Memory& memory) {
  return std::make_unique<CudaTestbed>(memory);
}

}  // namespace fourfold
