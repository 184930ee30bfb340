// Block-scaled tensors: what a quantization format is, and views of tensors stored in one.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <variant>

#include "fourfold/export.h"
#include "fourfold/number_formats.h"
#include "fourfold/tensor.h"

namespace FOURFOLD_EXPORT fourfold {

/// 4-bit formats: e2m1 codes, two a byte (even index in the low nibble), one scale a block along K.
enum class QuantFormat : uint8_t { kNvfp4, kMxfp4 };

enum class ScaleType : uint8_t { kE4m3, kE8m0 };

/// The only place that knows a format's facts.
struct QuantFormatTraits {
  std::string_view name;
  int block_size;  ///< values along K that share a scale
  ScaleType scale_type;
  bool has_global_scale;  ///< one float32 a tensor beside the block scales
};

constexpr QuantFormatTraits traits_of(QuantFormat format) {
  return format == QuantFormat::kNvfp4 ? QuantFormatTraits{"nvfp4", 16, ScaleType::kE4m3, true}
                                       : QuantFormatTraits{"mxfp4", 32, ScaleType::kE8m0, false};
}

/// Largest magnitude of NVFP4 relative to its global scale: 6 x 448.
inline constexpr float kNvfp4Range = kE2m1Max * kE4m3Max;

/// How scales are laid out; docs/formats.md, section 2.
enum class ScaleLayout : uint8_t { kRowMajor, kSwizzled128x4 };

/// ModelOpt stores what multiplies the codes; compressed-tensors stores its divisor. The stored number is
/// kept: 1/(1/x) is not x for one float in seven.
enum class GlobalScaleKind : uint8_t { kMultiplier, kDivisor };

struct GlobalScale {
  float value = 1.0f;
  GlobalScaleKind kind = GlobalScaleKind::kMultiplier;

  bool operator==(const GlobalScale&) const = default;
  /// For a GEMM's alpha.
  constexpr float multiplier() const { return kind == GlobalScaleKind::kMultiplier ? value : 1.0f / value; }
  /// For dequantization: one rounding, the one the writer of the checkpoint had in mind.
  constexpr float apply(float x) const {
    return kind == GlobalScaleKind::kMultiplier ? x * value : x / value;
  }
};

/// A quantized matrix [rows, cols] that is not owned. Blocks run along cols (the reduction axis K).
struct BlockScaledView {
  QuantFormat format = QuantFormat::kNvfp4;
  int64_t rows = 0;
  int64_t cols = 0;
  MatrixView<const uint8_t> codes;  ///< [rows, cols/2]
  const uint8_t* scales = nullptr;  ///< [rows, blocks_per_row()] row-major, or swizzled
  int64_t scale_stride = 0;         ///< bytes between rows of a row-major scale array
  ScaleLayout scale_layout = ScaleLayout::kRowMajor;
  GlobalScale global;

  int64_t blocks_per_row() const { return cols / traits_of(format).block_size; }
  uint8_t scale_code(int64_t row, int64_t block) const;
};

/// How the scales of an FP8 matrix are stored: DeepSeek-V4 has e8m0, DeepSeek-V3 and ModelOpt float32.
enum class TileScaleType : uint8_t { kE8m0, kF32 };

/// An FP8 matrix [rows, cols] of e4m3 codes with one scale a tile of `tile_rows` x `tile_cols`; tiles at the
/// edges are cut short. value = code x scale, rounded to float32. Codes and scales may lie at any address.
struct Fp8View {
  int64_t rows = 0;
  int64_t cols = 0;
  MatrixView<const uint8_t> codes;    ///< [rows, cols]
  const std::byte* scales = nullptr;  ///< row-major [ceil(rows / tile_rows), ceil(cols / tile_cols)]
  TileScaleType scale_type = TileScaleType::kF32;
  int64_t tile_rows = 128, tile_cols = 128;

  int64_t tiles_per_row() const { return (cols + tile_cols - 1) / tile_cols; }
  float scale(int64_t row, int64_t col) const;
};

/// A weight as the checkpoint stores it.
using WeightView = std::variant<DenseView, BlockScaledView, Fp8View>;

int64_t rows_of(const WeightView& weight);
int64_t cols_of(const WeightView& weight);
Device device_of(const WeightView& weight);
/// "nvfp4", "mxfp4", "fp8", "bf16", "f16" or "f32".
std::string_view format_name(const WeightView& weight);
/// Whether `weight` is stored in `format`.
bool is_stored_as(const WeightView& weight, QuantFormat format);

/// Decodes row `row` into `out` [cols]: e2m1 x block scale, exact in float32 (an MXFP4 scale of 2^126 or
/// more can overflow). The global scale is not applied: see global_multiplier.
void decode_row(const BlockScaledView& matrix, int64_t row, float* out);
/// The values themselves, code x scale: a tile's scale belongs to the value, since it changes along K.
void decode_row(const Fp8View& matrix, int64_t row, float* out);
void decode_row(const WeightView& weight, int64_t row, float* out);

/// The factor that a GEMM applies in its epilogue after multiplying what decode_row gives: 1 for dense and
/// FP8 weights.
float global_multiplier(const WeightView& weight);

/// Decodes row `row` and applies the global scale: (e2m1 x block scale) x global, rounded once to float32.
void dequantize_row(const WeightView& weight, int64_t row, float* out);

}  // namespace fourfold
