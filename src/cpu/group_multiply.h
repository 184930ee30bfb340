// Rows of one expert times some pairs of its weight: the work of one thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "cpu/panel_matrix.h"
#include "cpu/staged_rows.h"
#include "fourfold/gemm.h"

namespace fourfold::cpu {

/// Rows of operands that meet a pair at a time: their sums stay in the first-level cache.
inline constexpr int64_t kRowsAtATime = 128;

/// Bytes of scratch for one thread, 64-byte aligned.
int64_t multiply_scratch_bytes();

/// A weight of one expert with what its epilogue needs.
struct ExpertMatrix {
  PanelMatrix panels;
  float globals[2] = {1.0f, 1.0f};  ///< by panel
  const float* biases = nullptr;    ///< [pairs][32], as the panels' rows lie; null: none
};

/// What becomes of the sums; exactly one of `d` and `activation` is set.
struct GroupOutput {
  const OutputView* d = nullptr;                   ///< alpha * sum + bias, [M, N]
  const ActivationFunction* activation = nullptr;  ///< of h, into `activated` [M, I]
  MatrixView<Bf16> activated;
  MatrixView<Bf16> h;  ///< [M, 2I] or [M, I]: stored too; may be empty
};

struct GroupMultiply {
  const Kernels* kernels = nullptr;
  const RowFunctions* functions = nullptr;
  ActivationFormat format = ActivationFormat::kBf16;
  const std::byte* operands = nullptr;        ///< of all groups
  const float* row_factors = nullptr;         ///< [M]
  const float* row_scales = nullptr;          ///< [M]; null: 1
  const StagedActivations* staged = nullptr;  ///< for irregular pairs
  GroupOutput output;
};

/// Pairs [first, last) of `matrix` for the rows of `group`, whose operand lies at `operand_offset`.
void multiply_group(const GroupMultiply& args, const ExpertMatrix& matrix, const RowGroup& group,
                    int64_t operand_offset, int64_t first, int64_t last, std::byte* scratch);

}  // namespace fourfold::cpu
