// Between a layer on a GPU and its experts: which rows, which taps, and which walk over them.
#pragma once

#include <cstdint>
#include <span>

#include "fourfold/moe_layer.h"

namespace fourfold::cuda {

/// Which of the layer's steps a walk over all parts of its rows takes. A scale over the whole tensor has to
/// be known before its first part is staged: where there are several parts, a walk of its own finds it.
enum class Walk : uint8_t { kFindXAmax, kFindIntermediateAmax, kCompute };

struct Step {
  Walk walk = Walk::kCompute;
  bool whole = true;  ///< there is one part, which finds its scales on the way
  void* stream = nullptr;
  StageObserver* observer = nullptr;  ///< may be null

  /// Everything up to the end of `stage` is enqueued.
  void finish(const char* stage) const {
    if (observer != nullptr) observer->after(stage, stream);
  }
};

/// Rows of one part.
struct ExpertRows {
  std::span<const int32_t> group_offsets;  ///< [E+1], in device memory
  int64_t rows = 0;                        ///< at most
  /// The space's counters, set to zero by the permutation. Empty: there are none.
  std::span<int32_t> counters = {};
};

/// Optional outputs; those of h and z must be 16-byte aligned.
struct ExpertTaps {
  const StagedActivations* staged_x = nullptr;
  MatrixView<Bf16> h, activation;
  const StagedActivations* staged_intermediate = nullptr;
  MatrixView<Bf16> z;
};

}  // namespace fourfold::cuda
