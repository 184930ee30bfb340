// The memory in which a backend computes, for callers that bring data there and back.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fourfold/export.h"
#include "fourfold/tensor.h"

namespace FOURFOLD_EXPORT fourfold {

/// What Memory::allocate aligns to, in bytes; enough for a layer's workspace.
inline constexpr size_t kMemoryAlignment = 256;

/// Copies and fills are ordered with each other and with work enqueued on the backend's default stream;
/// work on other streams needs synchronize() first. Throws Error when the device refuses.
class Memory {
 public:
  virtual ~Memory() = default;

  virtual Device device() const = 0;
  /// Uninitialised bytes at a multiple of kMemoryAlignment. Throws std::bad_alloc or Error.
  virtual Buffer allocate(size_t bytes) const = 0;
  /// Returns when `from` may be reused.
  virtual void copy_from_host(void* to, const void* from, size_t bytes) const = 0;
  /// Returns when the bytes are there.
  virtual void copy_to_host(void* to, const void* from, size_t bytes) const = 0;
  virtual void fill(void* to, uint8_t byte, size_t bytes) const = 0;
  /// Waits for everything enqueued on the device, on any stream.
  virtual void synchronize() const = 0;
};

/// Memory of the host.
const Memory& host_memory();

}  // namespace fourfold
