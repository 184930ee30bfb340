// Sixteen values of a row -> one or two NVFP4 terms, wherever they are wanted: decoded, as codes and scales
// row by row, or stacked for block-scaled tensor cores.
#pragma once

#include "cuda/round_block.cuh"
#include "cuda/rows.cuh"
#include "cuda/stacked_rows.h"
#include "fourfold/scale_layout.h"

namespace fourfold::cuda {

/// Which codes of NVFP4 are written beside decoded values: none, those that QuantizedRows has room for, or
/// also where tensor cores read them.
enum class CodesWanted : uint8_t { kNone, kTapped, kStacked };

/// What is null is not written.
struct QuantizedRows {
  Rows<Bf16> first, second;  ///< decoded terms, without the global scale
  Rows<uint8_t> codes, scales, residual_codes, residual_scales;
  StackedRows stacked;
};

/// A sixth of the largest magnitude: what a block's scale is made of, whatever the global scale.
__device__ inline float sixth_of_largest(const float (&x)[kNvfp4Block]) {
  float amax = 0.0f;
#pragma unroll
  for (const float value : x) amax = max_magnitude_nan(amax, value);
  return amax / 6.0f;
}

/// Codes of two rounded values of a block with this scale. A NaN makes its scale NaN, and then so is every
/// value.
__device__ inline uint8_t code_pair(float low, float high, uint8_t scale) {
  if (scale == kE4m3NanCode) return kE2m1NanCode * 0x11;
  return static_cast<uint8_t>(encode_e2m1(low) | encode_e2m1(high) << 4);
}

/// Codes and scale of block `index`, where they are asked for.
__device__ inline void store_codes(const float (&rounded)[kNvfp4Block], uint8_t scale, int32_t row,
                                   int32_t index, const Rows<uint8_t>& codes, const Rows<uint8_t>& scales) {
  if (scales.data != nullptr) scales.row(row)[index] = scale;
  if (codes.data == nullptr) return;
  uint8_t* to = codes.row(row) + int64_t{index} * (kNvfp4Block / 2);
#pragma unroll
  for (int i = 0; i < kNvfp4Block; i += 2) to[i / 2] = code_pair(rounded[i], rounded[i + 1], scale);
}

/// Eight bytes of codes and a scale of one term of a row, at their place.
__device__ inline void store_stacked_block(uint2 codes, uint8_t scale, const RowPlace& place, int term,
                                           int32_t index, const StackedRows& to) {
  uint8_t* row = to.codes + int64_t{place.stacked[term]} * to.code_stride;
  reinterpret_cast<uint2*>(row)[index] = codes;
  const bool last = index == static_cast<int32_t>(to.scale_columns) - 1;
  if (last && (int64_t{index} + 1) * (kNvfp4Block / 2) < to.code_stride) {
    reinterpret_cast<uint2*>(row)[index + 1] = make_uint2(0, 0);  // K is padded to 32
  }
  to.scales[swizzled_scale_offset(place.scale_row[term], index, to.scale_columns)] = scale;
}

__device__ inline void store_stacked(const float (&rounded)[kNvfp4Block], uint8_t scale,
                                     const RowPlace& place, int term, int32_t index, const StackedRows& to) {
  uint32_t words[2] = {};
#pragma unroll
  for (int i = 0; i < kNvfp4Block; i += 2) {
    words[i / 8] |= uint32_t{code_pair(rounded[i], rounded[i + 1], scale)} << (i % 8 * 4);
  }
  store_stacked_block(make_uint2(words[0], words[1]), scale, place, term, index, to);
}

/// Block `index` of a row, values that bf16 holds exactly.
__device__ inline void store_exact(const float (&x)[kNvfp4Block], int32_t row, int32_t index,
                                   const Rows<Bf16>& to) {
  if (to.data != nullptr) store_exact_block(x, to.row(row) + int64_t{index} * kNvfp4Block, to.aligned);
}

/// The same of pairs of bf16.
__device__ inline void store_decoded(const uint32_t (&words)[kNvfp4Block / 2], int32_t row, int32_t index,
                                     const Rows<Bf16>& to) {
  if (to.data != nullptr) store_block(words, to.row(row) + int64_t{index} * kNvfp4Block, to.aligned);
}

/// One term of sixteen values, of which `sixth` is sixth_of_largest(): what it holds -> `decoded`, pairs of
/// bf16 (without the global scale). As quantize_nvfp4_block, but that zeros have signs in codes alone.
template <CodesWanted kCodes>
__device__ void quantize_term(const float (&x)[kNvfp4Block], float sixth, float global, int32_t row,
                              int32_t index, int term, const RowPlace& place, const QuantizedRows& to,
                              uint32_t (&decoded)[kNvfp4Block / 2]) {
  const BlockScale scale = block_scale(sixth, global);
  float rounded[kNvfp4Block];
  round_block<kCodes != CodesWanted::kNone>(x, scale, rounded);
  if constexpr (kCodes != CodesWanted::kNone) {
    store_codes(rounded, scale.code, row, index, term == 0 ? to.codes : to.residual_codes,
                term == 0 ? to.scales : to.residual_scales);
  }
  if constexpr (kCodes == CodesWanted::kStacked) {
    store_stacked(rounded, scale.code, place, term, index, to.stacked);
  }
#pragma unroll
  for (int i = 0; i < kNvfp4Block / 2; ++i) {
    decoded[i] = scale_pair(rounded[2 * i], rounded[2 * i + 1], scale.value);
  }
}

/// All terms of sixteen values; `x` becomes what the first one left. `place` is not looked at unless codes
/// are stacked.
template <bool kTwoTerms, CodesWanted kCodes>
__device__ void quantize_block(float (&x)[kNvfp4Block], float sixth, float global, int32_t row, int32_t index,
                               const RowPlace& place, const QuantizedRows& to) {
  uint32_t decoded[kNvfp4Block / 2];
  quantize_term<kCodes>(x, sixth, global, row, index, 0, place, to, decoded);
  store_decoded(decoded, row, index, to.first);
  if constexpr (kTwoTerms) {
#pragma unroll
    for (int i = 0; i < kNvfp4Block; ++i) {
      const float value = float_from_bits(i % 2 == 0 ? decoded[i / 2] << 16 : decoded[i / 2] & 0xFFFF0000u);
      x[i] = __fsub_rn(x[i], __fmul_rn(value, global));
    }
    quantize_term<kCodes>(x, sixth_of_largest(x), global, row, index, 1, place, to, decoded);
    store_decoded(decoded, row, index, to.second);
  }
}

}  // namespace fourfold::cuda
