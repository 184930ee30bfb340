// The oracle of GPU kernels: GEMMs of sampled rows in float64, from the checkpoint's form of the weights.
// Written to be right, and sharing nothing with the kernels that it judges but the number formats.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "fourfold/memory.h"
#include "moe/sampled_rows.h"

namespace fourfold::cuda {

/// out[r, c] = alpha * sum over k and terms of values[r, k] * w[expert_of[r]][columns[c], k]: the sum in
/// float64, rounded to float32, then multiplied by alpha in float32. `weights` are NVFP4 with row-major
/// scales and lie on the device of `memory`; `rows` and `columns` on the host. -> [rows, columns] on the
/// host. Throws Error for other weights, and for biases.
std::vector<float> multiply_sampled(const Memory& memory, const ExpertWeights& weights, ExpertGemm gemm,
                                    const SampledRows& rows, std::span<const int64_t> columns);

}  // namespace fourfold::cuda
