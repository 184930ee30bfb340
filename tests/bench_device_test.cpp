// What the benchmark does on a GPU: weights made there, the float64 oracle, ceilings, and replays timed.
#include <array>
#include <numeric>

#include "cuda/bench_device.h"
#include "cuda/cublas_peak.h"
#include "cuda/naive_multiply.h"
#include "cuda_support.h"
#include "fourfold/error.h"
#include "reference/sampled_multiply.h"

namespace fourfold {
namespace {

const Memory& gpu_memory() {
  return cuda::device_memory(cuda::current_device());
}

/// A layer on the host, with its bytes.
struct HostLayer {
  std::vector<uint8_t> codes, scales;
  ExpertWeights weights;

  explicit HostLayer(const GeneratedLayer& layer)
      : codes(static_cast<size_t>(layer.code_bytes())), scales(static_cast<size_t>(layer.scale_bytes())) {
    generate_on_host(layer, codes.data(), scales.data());
    weights = generated_experts(layer, codes.data(), scales.data(), Device::host(), nullptr);
  }
};

TEST(GeneratedExperts, AreTheSameBytesOnDeviceAndHost) {
  const GeneratedLayer layer{5, 48, 80, 11};
  const HostLayer host(layer);
  const ExpertWeights weights = cuda::generate_experts(layer, gpu_memory());
  const auto& gate = std::get<BlockScaledView>(weights.experts.front().gate);
  std::vector<uint8_t> codes(host.codes.size()), scales(host.scales.size());
  gpu_memory().copy_to_host(codes.data(), gate.codes.data, codes.size());
  gpu_memory().copy_to_host(scales.data(), gate.scales, scales.size());
  EXPECT_EQ(codes, host.codes);
  EXPECT_EQ(scales, host.scales);
  EXPECT_EQ(device_of(weights.experts.back().down), gpu_memory().device());
}

/// Random rows for experts 0, 0, 2, 2, 2 and 4, of 16-bit values that a format could have staged.
SampledRows random_sample(Engine& random, int64_t depth, int terms) {
  SampledRows rows;
  rows.expert_of = {0, 0, 2, 2, 2, 4};
  rows.rows = static_cast<int64_t>(rows.expert_of.size());
  rows.depth = depth;
  rows.terms = terms;
  for (int64_t i = 0; i < terms * rows.rows * depth; ++i) {
    rows.values.push_back(static_cast<float>(below(random, 4001) - 2000) / 64.0f);
  }
  for (int64_t i = 0; i < rows.rows; ++i) {
    rows.row_scales.push_back(static_cast<float>(1 + below(random, 1000)) / 1024.0f);
  }
  return rows;
}

// Values are multiples of 2^-6 below 2^5, weights whole numbers below 2^12 (codes are multiples of 1/2,
// scales of 2): a sum of 2^13 products is a multiple of 2^-6 below 2^30, which float64 holds exactly. So the
// order of summation does not matter, and results are equal.
TEST(SampledMultiply, EqualsTheHosts) {
  const GeneratedLayer layer{5, 2096, 144, 3};  // more than one piece of a weight row, and a ragged one
  const HostLayer host(layer);
  const ExpertWeights weights = cuda::generate_experts(layer, gpu_memory());
  Engine random = engine(1);
  for (const int terms : {1, 2}) {
    for (const ExpertGemm gemm : {ExpertGemm::kGateUp, ExpertGemm::kDown}) {
      const bool down = gemm == ExpertGemm::kDown;
      const SampledRows rows = random_sample(random, down ? layer.intermediate : layer.hidden, terms);
      std::vector<int64_t> columns(static_cast<size_t>(down ? layer.hidden : 2 * layer.intermediate));
      std::iota(columns.begin(), columns.end(), 0);
      const auto expected = reference::multiply_sampled(host.weights, gemm, rows, columns);
      const auto found = cuda::multiply_sampled(gpu_memory(), weights, gemm, rows, columns);
      EXPECT_EQ(first_difference<float>(expected, found), -1) << "down " << down << ", terms " << terms;
      const std::array<int64_t, 3> few = {1, 47, columns.back()};
      const auto part = cuda::multiply_sampled(gpu_memory(), weights, gemm, rows, few);
      for (size_t i = 0; i < part.size(); ++i) {
        const size_t at = i / 3 * columns.size() + static_cast<size_t>(few[i % 3]);
        EXPECT_EQ(part[i], expected[at]);
      }
    }
  }
}

TEST(SampledMultiply, RefusesBiases) {
  ExpertWeights weights = cuda::generate_experts({5, 32, 32, 3}, gpu_memory());
  weights.experts[2].up_bias = DenseView{};
  Engine random = engine(2);
  const std::array<int64_t, 1> column = {0};
  EXPECT_THROW(cuda::multiply_sampled(gpu_memory(), weights, ExpertGemm::kGateUp,
                                      random_sample(random, 32, 1), column),
               Error);
}

TEST(ReadBandwidth, IsThatOfDeviceMemory) {
  // From a small card's to beyond what any has; a loop that was optimised away would be above.
  const double rate = cuda::measure_read_bandwidth(gpu_memory(), int64_t{2} << 30);
  std::printf("read bandwidth %.1f GB/s\n", rate / 1e9);
  EXPECT_GT(rate, 1e11);
  EXPECT_LT(rate, 2e13);
}

TEST(Bf16Peak, IsMeasuredWhereCublasIs) {
  const GeneratedLayer layer{2, 256, 256, 3};
  const ExpertWeights weights = cuda::generate_experts(layer, gpu_memory());
  const auto& gate = std::get<BlockScaledView>(weights.experts.front().gate);
  Engine random = engine(3);
  const std::vector<Bf16> activations = random_rows(random, 16, 256, Values::kOrdinary);
  const cuda::MeasuredPeak peak =
      cuda::measure_bf16_peak(gpu_memory(), gate.codes.data, gate.scales, layer.codes(), activations);
  std::printf("bf16 peak %.1f TFLOP/s, %s\n", peak.operations_per_second.value_or(0) / 1e12,
              peak.note.c_str());
  if (!peak.operations_per_second) GTEST_SKIP() << peak.note;
  EXPECT_GT(*peak.operations_per_second, 1e13);
  EXPECT_LT(*peak.operations_per_second, 1e16);
}

/// Fills `megabytes`, so that its time is known to within a factor: writing runs at a third to all of the
/// read bandwidth.
cuda::EnqueueCall fill_call(const DeviceArray<uint8_t>& array, int& calls) {
  return [&array, &calls](void* stream, StageObserver* observer) {
    ++calls;
    cuda::fill_async(array.data(), 1, array.size() / 2, stream);
    if (observer) observer->after("first half", stream);
    cuda::fill_async(array.data() + array.size() / 2, 2, array.size() / 2, stream);
    if (observer) observer->after("second half", stream);
  };
}

TEST(ReplayTimer, TimesEveryCallOfTheGraph) {
  constexpr size_t kBytes = size_t{1} << 30;
  const DeviceArray<uint8_t> array(kBytes);
  int calls = 0;
  const std::vector<cuda::EnqueueCall> rotation(4, fill_call(array, calls));
  cuda::ReplayTimer timer(rotation);
  EXPECT_EQ(calls, 4) << "captured once";
  const std::vector<double> seconds = timer.time([](int samples, double) { return samples >= 20; });
  EXPECT_EQ(calls, 4) << "replayed, not called again";
  ASSERT_GE(seconds.size(), 20u);
  const double rate = cuda::measure_read_bandwidth(gpu_memory(), int64_t{2} << 30);
  for (const double sample : seconds) {
    EXPECT_GT(sample, 0.8 * kBytes / rate) << "faster than memory: not every call is in the time";
    EXPECT_LT(sample, 5.0 * kBytes / rate) << "slower than memory by far: the host is in the time";
  }
  EXPECT_EQ(array.get()[kBytes - 1], 2) << "the replays ran";
}

TEST(StageTimes, AddUpToTheCall) {
  constexpr size_t kBytes = size_t{1} << 29;
  const DeviceArray<uint8_t> array(kBytes);
  int calls = 0;
  const std::vector<cuda::EnqueueCall> rotation(3, fill_call(array, calls));
  const auto stages = cuda::time_stages(rotation);
  ASSERT_EQ(stages.size(), 6u);
  for (size_t i = 0; i < stages.size(); ++i) {
    EXPECT_EQ(stages[i].first, i % 2 == 0 ? "first half" : "second half");
    // Halves of one size: within a factor of two of each other, launches included.
    EXPECT_GT(stages[i].second, 0.5 * stages[i ^ 1].second);
  }
}

TEST(ProfiledCall, IsRunOnceAndItsErrorIsTheCallers) {
  constexpr size_t kBytes = 1 << 20;
  const DeviceArray<uint8_t> array(kBytes);
  int calls = 0;
  cuda::profile_call(fill_call(array, calls));
  EXPECT_EQ(calls, 1);
  EXPECT_EQ(array.get()[kBytes - 1], 2);
  EXPECT_THROW(cuda::profile_call([](void*, StageObserver*) { throw Error(ErrorCode::kDevice, "no"); }),
               Error);
}

TEST(ReplayTimer, RefusesCallsThatCannotBeCaptured) {
  const std::vector<cuda::EnqueueCall> rotation = {
      [](void* stream, StageObserver*) { cuda::synchronize(stream); }};
  EXPECT_THROW(cuda::ReplayTimer{rotation}, Error);
  // And the device works on.
  const DeviceArray<uint8_t> array(16);
  EXPECT_EQ(array.get()[3], kPoisonByte);
}

}  // namespace
}  // namespace fourfold
