// Pairs with a block scale that is negative or NaN, which no writer means: multiplied one element at a time,
// so that the result is what the reference gives and NaN shows.
#pragma once

#include "cpu/panel_matrix.h"
#include "cpu/staged_rows.h"

namespace fourfold::cpu {

/// sums [count][32] = staged rows [first, first + count) x the pair. Decodes what it reads every time: slow.
void multiply_irregular(const PanelMatrix& matrix, int64_t pair, const StagedActivations& staged,
                        ActivationFormat format, int64_t first, int64_t count, float* sums);

}  // namespace fourfold::cpu
