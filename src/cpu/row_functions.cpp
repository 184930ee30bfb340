#include "cpu/row_functions.h"

#include <algorithm>
#include <array>

#include "cpu/activation_loops.h"
#include "cpu/row_loops.h"
#include "cpu/targets.h"

namespace fourfold::cpu {
namespace {

constexpr std::array<float, 256> kE4m3Values = [] {
  std::array<float, 256> values{};
  for (size_t code = 0; code < values.size(); ++code) values[code] = decode_e4m3(static_cast<uint8_t>(code));
  return values;
}();

constexpr int64_t kScratchAlignment = 64;

constexpr int64_t padded(int64_t bytes) {
  return (bytes + kScratchAlignment - 1) / kScratchAlignment * kScratchAlignment;
}

loops::QuantizerScratch carve(std::byte* scratch, int64_t cols) {
  std::byte* const codes = scratch + padded(cols / kBlockDepth * 4);
  return {reinterpret_cast<float*>(scratch), reinterpret_cast<uint32_t*>(codes),
          reinterpret_cast<float*>(codes + padded(cols * 4))};
}

namespace any {

FOURFOLD_INLINE void quantize_nvfp4x2(const float* x, int64_t cols, float global, uint8_t* codes,
                                      uint8_t* scales, uint8_t* residual_codes, uint8_t* residual_scales,
                                      const loops::QuantizerScratch& scratch) {
  loops::quantize_nvfp4(x, cols, global, codes, scales, scratch);
  loops::subtract_quantized(x, cols, global, scales, scratch);
  loops::quantize_nvfp4(scratch.residual, cols, global, residual_codes, residual_scales, scratch);
}

FOURFOLD_INLINE void make_int_blocks(const uint8_t* codes, const uint8_t* scales, int64_t cols,
                                     IntBlock* out) {
  constexpr int8_t kDoubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  for (int64_t block = 0; block < cols / kBlockDepth; ++block) {
    IntBlock& to = out[block];
    int32_t sum = 0;
    for (int k = 0; k < kBlockDepth; ++k) {
      const int8_t code = kDoubled[codes[block * (kBlockDepth / 2) + k / 2] >> (4 * (k % 2)) & 15];
      to.codes[int_position(k)] = code;
      sum += code;
    }
    to.start = kIntBias - kWeightBias * sum;
    to.scale = kE4m3Values[scales[block]] * kIntScale;
  }
}

/// One row of a pair in float32, before rounding: alpha * sum + bias.
FOURFOLD_INLINE void finish_row(const PairSums& sums, int64_t row, float* values) {
  const float* const first = sums.sums + row * sums.terms * kPairRows;
  float total[kPairRows];
  for (int i = 0; i < kPairRows; ++i) total[i] = first[i];
  if (sums.terms == 2) {
    for (int i = 0; i < kPairRows; ++i) total[i] += first[kPairRows + i];
  }
  if (sums.row_factors != nullptr) {
    const float factor = sums.row_factors[row];
    for (int i = 0; i < kPairRows; ++i) total[i] *= factor;
  }
  const float row_scale = sums.row_scales != nullptr ? sums.row_scales[row] : 1.0f;
  for (int panel = 0; panel < 2; ++panel) {
    float* const out = values + panel * kPanelRows;
    const float alpha = row_scale * sums.globals[panel];
    for (int i = 0; i < kPanelRows; ++i) out[i] = alpha * total[panel * kPanelRows + i];
    if (const float* const bias = sums.biases[panel]) {
      for (int i = 0; i < kPanelRows; ++i) out[i] += bias[i];
    }
  }
}

/// Up to 16 values that are bf16 already.
FOURFOLD_INLINE void store_bf16_values(const float* values, int count, Bf16* out) {
  if (count == kPanelRows) {
    for (int i = 0; i < kPanelRows; ++i) out[i].bits = static_cast<uint16_t>(loops::to_bits(values[i]) >> 16);
  } else {
    for (int i = 0; i < count; ++i) out[i].bits = static_cast<uint16_t>(loops::to_bits(values[i]) >> 16);
  }
}

/// Of one row: rounds to bf16 in place and stores what targets want.
FOURFOLD_INLINE void round_and_store(const PairTargets& targets, int64_t row, float* values) {
  for (int i = 0; i < kPairRows; ++i) values[i] = loops::rounded_to_bf16(values[i]);
  for (int panel = 0; panel < 2; ++panel) {
    if (targets.h[panel] == nullptr) continue;
    store_bf16_values(values + panel * kPanelRows, targets.columns[panel],
                      targets.h[panel] + row * targets.h_stride);
  }
}

FOURFOLD_INLINE void store_bf16(const PairSums& sums, const PairTargets& targets) {
  for (int64_t row = 0; row < sums.rows; ++row) {
    float values[kPairRows];
    finish_row(sums, row, values);
    round_and_store(targets, row, values);
  }
}

FOURFOLD_INLINE void store_float(const PairSums& sums, const int columns[2], float* const d[2],
                                 int64_t stride) {
  for (int64_t row = 0; row < sums.rows; ++row) {
    float values[kPairRows];
    finish_row(sums, row, values);
    for (int panel = 0; panel < 2; ++panel) {
      for (int i = 0; i < columns[panel]; ++i) d[panel][row * stride + i] = values[panel * kPanelRows + i];
    }
  }
}

template <ActivationKind kKind>
FOURFOLD_INLINE void activate_rows(const ActivationFunction& function, const PairSums& sums,
                                   const PairTargets& targets, Bf16* out, int64_t out_stride) {
  constexpr int kLanes = is_gated(kKind) ? kPanelRows : kPairRows;
  constexpr int kUp = is_gated(kKind) ? kPanelRows : 0;
  const float alpha = function.alpha, beta = function.beta, limit = function.limit;
  for (int64_t row = 0; row < sums.rows; ++row) {
    float values[kPairRows];
    finish_row(sums, row, values);
    round_and_store(targets, row, values);
    float activated[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      activated[i] =
          loops::rounded_to_bf16(loops::activate<kKind>(values[i], values[kUp + i], alpha, beta, limit));
    }
    for (int first = 0; first < kLanes; first += kPanelRows) {
      store_bf16_values(activated + first, targets.columns[first / kPanelRows],
                        out + row * out_stride + first);
    }
  }
}

FOURFOLD_INLINE void combine(const Bf16* const* rows, const float* weights, int64_t count, int64_t cols,
                             float* out) {
  for (int64_t col = 0; col < cols; ++col) out[col] = 0.0f;
  for (int64_t k = 0; k < count; ++k) {
    if (rows[k] == nullptr) continue;
    const float weight = weights[k];
    const Bf16* const row = rows[k];
    for (int64_t col = 0; col < cols; ++col) {
      out[col] += weight * loops::to_float(uint32_t{row[col].bits} << 16);
    }
  }
}

FOURFOLD_INLINE void round_row(const float* x, int64_t cols, Bf16* out) {
  for (int64_t col = 0; col < cols; ++col) out[col].bits = loops::round_to_bf16(x[col]);
}

}  // namespace any

void make_portable_int_blocks(const uint8_t* codes, const uint8_t* scales, int64_t cols, IntBlock* out) {
  any::make_int_blocks(codes, scales, cols, out);
}

void decode_portable_nvfp4(const uint8_t* codes, const float* scales, int64_t cols, float* out) {
  loops::decode_nvfp4(codes, scales, cols, out);
}

namespace rows_portable {
#define FOURFOLD_TARGET
#define FOURFOLD_INT_BLOCKS make_portable_int_blocks
#define FOURFOLD_DECODE_NVFP4 decode_portable_nvfp4
#define FOURFOLD_WRITE_NVFP4_TILES nullptr
#define FOURFOLD_WRITE_NORMALISED_BF16 nullptr
#include "cpu/row_functions_of_target.inc"
#undef FOURFOLD_WRITE_NORMALISED_BF16
#undef FOURFOLD_WRITE_NVFP4_TILES
#undef FOURFOLD_DECODE_NVFP4
#undef FOURFOLD_INT_BLOCKS
#undef FOURFOLD_TARGET
}  // namespace rows_portable

namespace rows_avx2 {
#define FOURFOLD_TARGET FOURFOLD_AVX2
#define FOURFOLD_INT_BLOCKS avx2::make_int_blocks
#define FOURFOLD_DECODE_NVFP4 avx2::decode_nvfp4
#define FOURFOLD_WRITE_NVFP4_TILES nullptr
#define FOURFOLD_WRITE_NORMALISED_BF16 nullptr
#include "cpu/row_functions_of_target.inc"
#undef FOURFOLD_WRITE_NORMALISED_BF16
#undef FOURFOLD_WRITE_NVFP4_TILES
#undef FOURFOLD_DECODE_NVFP4
#undef FOURFOLD_INT_BLOCKS
#undef FOURFOLD_TARGET
}  // namespace rows_avx2

namespace rows_avx512 {
#define FOURFOLD_TARGET FOURFOLD_AVX512
#define FOURFOLD_INT_BLOCKS avx2::make_int_blocks
#define FOURFOLD_DECODE_NVFP4 avx512::decode_nvfp4
#define FOURFOLD_WRITE_NVFP4_TILES avx512::write_nvfp4_tiles
#define FOURFOLD_WRITE_NORMALISED_BF16 avx512::write_normalised_bf16
#define FOURFOLD_EPILOGUES avx512
#include "cpu/row_functions_of_target.inc"
#undef FOURFOLD_EPILOGUES
#undef FOURFOLD_WRITE_NORMALISED_BF16
#undef FOURFOLD_WRITE_NVFP4_TILES
#undef FOURFOLD_DECODE_NVFP4
#undef FOURFOLD_INT_BLOCKS
#undef FOURFOLD_TARGET
}  // namespace rows_avx512

namespace rows_avx512_vbmi {
FOURFOLD_AVX512 void quantize_nvfp4(const float* x, int64_t cols, float global, uint8_t* codes,
                                    uint8_t* scales, std::byte* scratch) {
  const int64_t done = avx512_vbmi::quantize_nvfp4(x, cols, global, codes, scales);
  rows_avx512::quantize_nvfp4(x + done, cols - done, global, codes + done / 2, scales + done / kBlockDepth,
                              scratch);
}
constexpr RowFunctions kFunctions = [] {
  RowFunctions functions = rows_avx512::kFunctions;
  functions.quantize_nvfp4 = quantize_nvfp4;
  return functions;
}();
}  // namespace rows_avx512_vbmi

}  // namespace

const RowFunctions& row_functions_of(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
    case Isa::kAvx512Bf16:
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512vbmi") ? rows_avx512_vbmi::kFunctions : rows_avx512::kFunctions;
    case Isa::kAvx2:
      return rows_avx2::kFunctions;
    case Isa::kPortable:
      break;
  }
  return rows_portable::kFunctions;
}

const float* e4m3_values() {
  return kE4m3Values.data();
}

int64_t quantizer_scratch_bytes(int64_t cols) {
  return padded(cols / kBlockDepth * 4) + 2 * padded(cols * 4);
}

}  // namespace fourfold::cpu
