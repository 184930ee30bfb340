// For tests that need a GPU: arrays in its memory, random data, comparisons, and graphs of captured work.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "fourfold/tensor.h"

namespace fourfold {

inline constexpr uint8_t kPoisonByte = 0xFB;  ///< of what a kernel has to write, or must leave alone

/// An array on the current device; poisoned unless it starts with values.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count), buffer_(memory().allocate(count * sizeof(T))) {
    memory().fill(buffer_.data(), kPoisonByte, buffer_.bytes());
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) { set(values); }

  void set(const std::vector<T>& values) {
    memory().copy_from_host(buffer_.data(), values.data(), values.size() * sizeof(T));
  }
  std::vector<T> get() const {
    std::vector<T> values(count_);
    memory().synchronize();
    memory().copy_to_host(values.data(), buffer_.data(), count_ * sizeof(T));
    return values;
  }

  T* data() const { return reinterpret_cast<T*>(buffer_.data()); }
  size_t size() const { return count_; }
  std::span<T> span() const { return {data(), count_}; }
  MatrixView<T> matrix(int64_t rows, int64_t cols) const { return matrix(rows, cols, cols); }
  MatrixView<T> matrix(int64_t rows, int64_t cols, int64_t stride) const {
    return {data(), rows, cols, stride, memory().device()};
  }

 private:
  static const Memory& memory() { return cuda::device_memory(cuda::current_device()); }

  size_t count_ = 0;
  Buffer buffer_;
};

/// A stream of its own that does not wait for the default stream.
class TestStream {
 public:
  TestStream();
  ~TestStream();
  TestStream(const TestStream&) = delete;
  TestStream& operator=(const TestStream&) = delete;

  void* get() const { return stream_; }
  void synchronize() const { cuda::synchronize(stream_); }

 private:
  void* stream_ = nullptr;
};

/// What `enqueue` enqueues on the stream it is given, captured once; fails the capture if it synchronises or
/// allocates.
class CapturedGraph {
 public:
  explicit CapturedGraph(const std::function<void(void* stream)>& enqueue);
  ~CapturedGraph();
  CapturedGraph(const CapturedGraph&) = delete;
  CapturedGraph& operator=(const CapturedGraph&) = delete;

  /// Runs it and waits.
  void replay();

 private:
  TestStream stream_;
  void* graph_ = nullptr;
};

/// Why these tests can't run on the GPU that is here; empty where they can. Tests of one backend define it
/// (weakly: "").
std::string why_not_on_this_gpu();

/// Seed of this run; printed, and set by the environment variable FOURFOLD_SEED to repeat a run.
uint64_t test_seed();

using Engine = std::mt19937_64;

/// A stream of random numbers for this run and `salt`.
inline Engine engine(uint64_t salt) {
  return Engine(test_seed() * 1000003 + salt);
}

inline int64_t below(Engine& random, int64_t count) {
  return static_cast<int64_t>(random() % static_cast<uint64_t>(count));
}

enum class Values : uint8_t { kOrdinary, kHostile };

/// N(0, 1) rows, every row with a magnitude of its own. Hostile ones: rows of arbitrary bits, subnormals,
/// zeros, the largest numbers, and here and there an infinity or a NaN.
std::vector<Bf16> random_rows(Engine& random, int64_t rows, int64_t cols, Values values);

inline bool is_nan(Bf16 value) {
  return (value.bits & 0x7FFF) > 0x7F80;
}
inline bool is_nan(float value) {
  return value != value;
}
inline bool is_nan(uint8_t) {
  return false;
}

/// Index of the first element that differs, -1 for none. Two NaNs are alike: processors choose their bits.
template <class T>
int64_t first_difference(std::span<const T> a, std::span<const T> b) {
  if (a.size() != b.size()) return static_cast<int64_t>(std::min(a.size(), b.size()));
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::memcmp(&a[i], &b[i], sizeof(T)) != 0 && !(is_nan(a[i]) && is_nan(b[i]))) {
      return static_cast<int64_t>(i);
    }
  }
  return -1;
}

template <class T>
bool is_poison(const T& value) {
  std::array<uint8_t, sizeof(T)> bytes{}, poison{};
  poison.fill(kPoisonByte);
  std::memcpy(bytes.data(), &value, sizeof(T));
  return bytes == poison;
}

/// The first `count` elements are `expected`; those behind are as they were.
template <class T>
void expect_written(const char* what, const std::vector<T>& expected, size_t count,
                    const std::vector<T>& found) {
  EXPECT_EQ(first_difference<T>(std::span(expected).first(count), std::span(found).first(count)), -1) << what;
  const auto rest = std::span(found).subspan(count);
  EXPECT_TRUE(std::all_of(rest.begin(), rest.end(), [](const T& v) { return is_poison(v); }))
      << what << ": something beyond M was written";
}

}  // namespace fourfold
