// Staging of activations on the GPU: bf16 rows -> quantized -> the bf16 rows that a GEMM reads, bit for bit
// what the quantizers of fourfold/quantize.h give, but for the signs of NVFP4's zeros where no codes are
// written: no sum depends on them.
//
// Every product e2m1 x e4m3 is exact in bf16 (docs/formats.md, section 1), and so is every e4m3 value: a GEMM
// without FP4 units multiplies decoded rows. nvfp4x2 gives two of them, not their sum, which is not exact.
// Everything below lies in device memory, and M, the number of rows, is read there: group_offsets[E].
#pragma once

#include <cstdint>
#include <span>

#include "cuda/stacked_rows.h"
#include "fourfold/activations.h"
#include "fourfold/routing.h"

namespace fourfold::cuda {

/// Rows to be staged: row r is `rows` r itself, or the token of slot_of_row[r].
struct RowSource {
  MatrixView<const Bf16> rows;           ///< [M, cols] or [T, cols]; any alignment
  const int32_t* slot_of_row = nullptr;  ///< [M]; null: row r is row r
  int64_t top_k = 1;                     ///< slots of a token
  /// [T * top_k], -1: no row. Optional beside slot_of_row: the same rows are staged sooner, token by token.
  const int32_t* row_of_slot = nullptr;
  /// [T, K]: multiplies the row of each slot in float32, rounded to bf16. Empty: no weight.
  MatrixView<const float> weights = {};
  const Routing* routing = nullptr;  ///< of the slots; for StageArgs::by_slot_of_experts
};

/// Decoded rows; 16-byte aligned with strides of multiples of 8 elements. Rows from M on are not written.
struct DecodedRows {
  MatrixView<Bf16> first;       ///< [max_rows, cols]; empty: not written
  MatrixView<Bf16> second;      ///< the same for nvfp4x2's second term
  float* row_scales = nullptr;  ///< [max_rows] global scale of each row; not written for bf16
};

struct StageArgs {
  ActivationFormat format = ActivationFormat::kBf16;
  ScalePolicy policy = ScalePolicy::kDynamicToken;  ///< of nvfp4 and nvfp4x2
  RowSource source;
  /// [E+1]. Empty, where `source` has no slot_of_row: all of its rows, with the scale of expert 0.
  std::span<const int32_t> group_offsets;
  int64_t max_rows = 0;                  ///< upper bound of M
  const float* expert_scales = nullptr;  ///< [E]; policies static and max-over-experts (all alike)
  const float* tensor_amax = nullptr;    ///< [1] from find_amax; policy dynamic-tensor
  DecodedRows decoded;
  StagedActivations staged = {};  ///< codes and scales, for taps; what is empty is not written
  /// For GEMMs of native FP4: nvfp4 and nvfp4x2 alone. Padding of the scales is the caller's to clear.
  StackedRows stacked = {};
  /// Row s is the token of slot s, with the scale of its expert, one of so many, instead of what the
  /// permutation tells, of which nothing is read; for policies static and max-over-experts. Slots without an
  /// expert here are not written. 0: not so.
  int64_t by_slot_of_experts = 0;
  /// The kernel before this one neither writes what is read here nor touches what is written here, and had
  /// waited for those before it when it let this one start: so the permutation, where rows are tokens or
  /// slots. Staging begins beside it, and ends after it.
  bool beside_previous = false;
  /// Set to zero before the kernel lets the next one start (programmatic dependent launch).
  std::span<int32_t> cleared = {};
};

/// Throws Error unless cols is a multiple of 16 and max_rows at most 2^30.
void stage(const StageArgs& args, void* stream);

/// *amax = the larger of *amax and the largest magnitude of rows [0, M); NaN if there is one. Callers set it
/// to zero first. Deterministic: a maximum does not depend on the order.
void find_amax(const RowSource& source, std::span<const int32_t> group_offsets, int64_t max_rows, float* amax,
               void* stream);

/// Rows [first_row, first_row + rows) of staged activations that a caller brings -> as many decoded rows and
/// a global scale for each (1 where `a` has none). `group_offsets` are those of all of `a`, and may be empty:
/// all rows are one group. Layouts as ActivationView describes them.
void decode_staged(const ActivationView& a, std::span<const int32_t> group_offsets, int64_t first_row,
                   int64_t rows, const DecodedRows& decoded, void* stream);

}  // namespace fourfold::cuda
