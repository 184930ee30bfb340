// Rows of one expert times some pairs of its weight: the work of one thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "cpu/kernels.h"
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

/// Pairs [first, last) of a matrix for the rows of a group, whose operand lies at `operand_offset`.
struct GroupPairs {
  const ExpertMatrix* matrix = nullptr;  ///< null: none
  const RowGroup* group = nullptr;
  int64_t operand_offset = 0, first = 0, last = 0;
};

/// What one thread has for itself: scratch, and what a call has left there for the next.
struct MultiplySpace {
  std::byte* scratch = nullptr;  ///< multiply_scratch_bytes()
  DecodedAhead decoded_ahead;
};

/// `next`: what this thread will multiply after `pairs`, of a matrix of the same shape: its first weights and
/// rows are asked for.
void multiply_group(const GroupMultiply& args, const GroupPairs& pairs, const GroupPairs& next,
                    MultiplySpace& space);

}  // namespace fourfold::cpu
