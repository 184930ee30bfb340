// Streams and graphs for tests, and the main function of those that need a GPU: exit code 77 where there is
// none.
#include "cuda_support.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "cuda/check.cuh"

namespace fourfold {
namespace {

constexpr int kSkipped = 77;

}  // namespace

__attribute__((weak)) std::string why_not_on_this_gpu() {
  return "";
}

TestStream::TestStream() {
  cudaStream_t stream = nullptr;
  cuda::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  stream_ = stream;
}

TestStream::~TestStream() {
  cudaStreamDestroy(cuda::as_stream(stream_));
}

CapturedGraph::CapturedGraph(const std::function<void(void* stream)>& enqueue) {
  const cudaStream_t stream = cuda::as_stream(stream_.get());
  cudaGraph_t graph = nullptr;
  cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  enqueue(stream);
  cuda::check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t error = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  cuda::check(error, "cudaGraphInstantiate");
  graph_ = executable;
}

CapturedGraph::~CapturedGraph() {
  cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph_));
}

void CapturedGraph::replay() {
  cuda::check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph_), cuda::as_stream(stream_.get())),
              "cudaGraphLaunch");
  stream_.synchronize();
}

std::vector<Bf16> random_rows(Engine& random, int64_t rows, int64_t cols, Values values) {
  std::normal_distribution<float> normal;
  std::vector<Bf16> result(static_cast<size_t>(rows * cols));
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t kind = values == Values::kOrdinary ? 5 : below(random, 7);
    const float magnitude = std::exp2(static_cast<float>(below(random, 12)) - 6.0f);
    for (int64_t col = 0; col < cols; ++col) {
      const auto bits = static_cast<uint16_t>(random());
      uint16_t value = encode_bf16(magnitude * normal(random)).bits;
      if (kind == 0) value = bits;                              // infinities and NaNs among them
      if (kind == 1) value = bits & 0x807F;                     // subnormals
      if (kind == 2) value = bits & 0x8000;                     // zeros of both signs
      if (kind == 3) value = (bits & 0x807F) | 0x7F00;          // up to the largest
      if (kind == 4 && below(random, 64) == 0) value = 0x7F80;  // an infinity
      if (kind == 6) value = (bits & 0x80FF) | 0x0180;          // around 2^-124
      result[static_cast<size_t>(row * cols + col)] = Bf16{value};
    }
  }
  return result;
}

uint64_t test_seed() {
  static const uint64_t seed = [] {
    const char* given = std::getenv("FOURFOLD_SEED");
    const uint64_t chosen = given ? std::strtoull(given, nullptr, 10) : std::random_device()();
    std::printf("seed %llu\n", static_cast<unsigned long long>(chosen));
    return chosen;
  }();
  return seed;
}

}  // namespace fourfold

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (testing::GTEST_FLAG(list_tests)) return RUN_ALL_TESTS();
  const fourfold::cuda::GpuProbe probe = fourfold::cuda::probe_gpu();
  if (!probe.gpu) {
    std::printf("skipped: no CUDA device: %s\n", probe.why_none.c_str());
    return fourfold::kSkipped;
  }
  std::printf("%s, compute capability %d.%d\n", probe.gpu->name.c_str(), probe.gpu->major, probe.gpu->minor);
  if (const std::string reason = fourfold::why_not_on_this_gpu(); !reason.empty()) {
    std::printf("skipped: %s\n", reason.c_str());
    return fourfold::kSkipped;
  }
  return RUN_ALL_TESTS();
}
