#include "tools/staged_rows.h"

#include <algorithm>
#include <utility>

#include "fourfold/reference.h"

namespace fourfold {
namespace {

/// One term, without the global scale.
void decode_term(const StagedBuffers& staged, ActivationFormat format, int term, int64_t rows, int64_t cols,
                 float* out) {
  BlockScaledView blocks;
  if (is_nvfp4(format)) {
    const auto& codes = term == 0 ? staged.codes : staged.residual_codes;
    const auto& scales = term == 0 ? staged.scales : staged.residual_scales;
    blocks.rows = rows;
    blocks.cols = cols;
    blocks.codes = {codes.data(), rows, cols / 2};
    blocks.scales = scales.data();
    blocks.scale_stride = cols / 16;
  }
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    float* const to = out + row * cols;
    if (is_nvfp4(format)) {
      decode_row(blocks, row, to);
    } else if (format == ActivationFormat::kFp8) {
      const uint8_t* const from = staged.codes.data() + row * cols;
      std::transform(from, from + cols, to, decode_e4m3);
    } else {
      const Bf16* const from = staged.values.data() + row * cols;
      std::transform(from, from + cols, to, [](Bf16 value) { return static_cast<float>(value); });
    }
  }
}

}  // namespace

SampledRows decode_rows(const StagedBuffers& staged, ActivationFormat format, std::vector<int32_t> expert_of,
                        int64_t cols) {
  SampledRows rows;
  rows.rows = static_cast<int64_t>(expert_of.size());
  rows.depth = cols;
  rows.terms = format == ActivationFormat::kNvfp4x2 ? 2 : 1;
  rows.values.resize(static_cast<size_t>(rows.terms * rows.rows * cols));
  for (int term = 0; term < rows.terms; ++term) {
    decode_term(staged, format, term, rows.rows, cols, rows.values.data() + term * rows.rows * cols);
  }
  rows.row_scales = staged.row_scales;
  rows.row_scales.resize(expert_of.size(), 1.0f);  // bf16 has none
  rows.expert_of = std::move(expert_of);
  return rows;
}

std::vector<Bf16> stage_and_decode(ActivationFormat format, MatrixView<const Bf16> rows) {
  StagedBuffers staged(format, rows.rows, rows.cols);
  if (is_nvfp4(format)) {
    reference::activation_scales(ScalePolicy::kDynamicToken, rows, {}, {}, staged.views.row_scales);
  }
  reference::stage(format, rows, staged.views);
  const std::vector<int32_t> no_expert(static_cast<size_t>(rows.rows), 0);
  const SampledRows decoded = decode_rows(staged, format, no_expert, rows.cols);
  std::vector<Bf16> values(static_cast<size_t>(rows.rows * rows.cols));
  std::transform(decoded.values.begin(), decoded.values.begin() + static_cast<ptrdiff_t>(values.size()),
                 values.begin(), encode_bf16);
  return values;
}

}  // namespace fourfold
