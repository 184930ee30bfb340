// Quantizers and dequantizers: the specification that every backend's staging matches bit for bit.
//
// NVFP4, one block of 16 (float32, round to nearest even; g = global scale):
//   t = amax(block) / 6;  s = e4m3(t / g), saturating;  r = s == 0 ? 0 : 1 / (s * g);  code = e2m1(x * r)
// A NaN or an infinity in a block makes its scale NaN, so that it shows.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "fourfold/block_scaled.h"
#include "fourfold/export.h"
#include "fourfold/tensor.h"

namespace FOURFOLD_EXPORT fourfold {

/// What to do about blocks whose scale underflows.
enum class ScaleFloor : uint8_t {
  kNone,      ///< activations: a scale may round to zero, and an all-zero block stores zero
  kModelOpt,  ///< weights, as ModelOpt writes them: at least 2^-9; an all-zero block stores 1.0
};

/// The largest magnitude in `values`; NaN if any value is NaN.
float absolute_maximum(MatrixView<const float> values);
float absolute_maximum(MatrixView<const Bf16> values);

/// Dynamic scales are at least 2^-100, so that the reciprocals of the quantizers stay finite: without a
/// floor, zeros of a token of subnormals would become 0 * inf. Values below about 2^-110 become zero.
inline constexpr float kSmallestDynamicScale = 0x1p-100f;

FOURFOLD_HOST_DEVICE constexpr float dynamic_scale(float amax, float range) {
  if (amax == 0.0f) return 1.0f;
  const float scale = amax / range;
  return scale < kSmallestDynamicScale ? kSmallestDynamicScale : scale;  // NaN goes through
}

/// amax / 2688, and 1 for amax = 0: the dynamic global scale of a tensor or a token.
FOURFOLD_HOST_DEVICE constexpr float nvfp4_global_scale(float amax) {
  return dynamic_scale(amax, kNvfp4Range);
}

/// An owned block-scaled matrix; row-major scales.
struct BlockScaledMatrix {
  QuantFormat format = QuantFormat::kNvfp4;
  int64_t rows = 0;
  int64_t cols = 0;
  std::vector<uint8_t> codes;   ///< [rows, cols/2]
  std::vector<uint8_t> scales;  ///< [rows, cols/block]
  GlobalScale global;

  BlockScaledView view() const;
};

/// Quantizes one row of NVFP4: `x` [cols] -> `codes` [cols/2], `scales` [cols/16]. cols % 16 == 0.
void quantize_row_nvfp4(std::span<const float> x, float global, ScaleFloor floor, uint8_t* codes,
                        uint8_t* scales);

/// How a block scale is chosen, beside a given global scale g. docs/formats.md, section 1.
enum class ScaleRule : uint8_t {
  kAmax,         ///< s = e4m3(amax / 6 / g), as ModelOpt
  kFourOverSix,  ///< that or e4m3(amax / 4 / g), whichever leaves the smaller squared error
  kMse,          ///< of the e4m3 numbers up to an octave around the first, the one with the smallest
};

std::string_view to_string(ScaleRule rule);  ///< "amax", "four-over-six" or "mse"
/// nullopt for an unknown name.
std::optional<ScaleRule> parse_scale_rule(std::string_view name);

/// quantize_row_nvfp4 with block scales by `rule`: of weights (kModelOpt) or activations (kNone). Errors are
/// sums of (x - (e2m1 * s) * g)^2 over ascending k in double, of values rounded to float32; the first
/// candidate wins a tie. Only amax's candidate can be a scale of 0.
void quantize_row_nvfp4(std::span<const float> x, float global, ScaleFloor floor, ScaleRule rule,
                        uint8_t* codes, uint8_t* scales);

/// The same for weights, with ScaleFloor::kModelOpt.
void quantize_weight_row_nvfp4(std::span<const float> x, float global, ScaleRule rule, uint8_t* codes,
                               uint8_t* scales);

/// `nvfp4x2`: a second term quantizes what the first one left, x - q1, with the same global scale.
void quantize_row_nvfp4x2(std::span<const float> x, float global, uint8_t* codes, uint8_t* scales,
                          uint8_t* residual_codes, uint8_t* residual_scales);

/// Quantizes one row of MXFP4 (OCP MX 1.0): scale 2^(floor(log2 amax) - 2); an all-zero block stores 2^-127.
/// `x` [cols] -> `codes` [cols/2], `scales` [cols/32]. cols % 32 == 0.
void quantize_row_mxfp4(std::span<const float> x, uint8_t* codes, uint8_t* scales);

/// Quantizes one row to e4m3 with a scale of its own: `x` [cols] -> `codes` [cols].
/// g = dynamic_scale(amax, 448), r = 1 / g, code = e4m3(x * r). Returns g.
float quantize_row_fp8(std::span<const float> x, uint8_t* codes);

/// Whole weights. `global` is the decode multiplier; nvfp4_global_scale(absolute_maximum(x)) is the usual
/// choice. Throws Error unless cols is a multiple of the block.
BlockScaledMatrix quantize_nvfp4(MatrixView<const float> x, float global,
                                 ScaleFloor floor = ScaleFloor::kModelOpt);
BlockScaledMatrix quantize_mxfp4(MatrixView<const float> x);

/// An owned FP8 matrix with a scale a tile.
struct Fp8Matrix {
  int64_t rows = 0;
  int64_t cols = 0;
  TileScaleType scale_type = TileScaleType::kF32;
  int64_t tile = 128;
  std::vector<uint8_t> codes;     ///< [rows, cols]
  std::vector<std::byte> scales;  ///< row-major [ceil(rows / tile), ceil(cols / tile)]

  Fp8View view() const;
};

/// FP8 as DeepSeek stores it: a square tile's scale is amax / 448 (1 for a tile of zeros), as e8m0 rounded up
/// to a power of two; code = e4m3(x / scale). A NaN or an infinity shows in its tile's scale, as e8m0 as
/// 0xFF.
Fp8Matrix quantize_fp8_tiles(MatrixView<const float> x, TileScaleType scale_type, int64_t tile = 128);

/// What casting MXFP4 to NVFP4 cost, in blocks of 32. `inexact` of zero means bit-exact values.
struct CastReport {
  int64_t blocks = 0;
  int64_t recoded = 0;  ///< too small for an e4m3 scale with codes unchanged: codes were rescaled
  int64_t inexact = 0;  ///< of those, blocks where some value changed

  CastReport& operator+=(const CastReport& other);
};

/// For a tensor of zeros, which has no largest exponent.
inline constexpr int kNoExponent = -1000;
/// Exponent k (scale = 2^k) of the largest block scale among blocks that hold a nonzero code; kNoExponent
/// where there is none. Throws Error at a scale of 0xFF, naming row and block.
int largest_mxfp4_exponent(const BlockScaledView& mxfp4);

/// The lossless cast. Global scale 2^(kmax - 8); both halves of a 32-block get 2^(k - kmax + 8); codes
/// unchanged. Exact if kmax - k <= 17 for every block with a nonzero code; beyond that codes are re-rounded
/// and counted. `kmax` may be given to make several tensors (gate and up) share a global scale.
BlockScaledMatrix cast_mxfp4_to_nvfp4(const BlockScaledView& mxfp4, CastReport* report = nullptr);
BlockScaledMatrix cast_mxfp4_to_nvfp4(const BlockScaledView& mxfp4, int kmax, CastReport* report);

/// What cast_mxfp4_to_nvfp4 with this kmax would count; reads codes only where scales are that small.
CastReport count_cast(const BlockScaledView& mxfp4, int kmax);

/// What a sound converter writes: MXFP4 by the lossless cast, bf16, f16 and f32 by ModelOpt's rule with
/// amax/2688 as global scale. Throws Error for weights that are NVFP4 already.
BlockScaledMatrix convert_to_nvfp4(const WeightView& weight, CastReport* report = nullptr);

/// Every value of `weight`, dequantized to float32 [rows, cols].
std::vector<float> dequantize(const WeightView& weight);

}  // namespace fourfold
