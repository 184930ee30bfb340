// Staged rows decoded again, as a GEMM reads them.
#pragma once

#include <cstdint>
#include <vector>

#include "moe/sampled_rows.h"
#include "tools/layer_trace.h"

namespace fourfold {

/// All rows of `staged` [rows, cols], of the experts `expert_of` [rows].
SampledRows decode_rows(const StagedBuffers& staged, ActivationFormat format, std::vector<int32_t> expert_of,
                        int64_t cols);

/// `rows` staged with a scale by token and decoded without it, which is exact in bf16; of nvfp4x2 the first
/// term. [rows, cols]
std::vector<Bf16> stage_and_decode(ActivationFormat format, MatrixView<const Bf16> rows);

}  // namespace fourfold
