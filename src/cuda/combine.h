// Combine on the GPU: y[t] = sum over k, in order, of weight * z[row], then of the shared expert's weight *
// z, as fourfold::reference::combine rounds.
#pragma once

#include <cstdint>

#include "fourfold/gemm.h"
#include "fourfold/routing.h"

namespace fourfold::cuda {

struct CombineArgs {
  MatrixView<const Bf16> z;               ///< [M, H], H a multiple of 8; rows 16-byte aligned
  const int32_t* row_of_slot = nullptr;   ///< [T*K]; negative: the slot contributes nothing
  MatrixView<const float> topk_weights;   ///< [T, K]
  bool weight_on_input = false;           ///< weights are 1 here
  OutputView y;                           ///< [T, H], any alignment
  MatrixView<const Bf16> shared_z = {};   ///< [T, H], aligned as z; empty: no shared expert
  const float* shared_weights = nullptr;  ///< [T]; null: 1
  /// row_of_slot and topk_weights were complete when the previous kernel of the stream began: they may be
  /// read before it ends.
  bool rows_are_known = false;
};

/// weights[t] = sigmoid(x[t] . gate), the sum in float32 in an order of its own, and 1 where `gate` is null.
/// `x` [T, H], any alignment; `gate` [H]; `weights` [T].
void weigh_shared(MatrixView<const Bf16> x, const float* gate, float* weights, void* stream);

/// float32 products and sums, each rounded, no fused multiply-add; one rounding to bf16. Throws Error when H
/// or an alignment of z is not as above.
void combine(const CombineArgs& args, void* stream);

}  // namespace fourfold::cuda
