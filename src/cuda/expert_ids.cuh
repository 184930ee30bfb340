// The router's choice as kernels read it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <variant>

#include "fourfold/routing.h"

namespace fourfold::cuda {

/// Ids of one call, [T, K]. Slot t K + k is the k-th choice of token t.
struct ExpertIds {
  const void* data = nullptr;
  bool is_64_bit = false;
  int64_t stride = 0;  ///< elements a token
  int32_t top_k = 0, slots = 0, experts = 0;
  const int32_t* local_experts = nullptr;  ///< null: ids are this rank's
  int64_t known = 0;                       ///< experts that it maps

  ExpertIds() = default;
  ExpertIds(const Routing& routing, int64_t experts)
      : top_k(static_cast<int32_t>(routing.top_k())),
        slots(static_cast<int32_t>(routing.tokens() * routing.top_k())),
        experts(static_cast<int32_t>(experts)),
        known(static_cast<int64_t>(routing.local_experts.size())) {
    if (known > 0) local_experts = routing.local_experts.data();
    std::visit(
        [&](const auto& ids) {
          data = ids.data;
          is_64_bit = sizeof(*ids.data) == sizeof(int64_t);
          stride = ids.stride;
        },
        routing.topk_ids);
  }

  /// Expert of `slot`; -1 where it has none here. Sets `bad` for an id that is no expert. kPastL1: for a
  /// kernel that reads while the one before it ends, so that no line which its multiprocessor kept from an
  /// earlier call is taken for this one's.
  template <bool kPastL1 = false>
  __device__ int32_t expert_of(int32_t slot, bool& bad) const {
    const int64_t at = slot / top_k * stride + slot % top_k;
    int64_t id = is_64_bit ? read<kPastL1>(static_cast<const long long*>(data) + at)
                           : read<kPastL1>(static_cast<const int32_t*>(data) + at);
    if (local_experts != nullptr && id != kAbsentExpert) {
      id = id >= 0 && id < known ? read<kPastL1>(local_experts + id) : experts;  // beyond the last: no expert
    }
    const bool present = id >= 0 && id < experts;
    bad |= !present && id != kAbsentExpert;
    return present ? static_cast<int32_t>(id) : -1;
  }

 private:
  template <bool kPastL1, class T>
  static __device__ T read(const T* from) {
    return kPastL1 ? __ldcg(from) : *from;
  }
};

}  // namespace fourfold::cuda
