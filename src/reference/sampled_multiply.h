// The GEMMs of a few sampled rows in float64, on the host.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "moe/sampled_rows.h"

namespace fourfold::reference {

/// out[r, c] = alpha * sum over k and terms of values[r, k] * w[expert_of[r]][columns[c], k], the sum in
/// float64 and rounded to float32, then multiplied by alpha in float32: what a layer rounds to bf16.
/// Gated experts without biases; throws Error for others. -> [rows, columns]
std::vector<float> multiply_sampled(const ExpertWeights& weights, ExpertGemm gemm, const SampledRows& rows,
                                    std::span<const int64_t> columns);

}  // namespace fourfold::reference
