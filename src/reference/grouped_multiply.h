// The one multiplication behind every GEMM of the reference.
#pragma once

#include <span>

#include "fourfold/gemm.h"

namespace fourfold::reference {

/// Weight of one group, with an optional bias of one value an output column.
struct GroupWeight {
  const WeightView* weight = nullptr;
  const DenseView* bias = nullptr;
};

struct GroupedMultiply {
  ActivationView a;                        ///< [M, K]
  std::span<const int32_t> group_offsets;  ///< [E+1]
  std::span<const GroupWeight> weights;    ///< [E], each [N, K]
  OutputView d;                            ///< [M, N]
  Accumulation accumulation = Accumulation::kFloat32;
  bool dequantize_weights = false;  ///< apply the global scale to each weight instead of to the sum
};

/// d[m,n] = alpha * sum_k a[m,k] * w[e][n,k] + bias[e][n]; k ascending, nothing reassociated. Arguments are
/// trusted.
void multiply(const GroupedMultiply& args);

}  // namespace fourfold::reference
