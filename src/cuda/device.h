// Which GPU is here, and its memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "fourfold/memory.h"

namespace fourfold::cuda {

struct Gpu {
  int index = 0;
  std::string name;
  int major = 0, minor = 0;  ///< compute capability
  int multiprocessors = 0;
  size_t memory_bytes = 0;
};

/// The calling thread's current device; without one, why there is none, as text.
struct GpuProbe {
  std::optional<Gpu> gpu;
  std::string why_none;
};
GpuProbe probe_gpu();

/// Memory of device `index`; the object lives as long as the process. Throws Error beyond kMostDevices.
inline constexpr int kMostDevices = 64;
const Memory& device_memory(int index);

/// Index of the calling thread's current device. Throws Error where there is none.
int current_device();
/// Multiprocessors of the current device.
int multiprocessor_count();

/// Makes a device the calling thread's current one for the life of the scope.
class DeviceScope {
 public:
  explicit DeviceScope(int index);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_ = 0;
  int index_ = 0;
};

// Enqueued on `stream` (a cudaStream_t); each throws Error when the device refuses.

/// From and to any memory. A copy from pageable host memory returns when `from` may be reused.
void copy_async(void* to, const void* from, size_t bytes, void* stream);
/// `rows` rows of `row_bytes`, strides in bytes.
void copy_rows_async(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t row_bytes,
                     int64_t rows, void* stream);
void fill_async(void* to, uint8_t byte, size_t bytes, void* stream);
/// 4-byte words that travel as kernel arguments, so that a captured graph holds their values.
void write_words_async(void* to, const void* words, int64_t count, void* stream);
void synchronize(void* stream);

}  // namespace fourfold::cuda
