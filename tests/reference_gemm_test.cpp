// The reference's GEMMs: scale layouts, groups, scales by row and by group, and arguments that do not fit.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "fourfold/error.h"
#include "fourfold/quantize.h"
#include "fourfold/reference.h"
#include "fourfold/scale_layout.h"
#include "refusals.h"
#include "tools/gemmtest.h"
#include "tools/layer_trace.h"
#include "tools/random.h"

namespace fourfold {
namespace {

BlockScaledMatrix random_matrix(int64_t rows, int64_t cols, uint64_t stream) {
  std::vector<float> values(static_cast<size_t>(rows * cols));
  Random random(11, Random::Purpose::kOperand, stream);
  for (float& value : values) value = static_cast<float>(random.normal());
  const MatrixView<const float> view(values.data(), rows, cols);
  return quantize_nvfp4(view, nvfp4_global_scale(absolute_maximum(view)));
}

ActivationView activations_of(const BlockScaledMatrix& matrix) {
  ActivationView a;
  a.format = ActivationFormat::kNvfp4;
  a.rows = matrix.rows;
  a.cols = matrix.cols;
  a.codes = {matrix.codes.data(), matrix.rows, matrix.cols / 2};
  a.scales = matrix.scales.data();
  return a;
}

/// Decoded without their scales by row, [term][rows * cols].
std::vector<std::vector<float>> terms_of(ActivationFormat format, const StagedBuffers& staged, int64_t rows,
                                         int64_t cols) {
  const auto blocks = [&](const std::vector<uint8_t>& codes, const std::vector<uint8_t>& scales) {
    return dequantize(BlockScaledView{QuantFormat::kNvfp4,
                                      rows,
                                      cols,
                                      {codes.data(), rows, cols / 2},
                                      scales.data(),
                                      cols / 16,
                                      ScaleLayout::kRowMajor,
                                      {}});
  };
  std::vector<std::vector<float>> terms(1);
  if (format == ActivationFormat::kBf16) {
    for (const Bf16 value : staged.values) terms[0].push_back(static_cast<float>(value));
  } else if (format == ActivationFormat::kFp8) {
    for (const uint8_t code : staged.codes) terms[0].push_back(decode_e4m3(code));
  } else {
    terms[0] = blocks(staged.codes, staged.scales);
    if (format == ActivationFormat::kNvfp4x2)
      terms.push_back(blocks(staged.residual_codes, staged.residual_scales));
  }
  return terms;
}

struct GemmShape {
  int64_t groups, rows, columns, depth;
};
class GemmWithSwizzledScales : public testing::TestWithParam<GemmShape> {};

// gemmtest poisons all padding with 0x7F, NaN in e4m3.
TEST_P(GemmWithSwizzledScales, EqualsRowMajorBitForBitOnPoisonedPadding) {
  const GemmShape shape = GetParam();
  GemmtestRequest request{shape.groups, shape.rows, shape.columns, shape.depth, 5, &reference_backend()};
  const GemmtestReport report = run_gemmtest(request);
  EXPECT_EQ(report.different_elements, 0);
  EXPECT_EQ(report.elements, 2 * shape.rows * shape.columns);
  for (const GemmtestRow& row : report.rows) {
    EXPECT_FALSE(row.exceeds()) << row.operation << " " << row.scales << " against " << row.against << ": "
                                << row.comparison.rel_l2;
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, GemmWithSwizzledScales,
                         testing::Values(GemmShape{5, 300, 328, 272}, GemmShape{1, 128, 128, 64},
                                         GemmShape{3, 2, 17, 80}, GemmShape{9, 131, 129, 16},
                                         GemmShape{4, 257, 40, 528}));

TEST(GroupedGemm, EqualsADenseGemmOfEveryGroup) {
  const std::vector<int32_t> offsets = {0, 3, 3, 40, 41};
  const BlockScaledMatrix a = random_matrix(41, 96, 1);
  std::vector<BlockScaledMatrix> weights;
  std::vector<WeightView> views;
  for (uint64_t e = 0; e < 4; ++e) weights.push_back(random_matrix(24, 96, 2 + e));
  for (const BlockScaledMatrix& weight : weights) views.emplace_back(weight.view());
  std::vector<float> grouped(41 * 24), dense(41 * 24);
  reference::grouped_gemm({activations_of(a), views, offsets, MatrixView<float>(grouped.data(), 41, 24)});
  for (size_t e = 0; e < 4; ++e) {
    ActivationView rows = activations_of(a);
    const int64_t first = offsets[e], count = offsets[e + 1] - first;
    rows.rows = count;
    rows.codes = rows.codes.rows_from(first, count);
    rows.scales += first * 6;
    reference::gemm({rows, views[e], MatrixView<float>(dense.data() + first * 24, count, 24)});
  }
  EXPECT_EQ(grouped, dense);
}

TEST(GroupedGemm, TakesGlobalScalesByRowOrByGroup) {
  const std::vector<int32_t> offsets = {0, 2, 5};
  const BlockScaledMatrix a = random_matrix(5, 32, 1), b = random_matrix(8, 32, 2);
  const std::vector<WeightView> weights = {b.view(), b.view()};
  const std::vector<float> by_group = {0.5f, 3.0f}, by_row = {0.5f, 0.5f, 3.0f, 3.0f, 3.0f};
  std::vector<float> first(40), second(40);
  ActivationView view = activations_of(a);
  view.group_scales = by_group;
  reference::grouped_gemm({view, weights, offsets, MatrixView<float>(first.data(), 5, 8)});
  view.group_scales = {};
  view.row_scales = by_row;
  reference::grouped_gemm({view, weights, offsets, MatrixView<float>(second.data(), 5, 8)});
  EXPECT_EQ(first, second);
}

TEST(GroupedGemm, DoesNotDependOnHowRowsAreTiled) {
  const BlockScaledMatrix a = random_matrix(70, 48, 1), b = random_matrix(8, 48, 2);
  const std::vector<WeightView> weights = {b.view()};
  std::vector<float> whole(70 * 8), single(70 * 8);
  const std::vector<int32_t> all = {0, 70}, one = {0, 1};
  reference::grouped_gemm({activations_of(a), weights, all, MatrixView<float>(whole.data(), 70, 8)});
  for (int64_t row = 0; row < 70; ++row) {
    ActivationView view = activations_of(a);
    view.rows = 1;
    view.codes = view.codes.rows_from(row, 1);
    view.scales += row * 3;
    reference::grouped_gemm({view, weights, one, MatrixView<float>(single.data() + row * 8, 1, 8)});
  }
  EXPECT_EQ(whole, single);
}

/// What docs/formats.md, section 7, says of a sum: k ascending, every product and every addition rounded; of
/// two terms the first comes first.
class OneProductAfterTheOther : public testing::TestWithParam<ActivationFormat> {};

TEST_P(OneProductAfterTheOther, IsASum) {
  constexpr int64_t kDepth = 80;
  Random random(11, Random::Purpose::kOperand, 3);
  for (const int64_t rows : {1, 4, 5, 33}) {
    std::vector<Bf16> x(static_cast<size_t>(rows * kDepth));
    for (Bf16& value : x) value = encode_bf16(static_cast<float>(random.normal()));
    StagedBuffers staged(GetParam(), rows, kDepth);
    for (float& scale : staged.row_scales) scale = 1e-3f;
    reference::stage(GetParam(), {x.data(), rows, kDepth}, staged.views);
    const std::vector<std::vector<float>> terms = terms_of(GetParam(), staged, rows, kDepth);
    for (const int64_t columns : {1, 8, 19}) {
      const BlockScaledMatrix b = random_matrix(columns, kDepth, 2);
      std::vector<float> found(static_cast<size_t>(rows * columns)), w(kDepth);
      GemmArgs args{staged.views.view(GetParam(), rows, kDepth), b.view(),
                    MatrixView<float>(found.data(), rows, columns)};
      for (const Accumulation accumulation : {Accumulation::kFloat32, Accumulation::kFloat64}) {
        args.accumulation = accumulation;
        reference::gemm(args);
        for (int64_t at = 0; at < rows * columns; ++at) {
          const int64_t row = at / columns;
          decode_row(b.view(), at % columns, w.data());
          float sum = 0.0f;
          double wide_sum = 0.0;
          for (int64_t k = 0; k < kDepth; ++k) {
            for (const std::vector<float>& term : terms) {
              const float value = term[static_cast<size_t>(row * kDepth + k)],
                          weight = w[static_cast<size_t>(k)];
              sum += weight * value;
              wide_sum += double{weight} * value;
            }
          }
          if (accumulation == Accumulation::kFloat64) sum = static_cast<float>(wide_sum);
          const float row_scale =
              staged.row_scales.empty() ? 1.0f : staged.row_scales[static_cast<size_t>(row)];
          EXPECT_EQ(found[static_cast<size_t>(at)], row_scale * b.global.multiplier() * sum)
              << rows << " x " << columns << ", row " << row << ", column " << at % columns;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, OneProductAfterTheOther,
                         testing::Values(ActivationFormat::kNvfp4, ActivationFormat::kNvfp4x2,
                                         ActivationFormat::kFp8, ActivationFormat::kBf16));

TEST(GroupedGemm, LeavesWhatLiesBesideTheOutputAlone) {
  const BlockScaledMatrix a = random_matrix(3, 32, 1), b = random_matrix(4, 32, 2);
  std::vector<float> d(3 * 10, -7.0f);
  reference::gemm({activations_of(a), b.view(), MatrixView<float>(d.data() + 2, 3, 4, 10)});
  EXPECT_EQ(std::count(d.begin(), d.end(), -7.0f), 3 * 6);
}

TEST(Gemm, RefusesArgumentsThatDoNotFit) {
  const BlockScaledMatrix a = random_matrix(5, 32, 1), b = random_matrix(8, 32, 2),
                          deeper = random_matrix(8, 48, 3);
  std::vector<float> d(40);
  const MatrixView<float> out(d.data(), 5, 8);
  const std::vector<WeightView> one = {b.view()};
  const std::vector<int32_t> good = {0, 5}, descending = {0, 6, 5}, short_one = {0, 4};
  EXPECT_THROW(reference::gemm({activations_of(a), deeper.view(), out}), Error);
  EXPECT_THROW(reference::gemm({activations_of(a), b.view(), MatrixView<float>(d.data(), 8, 5)}), Error);
  EXPECT_THROW(reference::grouped_gemm({activations_of(a), one, short_one, out}), Error);
  EXPECT_THROW(reference::grouped_gemm({activations_of(a), one, descending, out}), Error);
  const std::vector<WeightView> two = {b.view(), b.view()};
  EXPECT_THROW(reference::grouped_gemm({activations_of(a), two, descending, out}), Error);
  EXPECT_NO_THROW(reference::grouped_gemm({activations_of(a), one, good, out}));
}

TEST(Gemm, NamesTheScalesThatDoNotFit) {
  const BlockScaledMatrix a = random_matrix(5, 32, 1), b = random_matrix(8, 32, 2);
  const std::vector<float> four(4, 1.0f), five(5, 1.0f);
  const auto refusal_of_activations = [&](const ActivationView& view) {
    return message_of([&] { validate(view, 2); });
  };
  ActivationView view = activations_of(a);
  view.row_scales = four;
  EXPECT_EQ(refusal_of_activations(view), "row scales: expected 5, found 4");
  view.group_scales = five;
  EXPECT_EQ(refusal_of_activations(view), "activation scales: expected one a row or one a group, found both");
  view.row_scales = {};
  EXPECT_EQ(refusal_of_activations(view), "group scales: expected 2, found 5");
  view = activations_of(a);
  view.format = ActivationFormat::kNvfp4x2;
  view.residual_codes = view.codes;
  EXPECT_EQ(refusal_of_activations(view), "nvfp4x2 activations: expected residual scales, found none");

  std::vector<float> d(40);
  const MatrixView<float> out(d.data(), 5, 8);
  const auto refusal_of_weight = [&](const WeightView& weight) {
    return message_of([&] { validate(GemmArgs{activations_of(a), weight, out}); });
  };
  BlockScaledView blocks = b.view();
  blocks.scale_stride = 1;
  EXPECT_TRUE(refusal_of_weight(blocks).ends_with("expected a row stride of at least 2, found 1"))
      << refusal_of_weight(blocks);
  const std::vector<float> values(8 * 32, 1.0f);
  const Fp8Matrix matrix = quantize_fp8_tiles({values.data(), 8, 32}, TileScaleType::kF32);
  Fp8View fp8 = matrix.view();
  EXPECT_EQ(refusal_of_weight(fp8), "no error");
  fp8.tile_cols = 0;
  EXPECT_TRUE(refusal_of_weight(fp8).ends_with("expected tiles of at least one value, found [128, 0]"))
      << refusal_of_weight(fp8);
  fp8.scales = nullptr;
  EXPECT_TRUE(refusal_of_weight(fp8).ends_with("expected tile scales, found a null pointer"))
      << refusal_of_weight(fp8);
}

}  // namespace
}  // namespace fourfold
