// The stages of a replay: rows staged as a format wants them, multiplied, activated.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "diagnosis/deviation.h"
#include "diagnosis/weight_reader.h"

namespace fourfold::diagnosis {

/// A row as a GEMM reads it.
struct StagedRow {
  std::vector<float> values;           ///< [K], without the global scale
  std::vector<float> beyond;           ///< what follows the row in memory, for KTail::kOverRead; else empty
  std::vector<uint8_t> codes, scales;  ///< NVFP4 alone: as quantized
  float alpha = 1.0f;                  ///< global scale
};

/// Global scales of one row: what quantizes, and what alpha has.
struct RowScales {
  float staging = 1.0f, alpha = 1.0f;
};

/// By policy and fault; `own` and `first` are input scales of the row's expert and of expert 0, `largest` of
/// all experts.
RowScales row_scales(ScalePolicy policy, InputScaleUse use, std::span<const float> row, float own,
                     float first, float largest);

/// `nudge`: a factor within float32's rounding, which decides ties as a quantizer with reciprocals may.
StagedRow stage_row(ActivationFormat format, std::span<const float> values, const RowScales& scales,
                    float nudge = 1.0f);
/// Values of an NVFP4 row again, after its block scales were changed.
void decode_staged(StagedRow& row);

/// What a sum over K is kept in.
enum class Sums : uint8_t { kFloat32, kFloat64 };

/// out[r, n] = alpha * sum_k a[r, k] * w[expert r][n, k] + bias, over the k in [first_k, last_k). `out`
/// [rows, N]. Rows of experts below 0 are left alone.
void multiply(const WeightReader& weights, std::span<const StagedRow> rows, std::span<const int64_t> experts,
              int64_t first_k, int64_t last_k, std::span<const float> bias_factor, Sums sums, float* out);

/// `h` [2I] or [I] -> `out` [I].
void activate_row(const ActivationFunction& function, const ActivationChange& change,
                  std::span<const float> h, std::span<float> out);

float round_bf16(float value);

}  // namespace fourfold::diagnosis
