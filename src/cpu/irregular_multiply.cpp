#include "cpu/irregular_multiply.h"

#include <cstring>

#include "fourfold/number_formats.h"

namespace fourfold::cpu {
namespace {

float weight_at(const uint8_t* pair, int panel, int row, int64_t k) {
  const uint8_t* const chunk = pair + k / kChunkDepth * kPairChunkBytes + panel * kPanelChunkBytes;
  const auto in_chunk = static_cast<int>(k % kChunkDepth);
  uint32_t word = 0;
  std::memcpy(&word, chunk + word_offset(row, in_chunk), sizeof(word));
  return decode_e2m1(static_cast<uint8_t>(code_in_word(word, in_chunk % 8))) *
         decode_e4m3(chunk[scale_offset(row, in_chunk / kBlockDepth)]);
}

float nvfp4_at(const uint8_t* codes, const uint8_t* scales, int64_t k) {
  return decode_e2m1(static_cast<uint8_t>(codes[k / 2] >> (4 * (k % 2)))) *
         decode_e4m3(scales[k / kBlockDepth]);
}

/// The value of term `term` at k.
float activation_at(const StagedRow& row, ActivationFormat format, int term, int64_t k) {
  switch (format) {
    case ActivationFormat::kBf16:
      return static_cast<float>(row.values[k]);
    case ActivationFormat::kFp8:
      return decode_e4m3(row.codes[k]);
    case ActivationFormat::kNvfp4:
    case ActivationFormat::kNvfp4x2:
      return term == 0 ? nvfp4_at(row.codes, row.scales, k)
                       : nvfp4_at(row.residual_codes, row.residual_scales, k);
  }
  return 0.0f;
}

}  // namespace

void multiply_irregular(const PanelMatrix& matrix, int64_t pair, const StagedActivations& staged,
                        ActivationFormat format, int64_t first, int64_t count, float* sums) {
  const auto* const weights = reinterpret_cast<const uint8_t*>(matrix.pair(pair));
  for (int64_t r = 0; r < count; ++r) {
    const StagedRow row = row_of(staged, first + r);
    for (int column = 0; column < kPairRows; ++column) {
      float sum = 0.0f;
      for (int64_t k = 0; k < matrix.depth; ++k) {
        const float weight = weight_at(weights, column / kPanelRows, column % kPanelRows, k);
        for (int term = 0; term < terms_of(format); ++term)
          sum += weight * activation_at(row, format, term, k);
      }
      sums[r * kPairRows + column] = sum;
    }
  }
}

}  // namespace fourfold::cpu
