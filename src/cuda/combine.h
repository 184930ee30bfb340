// Combine on the GPU: y[t] = sum over k, in order, of weight * z[row], as fourfold::reference::combine
// rounds.
#pragma once

#include <cstdint>

#include "fourfold/gemm.h"
#include "fourfold/routing.h"

namespace fourfold::cuda {

struct CombineArgs {
  MatrixView<const Bf16> z;              ///< [M, H], H a multiple of 8; rows 16-byte aligned
  const int32_t* row_of_slot = nullptr;  ///< [T*K]; negative: the slot contributes nothing
  MatrixView<const float> topk_weights;  ///< [T, K]
  bool weight_on_input = false;          ///< weights are 1 here
  OutputView y;                          ///< [T, H], any alignment
};

/// float32 products and sums, each rounded, no fused multiply-add; one rounding to bf16. Throws Error when H
/// or z's alignment is not as above.
void combine(const CombineArgs& args, void* stream);

}  // namespace fourfold::cuda
