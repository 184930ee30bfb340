// Host arrays where a backend computes: themselves on the host, copies in its memory elsewhere.
#pragma once

#include <cstddef>
#include <span>
#include <type_traits>
#include <vector>

#include "fourfold/activations.h"
#include "fourfold/memory.h"

namespace fourfold {

/// Pointers that a Mirror gives live as long as it does; the host arrays must outlive fetch().
class Mirror {
 public:
  explicit Mirror(const Memory& memory) : memory_(memory) {}

  /// `count` elements for the backend, as they are now. What is not const comes back with fetch(), so that
  /// poison shows what was left unwritten.
  template <class T>
  T* bring(T* data, size_t count) {
    if (memory_.device() == Device::host() || count == 0) return data;
    Buffer& copy = copies_.emplace_back(memory_.allocate(count * sizeof(T)));
    memory_.copy_from_host(copy.data(), data, count * sizeof(T));
    if constexpr (!std::is_const_v<T>) outputs_.push_back({data, copies_.size() - 1});
    return reinterpret_cast<T*>(copy.data());
  }
  template <class T>
  std::span<T> bring(std::span<T> values) {
    return {bring(values.data(), values.size()), values.size()};
  }
  /// Rows must be contiguous.
  template <class T>
  MatrixView<T> bring(const MatrixView<T>& matrix) {
    T* data = bring(matrix.data, static_cast<size_t>(matrix.rows * matrix.cols));
    return {data, matrix.rows, matrix.cols, matrix.stride, memory_.device()};
  }
  StagedActivations bring(const StagedActivations& staged) {
    return {bring(staged.values),         bring(staged.codes),           bring(staged.scales),
            bring(staged.residual_codes), bring(staged.residual_scales), bring(staged.row_scales)};
  }

  /// Waits for the backend and brings back what it wrote.
  void fetch() const {
    memory_.synchronize();
    for (const Output& output : outputs_) {
      const Buffer& copy = copies_[output.copy];
      memory_.copy_to_host(output.host, copy.data(), copy.bytes());
    }
  }

 private:
  struct Output {
    void* host;
    size_t copy;  // its index
  };

  const Memory& memory_;
  std::vector<Buffer> copies_;
  std::vector<Output> outputs_;
};

}  // namespace fourfold
