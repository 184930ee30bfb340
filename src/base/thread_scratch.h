// Scratch memory of OpenMP threads, allocated before they start: an exception must not leave a parallel
// region.
#pragma once

#include <omp.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace fourfold {

class ThreadScratch {
 public:
  /// `floats` for each thread of the next parallel region; one within a region, where the next has one.
  /// Throws std::bad_alloc.
  explicit ThreadScratch(int64_t floats)
      : floats_(static_cast<size_t>(floats)),
        values_(floats_ * static_cast<size_t>(omp_get_active_level() < omp_get_max_active_levels()
                                                  ? omp_get_max_threads()
                                                  : 1)) {}

  /// The calling thread's part.
  std::span<float> mine() {
    return std::span(values_).subspan(floats_ * static_cast<size_t>(omp_get_thread_num()), floats_);
  }

 private:
  size_t floats_;
  std::vector<float> values_;
};

}  // namespace fourfold
