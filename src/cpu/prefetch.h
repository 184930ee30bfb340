// Asking for packed weights before they are needed: the hardware's own prefetching leaves a fifth of the
// memory's bandwidth unused when arithmetic stands between the loads.
#pragma once

#include <cstdint>

#include "cpu/panel_layout.h"
#include "cpu/targets.h"

namespace fourfold::cpu {

/// `bytes` from `at` on, to the second-level cache.
FOURFOLD_INLINE void prefetch_to_second_level(const uint8_t* at, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line, 0, 2);
}

/// How far ahead of a pair's chunk the chunks lie that are asked for when it is read: one far away to the
/// second level, one nearer to the first or once more to the second.
struct PrefetchPlan {
  int64_t near_bytes = 0, far_bytes = 0;
  bool near_to_first_level = false;
};

/// The plan of the CPU's maker, from sweeps on one machine of each (docs/cpu-tried.md).
const PrefetchPlan& prefetch_plan();

/// Before a pair's chunk is read.
FOURFOLD_INLINE void prefetch_ahead(const uint8_t* pair_chunk, const PrefetchPlan& plan) {
  const uint8_t *const near = pair_chunk + plan.near_bytes, *const far = pair_chunk + plan.far_bytes;
  if (plan.near_to_first_level) {
    for (int64_t line = 0; line < kPairChunkBytes; line += 64) {
      __builtin_prefetch(far + line, 0, 2);
      __builtin_prefetch(near + line, 0, 3);
    }
  } else {
    for (int64_t line = 0; line < kPairChunkBytes; line += 64) {
      __builtin_prefetch(far + line, 0, 2);
      __builtin_prefetch(near + line, 0, 2);
    }
  }
}

}  // namespace fourfold::cpu
