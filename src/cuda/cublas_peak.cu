#include "cuda/cublas_peak.h"

#include <algorithm>
#include <vector>

#include "cuda/check.cuh"

#if __has_include(<cublas_v2.h>)
#include <cublas_v2.h>
#include <dlfcn.h>
#define FOURFOLD_HAS_CUBLAS_HEADER 1
#else
#define FOURFOLD_HAS_CUBLAS_HEADER 0
#endif

namespace fourfold::cuda {

#if FOURFOLD_HAS_CUBLAS_HEADER
namespace {

constexpr int kExtent = 8192;  // M, N and K

/// out[i] = bf16(code x scale) of the i-th value, going round after `count` values. Exact.
__global__ void decode_weights_kernel(const uint8_t* codes, const uint8_t* scales, int64_t count, Bf16* out) {
  const int64_t total = int64_t{kExtent} * kExtent, stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < total; i += stride) {
    const int64_t at = i % count;
    const auto code = static_cast<uint8_t>(codes[at / 2] >> (4 * (at % 2)) & 15);
    out[i] = encode_bf16(decode_e2m1(code) * decode_e4m3(scales[at / 16]));
  }
}

__global__ void repeat_kernel(const Bf16* values, int64_t count, Bf16* out) {
  const int64_t total = int64_t{kExtent} * kExtent, stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < total; i += stride) {
    out[i] = values[i % count];
  }
}

/// cublasGemmEx, which the header overloads.
using GemmEx = cublasStatus_t (*)(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int,
                                  const void*, const void*, cudaDataType, int, const void*, cudaDataType, int,
                                  const void*, void*, cudaDataType, int, cublasComputeType_t,
                                  cublasGemmAlgo_t);

/// The library, as far as it is needed.
class Cublas {
 public:
  Cublas() {
    for (const char* name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so"}) {
      library_ = dlopen(name, RTLD_NOW | RTLD_LOCAL);
      if (library_ != nullptr) break;
    }
    if (library_ == nullptr) return;
    find("cublasCreate_v2", create_);
    find("cublasDestroy_v2", destroy_);
    find("cublasSetStream_v2", set_stream_);
    find("cublasGemmEx", gemm_);
    const bool complete =
        create_ != nullptr && destroy_ != nullptr && set_stream_ != nullptr && gemm_ != nullptr;
    if (complete && create_(&handle_) != CUBLAS_STATUS_SUCCESS) handle_ = nullptr;
  }
  ~Cublas() {
    if (handle_ != nullptr) destroy_(handle_);
  }
  Cublas(const Cublas&) = delete;
  Cublas& operator=(const Cublas&) = delete;

  bool is_usable() const { return handle_ != nullptr; }

  /// d = a . b^T, all [kExtent, kExtent] row-major; as cuBLAS sees it, column-major, d^T = b . a^T.
  bool multiply(const Bf16* a, const Bf16* b, Bf16* d, cudaStream_t stream) const {
    const float one = 1.0f, zero = 0.0f;
    return set_stream_(handle_, stream) == CUBLAS_STATUS_SUCCESS &&
           gemm_(handle_, CUBLAS_OP_T, CUBLAS_OP_N, kExtent, kExtent, kExtent, &one, b, CUDA_R_16BF, kExtent,
                 a, CUDA_R_16BF, kExtent, &zero, d, CUDA_R_16BF, kExtent, CUBLAS_COMPUTE_32F,
                 CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_SUCCESS;
  }

 private:
  template <class Function>
  void find(const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library_, name));
  }

  void* library_ = nullptr;  // stays loaded: unloading CUDA libraries is not safe
  cublasHandle_t handle_ = nullptr;
  decltype(&cublasCreate_v2) create_ = nullptr;
  decltype(&cublasDestroy_v2) destroy_ = nullptr;
  decltype(&cublasSetStream_v2) set_stream_ = nullptr;
  GemmEx gemm_ = nullptr;
};

/// Seconds of `count` multiplications back to back.
double time_multiplications(const Cublas& cublas, const Bf16* a, const Bf16* b, Bf16* d, int count) {
  cudaEvent_t start = nullptr, end = nullptr;
  check(cudaEventCreate(&start), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  check(cudaEventRecord(start, nullptr), "cudaEventRecord");
  bool good = true;
  for (int i = 0; i < count; ++i) good = good && cublas.multiply(a, b, d, nullptr);
  check(cudaEventRecord(end, nullptr), "cudaEventRecord");
  check(cudaEventSynchronize(end), "cudaEventSynchronize");
  float milliseconds = 0.0f;
  check(cudaEventElapsedTime(&milliseconds, start, end), "cudaEventElapsedTime");
  cudaEventDestroy(start);
  cudaEventDestroy(end);
  if (!good) throw Error(ErrorCode::kDevice, "cublasGemmEx failed on bf16 matrices of 8192 x 8192");
  return 1e-3 * milliseconds;
}

}  // namespace

MeasuredPeak measure_bf16_peak(const Memory& memory, const uint8_t* codes, const uint8_t* scales,
                               int64_t count, std::span<const Bf16> activations) {
  // About a third of a second each at 700 TFLOP/s: the clock has come down to what the power allows.
  constexpr int kWarmUp = 200, kTimed = 200;
  static const Cublas cublas;
  if (!cublas.is_usable()) return {std::nullopt, "no libcublas.so.13 or .12 could be loaded"};
  constexpr size_t kBytes = size_t{kExtent} * kExtent * sizeof(Bf16);
  const Buffer a = memory.allocate(kBytes), b = memory.allocate(kBytes), d = memory.allocate(kBytes);
  const Buffer values = memory.allocate(activations.size_bytes());
  const auto pointer = [](const Buffer& buffer) { return reinterpret_cast<Bf16*>(buffer.data()); };
  memory.copy_from_host(values.data(), activations.data(), activations.size_bytes());
  repeat_kernel<<<4096, 256>>>(pointer(values), static_cast<int64_t>(activations.size()), pointer(a));
  check_launch("repeat_kernel");
  decode_weights_kernel<<<4096, 256>>>(codes, scales, count, pointer(b));
  check_launch("decode_weights_kernel");
  time_multiplications(cublas, pointer(a), pointer(b), pointer(d), kWarmUp);
  const double seconds = time_multiplications(cublas, pointer(a), pointer(b), pointer(d), kTimed);
  return {2.0 * kTimed * double{kExtent} * kExtent * kExtent / seconds,
          "cuBLAS, 8192 x 8192 x 8192, operands decoded from the case"};
}

#else

MeasuredPeak measure_bf16_peak(const Memory&, const uint8_t*, const uint8_t*, int64_t,
                               std::span<const Bf16>) {
  return {std::nullopt, "built without cublas_v2.h"};
}

#endif

}  // namespace fourfold::cuda
