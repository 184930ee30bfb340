// Layers on a GPU, stage by stage, each stage's reference fed with the layer's own previous output; and the
// backend's GEMMs. Exit code 77: no GPU here.
#include <algorithm>
#include <cmath>

#include "cuda_support.h"
#include "fourfold/comparison.h"
#include "fourfold/error.h"
#include "fourfold/reference.h"
#include "layer_soundness.h"
#include "random_layer.h"
#include "tested_backend.h"
#include "tools/gemmtest.h"
#include "tools/layer_trace.h"
#include "tools/layertest.h"
#include "tools/mirror.h"

namespace fourfold {
namespace {

TEST(GpuLayer, IsSoundInEveryFormatAndScalePolicy) {
  using enum ScalePolicy;
  uint64_t salt = 0;
  for (const ActivationFormat format : {ActivationFormat::kNvfp4, ActivationFormat::kNvfp4x2}) {
    for (const ScalePolicy x : {kStatic, kMaxOverExperts, kDynamicTensor, kDynamicToken}) {
      for (const ScalePolicy intermediate : {kStatic, kMaxOverExperts, kDynamicTensor, kDynamicToken}) {
        expect_sound({}, options_for(format, x, intermediate), ++salt);
      }
    }
  }
  for (const ActivationFormat format : tested_formats()) expect_sound({}, options_for(format), ++salt);
}

const ActivationFunction kActivations[] = {
    {},
    {ActivationKind::kSwiglu, 1.0f, 0.0f, 2.0f},
    {ActivationKind::kSwiglu, 1.702f, 1.0f, 3.0f},
    {ActivationKind::kSwigluStep, 1.0f, 0.0f, 1.5f},
    {ActivationKind::kSwigluStep},
    {ActivationKind::kGeglu},
    {ActivationKind::kGegluTanh},
    {ActivationKind::kReluSquared},
    {ActivationKind::kSilu},
    {ActivationKind::kGelu},
};

TEST(GpuLayer, IsSoundForEveryActivationWithAndWithoutBiases) {
  uint64_t salt = 100;
  for (const ActivationFunction& activation : kActivations) {
    for (const Biases biases : {Biases::kNone, Biases::kSome, Biases::kAll}) {
      RandomLayerShape shape;
      shape.activation = activation;
      shape.biases = biases;
      expect_sound(shape, options_for(tested_formats().back()), ++salt);
    }
  }
}

TEST(GpuLayer, IsSoundForShapesOfEverySize) {
  const RandomLayerShape shapes[] = {
      {1, 16, 16, 1, 1},      {1, 64, 64, 8, 8},     {3, 80, 48, 300, 2},   {200, 48, 336, 2, 1},
      {5, 2880, 2880, 3, 2},  {2, 7168, 2048, 2, 2}, {129, 320, 272, 5, 4}, {1000, 128, 64, 7, 2},
      {64, 1024, 768, 16, 8}, {513, 64, 64, 1, 1},   {17, 144, 208, 40, 6}, {300, 256, 128, 3, 3},
      {12, 1088, 576, 8, 8},  {60, 384, 192, 8, 8},
  };
  uint64_t salt = 200;
  for (const RandomLayerShape& shape : shapes) {
    expect_sound(shape, options_for(ActivationFormat::kNvfp4), ++salt);
    expect_sound(shape, options_for(tested_formats().back()), ++salt);
  }
}

TEST(GpuLayer, IsSoundForEveryRouting) {
  uint64_t salt = 300;
  for (const Assignment assignment :
       {Assignment::kOneExpert, Assignment::kSomeAbsent, Assignment::kRepeated}) {
    for (const int64_t tokens : {1, 37, 400}) {
      RandomLayerShape shape;
      shape.tokens = tokens;
      shape.assignment = assignment;
      if (tokens == 1 && assignment == Assignment::kSomeAbsent) continue;  // perhaps no row at all
      shape.weight_on_input = tokens == 37;
      expect_sound(shape, options_for(ActivationFormat::kNvfp4), ++salt);
    }
  }
}

// So many experts that those with more rows than the mean, or fewer, may have kernels of their own.
TEST(GpuLayer, IsSoundWhereOneOfManyExpertsIsAmongEveryTokens) {
  struct Many {
    int64_t tokens, experts;
    ActivationFormat format;
  };
  uint64_t salt = 350;
  for (const auto& [tokens, experts, format] : {Many{900, 700, ActivationFormat::kNvfp4},
                                                {900, 700, tested_formats().back()},
                                                {2200, 700, tested_formats().back()},
                                                {3800, 340, ActivationFormat::kNvfp4}}) {
    RandomLayerShape shape{tokens, 272, 144, experts, 8};
    shape.assignment = Assignment::kOneAmongAll;
    expect_sound(shape, options_for(format), ++salt);
  }
}

TEST(GpuLayer, IsSoundForWeightsInEveryLayout) {
  uint64_t salt = 400;
  for (const ScaleLayout layout : {ScaleLayout::kRowMajor, ScaleLayout::kSwizzled128x4}) {
    for (const GlobalScaleKind kind : {GlobalScaleKind::kMultiplier, GlobalScaleKind::kDivisor}) {
      RandomLayerShape shape;
      shape.scale_layout = layout;
      shape.global_kind = kind;
      expect_sound(shape, options_for(ActivationFormat::kNvfp4), ++salt);
    }
  }
}

TEST(GpuLayer, IsSoundWithASharedExpert) {
  uint64_t salt = 450;
  for (const ActivationFormat format : tested_formats()) {
    for (const ScalePolicy policy : {ScalePolicy::kStatic, ScalePolicy::kMaxOverExperts,
                                     ScalePolicy::kDynamicTensor, ScalePolicy::kDynamicToken}) {
      RandomLayerShape shape;
      shape.shared_intermediate = 16 * static_cast<int64_t>(1 + salt % 20);
      shape.shared_gate = salt % 2 == 0;
      shape.biases = salt % 3 == 0 ? Biases::kAll : Biases::kNone;
      expect_sound(shape, options_for(format, policy, policy), ++salt);
    }
  }
}

TEST(GpuLayer, IsSoundForRandomCombinations) {
  Engine random = engine(500);
  const auto pick = [&](const auto& list) { return list[below(random, std::ssize(list))]; };
  const std::vector<ScalePolicy> policies = {ScalePolicy::kStatic, ScalePolicy::kMaxOverExperts,
                                             ScalePolicy::kDynamicTensor, ScalePolicy::kDynamicToken};
  const std::vector<ActivationFormat> formats = tested_formats();
  for (uint64_t trial = 0; trial < 40; ++trial) {
    RandomLayerShape shape;
    shape.tokens = 1 + below(random, 150);
    shape.hidden = 16 * (1 + below(random, 30));
    shape.intermediate = 16 * (1 + below(random, 20));
    shape.experts = 1 + below(random, 20);
    shape.top_k = 1 + below(random, std::min<int64_t>(shape.experts, 8));
    shape.activation = kActivations[below(random, std::ssize(kActivations))];
    shape.biases = pick(std::vector{Biases::kNone, Biases::kSome, Biases::kAll});
    shape.assignment = pick(std::vector{Assignment::kUniform, Assignment::kOneExpert, Assignment::kRepeated});
    shape.weight_on_input = below(random, 4) == 0;
    expect_sound(shape, options_for(pick(formats), pick(policies), pick(policies)), 500 + trial);
  }
}

TEST(GpuLayer, WithoutAnyRowGivesZeros) {
  for (const RandomLayerShape& shape :
       {RandomLayerShape{0}, RandomLayerShape{5}, RandomLayerShape{2, 192, 128, 40, 3}}) {
    RandomLayer layer(shape, test_seed());
    std::fill(layer.inputs.topk_ids.begin(), layer.inputs.topk_ids.end(), -1);
    const auto moe = tested_backend().make_layer(layer.weights, layer.config, {});
    const LayerTrace run = trace(*moe, layer.inputs, nullptr, tested_backend().memory());
    EXPECT_EQ(run.permutation.group_offsets, std::vector<int32_t>(static_cast<size_t>(shape.experts + 1)));
    EXPECT_TRUE(std::all_of(run.y.begin(), run.y.end(), [](Bf16 v) { return v.bits == 0; }));
    EXPECT_EQ(run.permutation.status, kStatusOk);
  }
}

TEST(GpuLayer, CountsAnIdOutOfRangeAsAbsentAndSaysSo) {
  RandomLayer layer({}, test_seed());
  const auto moe = tested_backend().make_layer(layer.weights, layer.config, {});
  layer.inputs.topk_ids[4] = -1;
  const LayerTrace absent = trace(*moe, layer.inputs, nullptr, tested_backend().memory());
  layer.inputs.topk_ids[4] = static_cast<int32_t>(layer.config.experts);
  const LayerTrace bad = trace(*moe, layer.inputs, nullptr, tested_backend().memory());
  EXPECT_EQ(absent.permutation.status, kStatusOk);
  EXPECT_EQ(bad.permutation.status, kStatusExpertOutOfRange);
  EXPECT_EQ(absent.y, bad.y);
}

TEST(GpuGemm, HasNoFindingForShapesOfEverySize) {
  const int64_t shapes[][4] = {{5, 300, 328, 272}, {1, 1, 1, 16},       {3, 7, 2, 32},
                               {4, 5, 130, 48},    {16, 700, 512, 512}, {2, 65, 17, 1040}};
  for (const auto& [groups, rows, columns, depth] : shapes) {
    const GemmtestReport report =
        run_gemmtest({groups, rows, columns, depth, test_seed(), &tested_backend()});
    for (const GemmtestRow& row : report.rows) {
      // Of the other oracle, a matmul of what was quantized, few elements are too small a sample.
      if (row.against != "emulation") continue;
      EXPECT_FALSE(row.exceeds()) << groups << "," << rows << "," << columns << "," << depth << ": "
                                  << row.operation << ", " << row.scales << ": " << row.comparison.rel_l2
                                  << " above " << row.limit;
    }
    EXPECT_EQ(report.different_elements, 0);
  }
}

/// Grouped GEMM to float32 in every activation format against the reference's float64 sums. Each of K
/// additions in float32 errs by at most 2^-23 of a partial sum (tensor cores may truncate).
TEST(GpuGemm, MultipliesEveryActivationFormatToFloat32) {
  constexpr int64_t kRows = 90, kColumns = 96, kDepth = 304, kGroups = 3;
  const std::vector<int32_t> offsets = {0, 50, 50, kRows};
  const std::vector<float> group_scales = {0.5f, 2.0f, 0.1f};
  Engine random = engine(600);
  const RandomLayer weights({1, kDepth, kColumns, kGroups, 1}, test_seed() + 600);
  std::vector<WeightView> b;
  for (const Expert& expert : weights.weights.experts) b.push_back(expert.up);
  const std::vector<Bf16> x = random_rows(random, kRows, kDepth, Values::kOrdinary);
  for (const ActivationFormat format : tested_formats()) {
    SCOPED_TRACE(to_string(format));
    StagedBuffers staged(format, kRows, kDepth);
    if (is_nvfp4(format)) {
      reference::activation_scales(ScalePolicy::kDynamicToken, {x.data(), kRows, kDepth}, offsets, {},
                                   staged.views.row_scales);
    }
    reference::stage(format, {x.data(), kRows, kDepth}, staged.views);
    GroupedGemmArgs args;
    args.a = staged.views.view(format, kRows, kDepth);
    if (format == ActivationFormat::kBf16) args.a.group_scales = group_scales;
    args.b = b;
    args.group_offsets = offsets;
    args.accumulation = Accumulation::kFloat64;
    std::vector<float> expected(kRows * kColumns), found(kRows * kColumns, NAN);
    args.d = MatrixView<float>(expected.data(), kRows, kColumns);
    reference::grouped_gemm(args);

    const Memory& memory = tested_backend().memory();
    Mirror mirror(memory);
    args.accumulation = Accumulation::kFloat32;
    const StagedActivations brought = mirror.bring(staged.views);
    args.a = brought.view(format, kRows, kDepth);
    if (format == ActivationFormat::kBf16) args.a.group_scales = mirror.bring(std::span(group_scales));
    args.group_offsets = mirror.bring(std::span(offsets));
    args.d = mirror.bring(MatrixView<float>(found.data(), kRows, kColumns));
    std::vector<WeightView> device_b = b;
    for (WeightView& weight : device_b) {
      auto& blocks = std::get<BlockScaledView>(weight);
      blocks.codes = mirror.bring(blocks.codes);
      blocks.scales = mirror.bring(blocks.scales, static_cast<size_t>(blocks.rows * blocks.blocks_per_row()));
    }
    args.b = device_b;
    const AlignedWorkspace workspace(tested_backend().gemm_workspace_bytes(args), memory);
    args.workspace = workspace.span();
    tested_backend().grouped_gemm(args);
    mirror.fetch();
    const Comparison comparison = compare(MatrixView<const float>(expected.data(), kRows, kColumns),
                                          MatrixView<const float>(found.data(), kRows, kColumns));
    EXPECT_LE(comparison.rel_l2, kDepth * 0x1p-23);
  }
}

}  // namespace
}  // namespace fourfold
