// Permutation by expert on the GPU: src/moe/routing.cpp's stable counting sort, without reading anything
// back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "fourfold/routing.h"

namespace fourfold::cuda {

/// Everything lies in device memory, the map of local experts too. Results are those of permute_by_expert bit
/// for bit: rows keep slot order within an expert; an absent slot has row -1; slot_of_row beyond
/// group_offsets[E] is not written.
struct PermuteArgs {
  Routing routing;
  PermutationView out;                ///< [E+1], room for [T*K] and [T*K]
  int32_t* status = nullptr;          ///< bits are or-ed in; may be null
  std::span<std::byte> scratch = {};  ///< permute_scratch_bytes()
  /// Set to zero beside: counters of the kernels that follow. For a handful of slots they are zero before the
  /// kernel lets the next one start (programmatic dependent launch), for more when it has ended. The next one
  /// starts sooner if there are none.
  std::span<int32_t> cleared = {};
};

/// Scratch for `slots` slots or fewer.
size_t permute_scratch_bytes(int64_t slots, int64_t experts);

/// No more slots than a warp has lanes.
inline constexpr int64_t kHandfulOfSlots = 32;
inline constexpr int64_t kMostExperts = 8192;
inline constexpr int64_t kMostSlots = int64_t{1} << 30;

/// Enqueues the permutation: one kernel for few slots, three for many. Throws Error for more than
/// kMostExperts experts or kMostSlots slots.
void permute(const PermuteArgs& args, void* stream);

/// Group offsets [E+1] of rows [first, first + rows) alone -> `out` [E+1].
void slice_group_offsets(std::span<const int32_t> group_offsets, int64_t first, int64_t rows,
                         std::span<int32_t> out, void* stream);

}  // namespace fourfold::cuda
