// What is done to rows beside multiplying them: staging, the forms that kernels read, epilogues, combine.
// One table an instruction set; all give the same bits.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/operands.h"
#include "fourfold/moe_layer.h"

namespace fourfold::cpu {

/// Sums of a pair on their way out.
struct PairSums {
  const float* sums = nullptr;  ///< [rows * terms][32]; the terms of a row are added
  int64_t rows = 0;
  int terms = 1;
  const float* row_factors = nullptr;  ///< [rows]: powers of two that belong to the sums; null: 1
  const float* row_scales = nullptr;   ///< [rows]: global scales of the activations; null: 1
  float globals[2] = {1.0f, 1.0f};     ///< of the panels' weights
  const float* biases[2] = {};         ///< [16] of each panel; null: none
};

/// Where the pair's columns go. Column c of panel p is stored if c < columns[p].
struct PairTargets {
  int columns[2] = {};
  Bf16* h[2] = {};  ///< first row's 16 columns of each panel; null: not stored
  int64_t h_stride = 0;
};

struct RowFunctions {
  void (*widen)(const Bf16* x, int64_t cols, float* out);
  /// bf16(weight * x), widened.
  void (*widen_weighted)(const Bf16* x, float weight, int64_t cols, float* out);
  void (*narrow)(const float* x, int64_t cols, Bf16* out);   ///< of values that are bf16
  float (*largest_magnitude)(const float* x, int64_t cols);  ///< NaN if there is one

  /// quantize_row_nvfp4 and quantize_row_nvfp4x2 of fourfold/quantize.h (no floor), and the codes of
  /// quantize_row_fp8, bit for bit. `scratch` as quantizer_scratch_bytes says.
  void (*quantize_nvfp4)(const float* x, int64_t cols, float global, uint8_t* codes, uint8_t* scales,
                         std::byte* scratch);
  void (*quantize_nvfp4x2)(const float* x, int64_t cols, float global, uint8_t* codes, uint8_t* scales,
                           uint8_t* residual_codes, uint8_t* residual_scales, std::byte* scratch);
  /// quantize_row_nvfp4 (no floor) by a rule other than amax, bit for bit.
  void (*quantize_nvfp4_searching)(ScaleRule rule, const float* x, int64_t cols, float global, uint8_t* codes,
                                   uint8_t* scales);
  void (*encode_fp8)(const float* x, int64_t cols, float reciprocal, uint8_t* codes);
  void (*decode_fp8)(const uint8_t* codes, int64_t cols, float* out);

  /// cols / 16 blocks.
  void (*make_int_blocks)(const uint8_t* codes, const uint8_t* scales, int64_t cols, IntBlock* out);
  /// e2m1 x scale.
  void (*decode_nvfp4)(const uint8_t* codes, const float* scales, int64_t cols, float* out);
  /// bf16(x * factor), padded with zeros to whole chunks: 32 values at a time, `stride` values apart. Of the
  /// lines that lie the same way from `ask_for` on, which will be written next, each is asked for meanwhile.
  void (*write_scaled_bf16)(const float* x, int64_t cols, float factor, int64_t stride, Bf16* out,
                            const Bf16* ask_for);
  /// The same of x * 2^(unit_exponent - exponent), where `exponent`, which is returned, is that of the
  /// largest finite value, 0 for zeros. Null where no kernel reads bf16.
  int (*write_normalised_bf16)(const Bf16* x, int64_t cols, int unit_exponent, int64_t stride, Bf16* out,
                               const Bf16* ask_for);
  /// A row of a matrix of tiles, padded with zeros to whole chunks: bf16 of e2m1 x e4m3 x kTileScale, 32
  /// values at a time, `stride` values apart; `ask_for` as above. Null where no instruction set takes tiles.
  void (*write_nvfp4_tiles)(const uint8_t* codes, const uint8_t* scales, int64_t cols, int64_t stride,
                            Bf16* out, const Bf16* ask_for);

  /// h = bf16(row scale * global * sum + bias), stored where targets say.
  void (*store_bf16)(const PairSums& sums, const PairTargets& targets);
  /// The same in float32, not rounded.
  void (*store_float)(const PairSums& sums, const int columns[2], float* const d[2], int64_t stride);
  /// The activation of h. With a gate: panel 0 is gate's, panel 1 up's, out [rows][columns[0]]. Without:
  /// out [rows][columns[0] + columns[1]]. h is stored too where targets say.
  void (*activate)(const ActivationFunction& function, const PairSums& sums, const PairTargets& targets,
                   Bf16* out, int64_t out_stride);

  /// out [cols] = sum over k of weights[k] * rows[k], in that order; float32. Null rows are left out.
  void (*combine)(const Bf16* const* rows, const float* weights, int64_t count, int64_t cols, float* out);
  void (*round_row)(const float* x, int64_t cols, Bf16* out);
};

/// An instruction set's function for `kind`: it has one a kind, Activations::of_rows<kind>.
template <class Activations>
constexpr decltype(RowFunctions::activate) rows_of_kind(ActivationKind kind) {
  switch (kind) {
    case ActivationKind::kSwiglu:
      return Activations::template of_rows<ActivationKind::kSwiglu>;
    case ActivationKind::kSwigluStep:
      return Activations::template of_rows<ActivationKind::kSwigluStep>;
    case ActivationKind::kGeglu:
      return Activations::template of_rows<ActivationKind::kGeglu>;
    case ActivationKind::kGegluTanh:
      return Activations::template of_rows<ActivationKind::kGegluTanh>;
    case ActivationKind::kReluSquared:
      return Activations::template of_rows<ActivationKind::kReluSquared>;
    case ActivationKind::kSilu:
      return Activations::template of_rows<ActivationKind::kSilu>;
    case ActivationKind::kGelu:
      break;
  }
  return Activations::template of_rows<ActivationKind::kGelu>;
}

const RowFunctions& row_functions_of(Isa isa);

/// Value of every e4m3 code.
const float* e4m3_values();

int64_t quantizer_scratch_bytes(int64_t cols);

// Entries of the tables that are not loops.
namespace avx2 {
void make_int_blocks(const uint8_t* codes, const uint8_t* scales, int64_t cols, IntBlock* out);
void decode_nvfp4(const uint8_t* codes, const float* scales, int64_t cols, float* out);
}  // namespace avx2
namespace avx512 {
void decode_nvfp4(const uint8_t* codes, const float* scales, int64_t cols, float* out);
void write_nvfp4_tiles(const uint8_t* codes, const uint8_t* scales, int64_t cols, int64_t stride, Bf16* out,
                       const Bf16* ask_for);
int write_normalised_bf16(const Bf16* x, int64_t cols, int unit_exponent, int64_t stride, Bf16* out,
                          const Bf16* ask_for);
void store_bf16(const PairSums& sums, const PairTargets& targets);
void activate(const ActivationFunction& function, const PairSums& sums, const PairTargets& targets, Bf16* out,
              int64_t out_stride);
void combine(const Bf16* const* rows, const float* weights, int64_t count, int64_t cols, float* out);
}  // namespace avx512
namespace avx512_vbmi {
/// Codes and scales as loops::quantize_nvfp4 has them, of as many values from the first as it can: the rest,
/// from the returned column on, is the caller's (a few blocks at the end, and all behind one that is not
/// finite).
int64_t quantize_nvfp4(const float* x, int64_t cols, float global, uint8_t* codes, uint8_t* scales);
}  // namespace avx512_vbmi

}  // namespace fourfold::cpu
