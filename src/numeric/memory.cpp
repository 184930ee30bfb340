// Memory of the host.
#include "fourfold/memory.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "fourfold/scale_layout.h"

namespace fourfold {
namespace {

class HostMemory final : public Memory {
 public:
  Device device() const override { return Device::host(); }

  Buffer allocate(size_t bytes) const override {
    const auto rounded =
        static_cast<size_t>(round_up(static_cast<int64_t>(bytes), static_cast<int64_t>(kMemoryAlignment)));
    void* data = std::aligned_alloc(kMemoryAlignment, rounded);
    if (data == nullptr && bytes != 0) throw std::bad_alloc();
    return {data, bytes, Device::host(), [](void* owned) { std::free(owned); }};
  }

  void copy_from_host(void* to, const void* from, size_t bytes) const override { copy(to, from, bytes); }
  void copy_to_host(void* to, const void* from, size_t bytes) const override { copy(to, from, bytes); }
  void fill(void* to, uint8_t byte, size_t bytes) const override {
    if (bytes != 0) std::memset(to, byte, bytes);
  }
  void synchronize() const override {}

 private:
  static void copy(void* to, const void* from, size_t bytes) {
    if (bytes != 0) std::memcpy(to, from, bytes);
  }
};

}  // namespace

const Memory& host_memory() {
  static const HostMemory memory;
  return memory;
}

}  // namespace fourfold
