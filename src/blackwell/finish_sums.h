// What comes after each GEMM, in kernels of this project's own: bias, activation, quantization of the
// intermediate into the layout that the second GEMM reads; and outputs in bf16 or float32.
#pragma once

#include <cstdint>
#include <span>

#include "cuda/stacked_rows.h"
#include "fourfold/activations.h"
#include "fourfold/gemm.h"
#include "fourfold/moe_layer.h"

namespace fourfold::blackwell {

/// What a GEMM left: either bf16 values, with alpha in them, row by row; or float32 sums, stacked, a row a
/// term:
///   value[m, c] = bf16(alpha * (sum of the terms' sums) + bias[c]),
///   alpha = row_scales[m] * globals[expert of m, half of c], rounded to float32.
struct GemmResult {
  const void* data = nullptr;  ///< rows 16-byte aligned
  int64_t stride = 0;          ///< in elements
  bool is_float32 = false;
  int32_t terms = 1;
  int32_t halves = 1;
  int64_t columns = 0;  ///< of one half; the second starts behind it
  const cuda::RowPlace* places = nullptr;
  // Of float32 sums alone.
  const float* row_scales = nullptr;  ///< [M]; null: 1
  const float* globals = nullptr;     ///< [E, halves]
  const float* bias = nullptr;        ///< [E, halves * columns]; null: none
};

/// activation(gate, up) in float32 from the rounded h, rounded to bf16, then quantized.
struct ActivateRows {
  ActivationFunction function;
  GemmResult h;                   ///< columns a multiple of 16
  const int32_t* rows = nullptr;  ///< on the device: M
  int64_t max_rows = 0;
  // Quantization.
  ActivationFormat format = ActivationFormat::kNvfp4;
  ScalePolicy policy = ScalePolicy::kStatic;
  const float* expert_scales = nullptr;  ///< [E]; policies static and max-over-experts
  float* tensor_amax = nullptr;          ///< [1]; policy dynamic-tensor
  cuda::StackedRows stacked;
  float* row_scales = nullptr;  ///< [M], receives each row's global scale
  // Taps; what is empty is not written.
  MatrixView<Bf16> h_tap;  ///< [max_rows, halves * columns], for float32 sums
  MatrixView<Bf16> activation_tap;
  StagedActivations staged_tap = {};
};

/// Enqueues one kernel. Throws Error when CUDA refuses the launch.
void activate_rows(const ActivateRows& args, void* stream);
/// *tensor_amax = the larger of itself and the activation's largest magnitude over all rows; NaN if there is
/// one.
void find_activation_amax(const ActivateRows& args, void* stream);

/// d[m, c] = value[m, c], rounded to d's type, for one half; columns beyond d.cols are padding. `rows` as
/// above. `d` may have any alignment.
void finish_rows(const GemmResult& sums, const int32_t* rows, int64_t max_rows, const OutputView& d,
                 void* stream);

/// Rows [first_row, first_row + rows) of activations that a caller staged, in nvfp4 or nvfp4x2 -> stacked,
/// and their global scales. `group_offsets`: of all of `a`; empty: all rows are one group. `stacked.places`
/// are those of the rows that are taken.
void stack_staged(const ActivationView& a, std::span<const int32_t> group_offsets, int64_t first_row,
                  int64_t rows, const cuda::StackedRows& stacked, float* row_scales, void* stream);

}  // namespace fourfold::blackwell
