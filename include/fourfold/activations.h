// Activations on their way into a GEMM: the formats they may be staged in, where their global scale comes
// from, and views of the result.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "fourfold/block_scaled.h"
#include "fourfold/export.h"
#include "fourfold/tensor.h"

namespace FOURFOLD_EXPORT fourfold {

/// What bf16 activations become before a GEMM.
enum class ActivationFormat : uint8_t {
  kNvfp4,    ///< e2m1 codes, an e4m3 scale per 16, a global scale
  kNvfp4x2,  ///< two NVFP4 terms: the value and what the first term left
  kFp8,      ///< e4m3 with one float32 scale a token
  kBf16,     ///< as they are
};

/// Where the global scale of NVFP4 activations comes from. docs/formats.md, section 6.
enum class ScalePolicy : uint8_t {
  kStatic,          ///< the checkpoint's input_scale of each expert (the larger of gate's and up's)
  kMaxOverExperts,  ///< the largest input_scale of all experts
  kDynamicTensor,   ///< amax / 2688 over all rows staged
  kDynamicToken,    ///< amax / 2688 over each row
};

std::string_view to_string(ActivationFormat format);
std::string_view to_string(ScalePolicy policy);
/// nullopt for an unknown name.
std::optional<ActivationFormat> parse_activation_format(std::string_view name);
std::optional<ScalePolicy> parse_scale_policy(std::string_view name);

constexpr bool is_nvfp4(ActivationFormat format) {
  return format == ActivationFormat::kNvfp4 || format == ActivationFormat::kNvfp4x2;
}

/// Staged activations [rows, cols], not owned. Which members are set follows from `format`.
struct ActivationView {
  ActivationFormat format = ActivationFormat::kBf16;
  int64_t rows = 0;
  int64_t cols = 0;
  MatrixView<const Bf16> values;             ///< bf16: [rows, cols]
  MatrixView<const uint8_t> codes;           ///< nvfp4: [rows, cols/2]; fp8: [rows, cols]
  const uint8_t* scales = nullptr;           ///< nvfp4: row-major [rows, cols/16], or swizzled
  MatrixView<const uint8_t> residual_codes;  ///< nvfp4x2: second term
  const uint8_t* residual_scales = nullptr;
  int64_t scale_stride = 0;  ///< bytes between rows of row-major scales, of both terms; 0: cols/16
  /// Swizzled scales are padded group by group (fourfold/scale_layout.h).
  ScaleLayout scale_layout = ScaleLayout::kRowMajor;
  std::span<const float> row_scales;    ///< [rows]: the global scale of every row; or
  std::span<const float> group_scales;  ///< [E]: of every expert's rows. Both empty: 1
};

/// Where staging writes; row-major, a global scale for every row. The layout of the taps, too.
struct StagedActivations {
  MatrixView<Bf16> values;
  MatrixView<uint8_t> codes, scales, residual_codes, residual_scales;
  std::span<float> row_scales;

  /// The first `rows` rows as a GEMM operand.
  ActivationView view(ActivationFormat format, int64_t rows, int64_t cols) const;
};

}  // namespace fourfold
