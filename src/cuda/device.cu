// Devices, their memory, and copies.
#include "cuda/device.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "cuda/check.cuh"

namespace fourfold::cuda {
namespace {

class DeviceMemory final : public Memory {
 public:
  explicit DeviceMemory(int index) : index_(index) {}

  Device device() const override { return Device::cuda(index_); }

  Buffer allocate(size_t bytes) const override {
    const DeviceScope scope(index_);
    void* data = nullptr;
    if (bytes == 0) return {};
    const cudaError_t error = cudaMalloc(&data, bytes);
    if (error != cudaSuccess) check(error, ("cudaMalloc of " + std::to_string(bytes) + " bytes").c_str());
    return {data, bytes, device(), [](void* owned) { cudaFree(owned); }};
  }

  void copy_from_host(void* to, const void* from, size_t bytes) const override {
    copy(to, from, bytes, cudaMemcpyHostToDevice);
  }
  void copy_to_host(void* to, const void* from, size_t bytes) const override {
    copy(to, from, bytes, cudaMemcpyDeviceToHost);
  }
  void fill(void* to, uint8_t byte, size_t bytes) const override {
    if (bytes == 0) return;
    const DeviceScope scope(index_);
    check(cudaMemset(to, byte, bytes), "cudaMemset");
  }
  void synchronize() const override {
    const DeviceScope scope(index_);
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }

 private:
  void copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) const {
    if (bytes == 0) return;
    const DeviceScope scope(index_);
    check(cudaMemcpy(to, from, bytes, kind), "cudaMemcpy");
  }

  int index_;
};

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

constexpr int kWordsAtOnce = 512;  // 2 of the 4 KiB that kernel arguments may have

struct Words {
  uint32_t words[kWordsAtOnce];
};

__global__ void write_words(uint32_t* to, const __grid_constant__ Words values, int count) {
  const auto i = static_cast<int>(threadIdx.x);
  if (i < count) to[i] = values.words[i];
}

}  // namespace

GpuProbe probe_gpu() {
  int count = 0, index = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count == 0) error = cudaErrorNoDevice;
  if (error == cudaSuccess) error = cudaGetDevice(&index);
  cudaDeviceProp properties{};
  if (error == cudaSuccess) error = cudaGetDeviceProperties(&properties, index);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return {std::nullopt, cudaGetErrorString(error)};
  }
  return {Gpu{index, properties.name, properties.major, properties.minor, properties.multiProcessorCount,
              properties.totalGlobalMem},
          ""};
}

const Memory& device_memory(int index) {
  static const auto memories = []<size_t... kIndex>(std::index_sequence<kIndex...>) {
    return std::array{DeviceMemory(static_cast<int>(kIndex))...};
  }
  (std::make_index_sequence<kMostDevices>());
  if (index < 0 || index >= kMostDevices) {
    throw Error(ErrorCode::kInvalidArgument, "CUDA device: expected an index below " +
                                                 std::to_string(kMostDevices) + ", found " +
                                                 std::to_string(index));
  }
  return memories[static_cast<size_t>(index)];
}

int current_device() {
  int index = 0;
  check(cudaGetDevice(&index), "cudaGetDevice");
  return index;
}

int multiprocessor_count() {
  return attribute(cudaDevAttrMultiProcessorCount, current_device());
}

DeviceScope::DeviceScope(int index) : previous_(current_device()), index_(index) {
  if (index_ != previous_) check(cudaSetDevice(index_), "cudaSetDevice");
}

DeviceScope::~DeviceScope() {
  if (index_ != previous_) cudaSetDevice(previous_);
}

void copy_async(void* to, const void* from, size_t bytes, void* stream) {
  if (bytes == 0) return;
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, as_stream(stream)), "cudaMemcpyAsync");
}

void copy_rows_async(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t row_bytes,
                     int64_t rows, void* stream) {
  if (rows == 0 || row_bytes == 0) return;
  check(cudaMemcpy2DAsync(to, static_cast<size_t>(to_stride), from, static_cast<size_t>(from_stride),
                          static_cast<size_t>(row_bytes), static_cast<size_t>(rows), cudaMemcpyDefault,
                          as_stream(stream)),
        "cudaMemcpy2DAsync");
}

void fill_async(void* to, uint8_t byte, size_t bytes, void* stream) {
  if (bytes == 0) return;
  check(cudaMemsetAsync(to, byte, bytes, as_stream(stream)), "cudaMemsetAsync");
}

void write_words_async(void* to, const void* words, int64_t count, void* stream) {
  for (int64_t first = 0; first < count; first += kWordsAtOnce) {
    const int64_t part = std::min<int64_t>(count - first, kWordsAtOnce);
    Words values;
    std::memcpy(values.words, static_cast<const uint32_t*>(words) + first, static_cast<size_t>(part) * 4);
    write_words<<<1, kWordsAtOnce, 0, as_stream(stream)>>>(static_cast<uint32_t*>(to) + first, values,
                                                           static_cast<int>(part));
    check_launch("write_words");
  }
}

void synchronize(void* stream) {
  check(cudaStreamSynchronize(as_stream(stream)), "cudaStreamSynchronize");
}

}  // namespace fourfold::cuda
