// Permutation, expert weights, the choice of a backend, and the layer as callers use it.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "fourfold/comparison.h"
#include "fourfold/error.h"
#include "fourfold/quantize.h"
#include "fourfold/reference.h"
#include "refusals.h"
#include "tools/layer_inputs.h"
#include "tools/layer_trace.h"
#include "tools/random.h"

namespace fourfold {
namespace {

constexpr int64_t kHidden = 64, kIntermediate = 48, kExperts = 5, kTopK = 2, kTokens = 23;

/// A layer of random NVFP4 experts that owns its weights.
struct TestLayer {
  std::vector<BlockScaledMatrix> matrices;
  ExpertWeights weights;
  LayerConfig config{kHidden, kIntermediate, kExperts, kTopK, {}};
  LayerInputs inputs = make_inputs(kTokens, kHidden, 7, false);

  explicit TestLayer(uint64_t seed = 1) {
    weights.hidden = kHidden;
    weights.intermediate = kIntermediate;
    matrices.reserve(3 * kExperts);
    for (int64_t e = 0; e < kExperts; ++e) {
      Expert expert;
      expert.name = "experts." + std::to_string(e);
      expert.gate = add(kIntermediate, kHidden, seed, 0.1);
      expert.up = add(kIntermediate, kHidden, seed, 0.4);
      expert.down = add(kHidden, kIntermediate, seed, 0.1);
      expert.gate_input_scale = expert.up_input_scale = 4.0f / 2688.0f;
      expert.down_input_scale = 8.0f / 2688.0f;
      weights.experts.push_back(expert);
    }
    route_at_random(inputs, kExperts, kTopK, 3);
  }

  /// forward() on this layer's inputs.
  ForwardArgs args(const OutputView& y, const AlignedWorkspace& workspace) const {
    ForwardArgs args;
    args.x = inputs.x_view();
    args.routing = inputs.routing();
    args.y = y;
    args.workspace = workspace.span();
    return args;
  }

  std::unique_ptr<MoeLayer> make(const LayerOptions& options = {}) const {
    return reference_backend().make_layer(weights, config, options);
  }

 private:
  BlockScaledView add(int64_t rows, int64_t cols, uint64_t seed, double sigma) {
    std::vector<float> values(static_cast<size_t>(rows * cols));
    Random random(seed, Random::Purpose::kWeight, matrices.size());
    for (float& value : values) value = static_cast<float>(sigma * random.normal());
    const MatrixView<const float> view(values.data(), rows, cols);
    return matrices.emplace_back(quantize_nvfp4(view, nvfp4_global_scale(absolute_maximum(view)))).view();
  }
};

Routing routing_of(const std::vector<int32_t>& ids, const std::vector<float>& weights, int64_t top_k) {
  const auto tokens = static_cast<int64_t>(ids.size()) / top_k;
  return {MatrixView<const int32_t>(ids.data(), tokens, top_k), {weights.data(), tokens, top_k}};
}

TEST(Permutation, SortsSlotsByExpertAndKeepsTheirOrder) {
  const std::vector<int32_t> ids = {2, 0, 2, 1, 0, 2};
  const std::vector<float> weights(6, 1.0f);
  const Permutation p = permute_by_expert(routing_of(ids, weights, 2), 4);
  EXPECT_EQ(p.group_offsets, (std::vector<int32_t>{0, 2, 3, 6, 6}));
  EXPECT_EQ(p.slot_of_row, (std::vector<int32_t>{1, 4, 3, 0, 2, 5}));
  EXPECT_EQ(p.row_of_slot, (std::vector<int32_t>{3, 0, 4, 2, 1, 5}));
  EXPECT_EQ(p.status, kStatusOk);
}

TEST(Permutation, DropsAbsentExpertsAndReportsIdsOutOfRange) {
  const std::vector<float> weights(4, 1.0f);
  const Permutation absent = permute_by_expert(routing_of({-1, 0, -1, -1}, weights, 2), 2);
  EXPECT_EQ(absent.rows(), 1);
  EXPECT_EQ(absent.row_of_slot, (std::vector<int32_t>{-1, 0, -1, -1}));
  EXPECT_EQ(absent.status, kStatusOk);
  EXPECT_EQ(permute_by_expert(routing_of({0, 2, 1, 1}, weights, 2), 2).status, kStatusExpertOutOfRange);
  EXPECT_EQ(permute_by_expert(routing_of({0, -2, 1, 1}, weights, 2), 2).status, kStatusExpertOutOfRange);
}

TEST(Permutation, TakesNoTokens) {
  const Permutation p = permute_by_expert(routing_of({}, {}, 2), 3);
  EXPECT_EQ(p.group_offsets, (std::vector<int32_t>{0, 0, 0, 0}));
}

TEST(FoldGateUp, KeepsTheLargerGlobalAndCountsChangedBlocks) {
  const TestLayer layer;
  FoldReport report;
  const ExpertWeights folded = fold_gate_up(layer.weights, &report);
  EXPECT_EQ(report.blocks, kExperts * kIntermediate * kHidden / 16);
  EXPECT_GT(report.changed, 0);
  for (size_t e = 0; e < folded.experts.size(); ++e) {
    const float gate = global_multiplier(layer.weights.experts[e].gate);
    const float up = global_multiplier(layer.weights.experts[e].up);
    EXPECT_EQ(global_multiplier(folded.experts[e].gate), std::max(gate, up));
    EXPECT_EQ(global_multiplier(folded.experts[e].up), std::max(gate, up));
  }
  // One rounding of a normal e4m3 number moves it by at most 2^-4 of itself; formats.md says 5.9% for blocks.
  for (size_t e = 0; e < folded.experts.size(); ++e) {
    for (const auto half : {&Expert::gate, &Expert::up}) {
      const auto& before = std::get<BlockScaledView>(layer.weights.experts[e].*half);
      const auto& after = std::get<BlockScaledView>(folded.experts[e].*half);
      for (int64_t row = 0; row < kIntermediate; ++row) {
        for (int64_t block = 0; block < kHidden / 16; ++block) {
          const double now = decode_e4m3(after.scale_code(row, block));
          if (now < 0x1p-6) continue;  // subnormal: coarser
          const double was = double{decode_e4m3(before.scale_code(row, block))} * before.global.value;
          EXPECT_NEAR(now * after.global.value / was, 1.0, 0x1p-4);
        }
      }
    }
  }
}

TEST(FoldGateUp, IsLosslessBetweenPowersOfTwo) {
  TestLayer layer;
  for (Expert& expert : layer.weights.experts) {
    std::get<BlockScaledView>(expert.gate).global.value = 0x1p-6f;
    std::get<BlockScaledView>(expert.up).global.value = 0x1p-5f;
  }
  FoldReport report;
  const ExpertWeights folded = fold_gate_up(layer.weights, &report);
  for (size_t e = 0; report.changed == 0 && e < folded.experts.size(); ++e) {
    EXPECT_EQ(dequantize(folded.experts[e].gate), dequantize(layer.weights.experts[e].gate));
  }
  EXPECT_EQ(report.changed, 0);
}

TEST(GlobalScale, KeepsADivisorADivisor) {
  const GlobalScale divisor{3.0f, GlobalScaleKind::kDivisor};
  EXPECT_EQ(divisor.apply(7.0f), 7.0f / 3.0f);
  EXPECT_EQ(divisor.multiplier(), 1.0f / 3.0f);
}

TEST(ExpertWeights, NameTheExpertWhoseShapeIsWrong) {
  TestLayer layer;
  std::swap(layer.weights.experts[3].up, layer.weights.experts[3].down);
  const std::string message = message_of([&] { validate(layer.weights); });
  EXPECT_NE(message.find("experts.3 up: expected [48, 64], found [64, 48]"), std::string::npos) << message;
}

TEST(ScalePolicies, DefaultToStaticOnlyWhereEveryExpertHasUsableScales) {
  TestLayer layer;
  EXPECT_EQ(default_scale_policies(layer.weights, ActivationFormat::kNvfp4).x, ScalePolicy::kStatic);
  layer.weights.experts[1].up_input_scale = std::numeric_limits<float>::infinity();
  layer.weights.experts[2].down_input_scale = 0.0f;
  layer.weights.experts[4].gate_input_scale.reset();
  const std::string message =
      message_of([&] { default_scale_policies(layer.weights, ActivationFormat::kNvfp4); });
  for (const char* part :
       {"experts.1 up (inf)", "experts.2 down (0)", "experts.4 gate (absent)", "dynamic-token"}) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
  }
  EXPECT_THROW(layer.make(), Error);  // static by LayerOptions' default: never silent
  LayerOptions dynamic;
  dynamic.x_scale = dynamic.intermediate_scale = ScalePolicy::kDynamicToken;
  EXPECT_NO_THROW(layer.make(dynamic));
  for (Expert& expert : layer.weights.experts) {
    expert.gate_input_scale.reset();
    expert.up_input_scale.reset();
    expert.down_input_scale.reset();
  }
  EXPECT_EQ(default_scale_policies(layer.weights, ActivationFormat::kNvfp4).x, ScalePolicy::kDynamicToken);
}

TEST(ActivationRule, IsForNvfp4Alone) {
  TestLayer layer;
  LayerOptions options;
  options.activation_rule = ScaleRule::kMse;
  EXPECT_NO_THROW(layer.make(options));
  for (const ActivationFormat format :
       {ActivationFormat::kNvfp4x2, ActivationFormat::kFp8, ActivationFormat::kBf16}) {
    options.activations = format;
    const std::string message = message_of([&] { layer.make(options); });
    EXPECT_NE(message.find(std::string("activation_rule for ") + std::string(to_string(format)) +
                           " activations: expected amax, found mse"),
              std::string::npos)
        << message;
  }
}

TEST(Backends, EndWithTheReferenceAndAreFoundByName) {
  EXPECT_EQ(backends().back(), &reference_backend());
  EXPECT_EQ(&find_backend("reference"), &reference_backend());
  const std::string message = message_of([] { find_backend("sm999"); });
  EXPECT_NE(message.find("reference"), std::string::npos) << message;
}

TEST(Backends, AreForcedByNameOrEnvironmentOrFail) {
  const TestLayer layer;
  EXPECT_EQ(choose_backend("reference", layer.weights, layer.config, {}).reason, "forced by --backend");
  setenv(kBackendVariable, "nonsense", 1);
  EXPECT_THROW(choose_backend("", layer.weights, layer.config, {}), Error);
  setenv(kBackendVariable, "reference", 1);
  EXPECT_EQ(choose_backend("", layer.weights, layer.config, {}).backend, &reference_backend());
  unsetenv(kBackendVariable);
}

TEST(Backends, RefuseWeightsOnAnotherDevice) {
  TestLayer layer;
  std::get<BlockScaledView>(layer.weights.experts[0].gate).codes.device = Device::cuda(0);
  EXPECT_NE(reference_backend().why_unsupported(layer.weights, layer.config, {}), "");
  EXPECT_THROW(layer.make(), Error);
}

class LayerInEveryFormat : public testing::TestWithParam<ActivationFormat> {};

TEST_P(LayerInEveryFormat, GivesTheSameBitsTappedOrNotAndOnADirtyWorkspace) {
  const TestLayer layer;
  LayerOptions options;
  options.activations = GetParam();
  const auto moe = layer.make(options);
  const LayerTrace tapped = trace(*moe, layer.inputs);

  const LayerPlan plan = moe->plan(kTokens + 9);  // room to spare: not everything in it is used
  const AlignedWorkspace workspace(plan.workspace_bytes);
  std::fill(workspace.span().begin(), workspace.span().end(), std::byte{0xFF});  // NaN in every format
  std::vector<Bf16> y(static_cast<size_t>(kTokens * kHidden));
  ForwardArgs args = layer.args(MatrixView<Bf16>(y.data(), kTokens, kHidden), workspace);
  moe->forward(plan, args);
  EXPECT_EQ(y, tapped.y);
}

TEST_P(LayerInEveryFormat, ComputesTheExpertHalfAlone) {
  const TestLayer layer;
  LayerOptions options;
  options.activations = GetParam();
  const auto moe = layer.make(options);
  const LayerTrace whole = trace(*moe, layer.inputs);
  std::vector<Bf16> z(whole.z.size());
  const LayerPlan plan = moe->plan(kTokens);
  const AlignedWorkspace workspace(plan.workspace_bytes);
  ExpertsArgs args;
  args.activations = whole.staged_x.views.view(options.activations, whole.rows, kHidden);
  args.group_offsets = whole.permutation.group_offsets;
  args.z = {z.data(), whole.rows, kHidden};
  args.workspace = workspace.span();
  moe->experts(plan, args);
  EXPECT_EQ(z, whole.z);
}

INSTANTIATE_TEST_SUITE_P(All, LayerInEveryFormat,
                         testing::Values(ActivationFormat::kNvfp4, ActivationFormat::kNvfp4x2,
                                         ActivationFormat::kFp8, ActivationFormat::kBf16),
                         [](const auto& format) { return std::string(to_string(format.param)); });

TEST(Layer, NeverReadsSlotsOfAbsentExperts) {
  TestLayer layer;
  for (int64_t k = 0; k < kTopK; ++k) layer.inputs.topk_ids[static_cast<size_t>(k)] = kAbsentExpert;
  for (int64_t i = 0; i < kHidden; ++i) {
    layer.inputs.x[static_cast<size_t>(i)] = Bf16{0x7FC0};  // token 0 is NaN, and goes nowhere
  }
  const LayerTrace run = trace(*layer.make(), layer.inputs);
  for (size_t i = 0; i < run.y.size(); ++i) {
    const float value = static_cast<float>(run.y[i]);
    EXPECT_TRUE(std::isfinite(value));
    if (i < kHidden) {
      EXPECT_EQ(value, 0.0f);
    }
  }
}

TEST(Layer, SumsAnExpertThatATokenNamesTwice) {
  TestLayer layer;
  std::fill(layer.inputs.topk_ids.begin(), layer.inputs.topk_ids.end(), 3);
  std::fill(layer.inputs.topk_weights.begin(), layer.inputs.topk_weights.end(), 0.5f);
  const LayerTrace twice = trace(*layer.make(), layer.inputs);
  for (int64_t token = 0; token < kTokens; ++token) {
    for (int64_t i = 0; i < kHidden; ++i) {
      // w z + w z = z for w = 1/2, exactly.
      EXPECT_EQ(twice.y_view()(token, i), twice.z_view()(2 * token, i));
    }
  }
}

TEST(Layer, TakesNoTokens) {
  TestLayer layer;
  layer.inputs = make_inputs(0, kHidden, 1, false);
  route_at_random(layer.inputs, kExperts, kTopK, 1);
  EXPECT_EQ(trace(*layer.make(), layer.inputs).rows, 0);
}

TEST(Layer, AddsBiasesBeforeRounding) {
  TestLayer layer;
  LayerOptions options;
  options.activations = ActivationFormat::kBf16;
  const LayerTrace plain = trace(*layer.make(options), layer.inputs);
  const std::vector<float> bias(kIntermediate, 100.0f);
  for (Expert& expert : layer.weights.experts) {
    expert.up_bias = DenseView{ElementType::kF32,
                               reinterpret_cast<const std::byte*>(bias.data()),
                               1,
                               kIntermediate,
                               kIntermediate * 4,
                               {}};
  }
  const LayerTrace biased = trace(*layer.make(options), layer.inputs);
  for (int64_t row = 0; row < plain.rows; ++row) {
    EXPECT_EQ(biased.h_view()(row, 0), plain.h_view()(row, 0));  // gate is untouched
    const float up = static_cast<float>(plain.h_view()(row, kIntermediate));
    EXPECT_NEAR(static_cast<float>(biased.h_view()(row, kIntermediate)), up + 100.0f,
                0.5f);  // ulp of 100 is 0.5
  }
}

TEST(Layer, GivesPartialSumsInFloat32) {
  const TestLayer layer;
  const auto moe = layer.make();
  const LayerTrace rounded = trace(*moe, layer.inputs);
  std::vector<float> y(static_cast<size_t>(kTokens * kHidden));
  const LayerPlan plan = moe->plan(kTokens);
  const AlignedWorkspace workspace(plan.workspace_bytes);
  ForwardArgs args = layer.args(MatrixView<float>(y.data(), kTokens, kHidden), workspace);
  moe->forward(plan, args);
  for (size_t i = 0; i < y.size(); ++i) EXPECT_EQ(encode_bf16(y[i]), rounded.y[i]);
}

TEST(Layer, UpdatesItsWeightsInPlace) {
  const TestLayer first(1), second(2);
  const auto updated = first.make();
  const LayerTrace before = trace(*updated, first.inputs);
  updated->update_weights(second.weights);
  EXPECT_EQ(trace(*updated, first.inputs).y, trace(*second.make(), first.inputs).y);
  EXPECT_NE(before.y, trace(*updated, first.inputs).y);
}

TEST(Layer, ChangesNoTokenWhenOthersJoinTheBatch) {
  const TestLayer layer;
  const auto moe = layer.make();
  const LayerTrace whole = trace(*moe, layer.inputs);
  LayerInputs one = layer.inputs;
  one.tokens = 1;
  const LayerTrace alone = trace(*moe, one);
  EXPECT_TRUE(std::equal(alone.y.begin(), alone.y.end(), whole.y.begin()));
}

TEST(Layer, RefusesArgumentsThatDoNotFitThePlan) {
  const TestLayer layer;
  const auto moe = layer.make();
  const LayerPlan plan = moe->plan(kTokens);
  const AlignedWorkspace workspace(plan.workspace_bytes);
  std::vector<Bf16> y(static_cast<size_t>(kTokens * kHidden));
  ForwardArgs good = layer.args(MatrixView<Bf16>(y.data(), kTokens, kHidden), workspace);
  EXPECT_NO_THROW(moe->forward(plan, good));

  ForwardArgs bad = good;
  bad.workspace = good.workspace.first(good.workspace.size() - 1);
  EXPECT_NE(message_of([&] { moe->forward(plan, bad); }).find("workspace"), std::string::npos);
  bad = good;
  bad.x.cols = kHidden - 16;
  EXPECT_NE(message_of([&] { moe->forward(plan, bad); }).find("x: expected [23, 64], found [23, 48]"),
            std::string::npos);
  EXPECT_NE(message_of([&] { moe->forward(moe->plan(kTokens - 1), good); }).find("tokens"),
            std::string::npos);
}

TEST(Layer, RefusesTapsThatAreTooSmall) {
  const TestLayer layer;
  const auto moe = layer.make();
  const LayerPlan plan = moe->plan(kTokens);
  const AlignedWorkspace workspace(plan.workspace_bytes);
  std::vector<Bf16> y(static_cast<size_t>(kTokens * kHidden));
  std::vector<int32_t> short_tap(3);
  ForwardArgs args = layer.args(MatrixView<Bf16>(y.data(), kTokens, kHidden), workspace);
  args.taps.row_of_slot = short_tap;
  EXPECT_NE(message_of([&] { moe->forward(plan, args); }).find("tap of row_of_slot"), std::string::npos);
  args.taps.row_of_slot = {};
  args.taps.z = {y.data(), 2, kHidden};
  EXPECT_NE(message_of([&] { moe->forward(plan, args); }).find("tap of z"), std::string::npos);
}

TEST(Layer, RefusesGroupOffsetsThatDoNotFitTheRows) {
  const TestLayer layer;
  LayerOptions options;
  options.activations = ActivationFormat::kBf16;
  const auto moe = layer.make(options);
  const LayerTrace whole = trace(*moe, layer.inputs);
  std::vector<Bf16> z(whole.z.size());
  const LayerPlan plan = moe->plan(kTokens);
  const AlignedWorkspace workspace(plan.workspace_bytes);
  std::vector<int32_t> offsets = whole.permutation.group_offsets;
  offsets[1] = 4000;  // beyond the rows, then down again
  ExpertsArgs args;
  args.activations = whole.staged_x.views.view(options.activations, whole.rows, kHidden);
  args.group_offsets = offsets;
  args.z = {z.data(), whole.rows, kHidden};
  args.workspace = workspace.span();
  EXPECT_NE(message_of([&] { moe->experts(plan, args); }).find("group offsets"), std::string::npos);
  args.group_offsets = whole.permutation.group_offsets;
  args.activations.values.data = nullptr;
  EXPECT_NE(message_of([&] { moe->experts(plan, args); }).find("null"), std::string::npos);
}

TEST(Layer, RefusesPlansThatDoNotFitAnInt32) {
  const auto moe = TestLayer().make();
  EXPECT_THROW(moe->plan(-1), Error);
  EXPECT_THROW(moe->plan(int64_t{1} << 60), Error);
}

TEST(Layer, RefusesUpdatesOfAnotherKind) {
  const TestLayer layer;
  const auto moe = layer.make();
  TestLayer other(2);
  std::get<BlockScaledView>(other.weights.experts[1].up).codes.device = Device::cuda(0);
  EXPECT_THROW(moe->update_weights(other.weights), Error);
  const std::vector<float> dense(kIntermediate * kHidden);
  other = TestLayer(2);
  other.weights.experts[1].up = DenseView{ElementType::kF32, reinterpret_cast<const std::byte*>(dense.data()),
                                          kIntermediate,     kHidden,
                                          kHidden * 4,       {}};
  const std::string message = message_of([&] { moe->update_weights(other.weights); });
  EXPECT_NE(message.find("experts.1: expected nvfp4 [48, 64], found f32 [48, 64]"), std::string::npos)
      << message;
}

TEST(Permutation, RefusesIdsAndWeightsOfDifferentShapes) {
  const std::vector<int32_t> ids = {0, 1};
  const std::vector<float> weights(8, 1.0f);
  const Routing routing{MatrixView<const int32_t>(ids.data(), 1, 2), {weights.data(), 4, 2}};
  EXPECT_NE(message_of([&] { permute_by_expert(routing, 2); }).find("topk_ids"), std::string::npos);
  EXPECT_THROW(permute_by_expert(routing_of({0, 1}, weights, 2), -1), Error);
}

TEST(Layer, PutsTheRoutingWeightOnTheInputWhereTheModelDoes) {
  TestLayer layer;
  LayerOptions options;
  options.activations = ActivationFormat::kBf16;
  std::fill(layer.inputs.topk_weights.begin(), layer.inputs.topk_weights.end(), 0.5f);
  TestLayer halved(1);
  halved.inputs = layer.inputs;
  for (Bf16& value : halved.inputs.x) value = encode_bf16(0.5f * static_cast<float>(value));
  std::fill(halved.inputs.topk_weights.begin(), halved.inputs.topk_weights.end(), 1.0f);
  layer.config.weight_on_input = true;
  EXPECT_EQ(trace(*layer.make(options), layer.inputs).y, trace(*halved.make(options), halved.inputs).y);
}

/// One expert output of each activation at g = 2, u = -3, worked by hand to a few digits.
TEST(Activation, HasEveryVariantOfTheModels) {
  const struct {
    ActivationFunction function;
    double expected;
  } cases[] = {
      {{ActivationKind::kSwiglu}, 2 / (1 + std::exp(-2.0)) * -3},
      {{ActivationKind::kSwiglu, 1.0f, 0.0f, 1.0f},
       1 / (1 + std::exp(-1.0)) * -1},  // DeepSeek-V4's clamp bites
      {{ActivationKind::kSwiglu, 1.702f, 1.0f, 2.5f},
       (-2.5 + 1) * 2 / (1 + std::exp(-1.702f * 2.0))},  // gpt-oss
      {{ActivationKind::kSwigluStep, 1.0f, 0.0f, 1.5f}, 1.5 * -1.5},
      {{ActivationKind::kGeglu}, 2 * 0.977250 * -3},
      {{ActivationKind::kGegluTanh}, 2 * 0.977298 * -3},
      {{ActivationKind::kReluSquared}, 0.0},
      {{ActivationKind::kSilu}, -3 / (1 + std::exp(3.0))},
      {{ActivationKind::kGelu}, -3 * 0.00134990},
  };
  for (const auto& c : cases) {
    const bool gated = is_gated(c.function.kind);
    const std::vector<Bf16> h =
        gated ? std::vector{encode_bf16(2.0f), encode_bf16(-3.0f)} : std::vector{encode_bf16(-3.0f)};
    Bf16 out;
    reference::activate(c.function, {h.data(), 1, static_cast<int64_t>(h.size())}, {&out, 1, 1});
    EXPECT_NEAR(static_cast<float>(out), c.expected, std::abs(c.expected) * 0x1p-8) << describe(c.function);
  }
}

TEST(Activation, RefusesParametersThatAreNoNumbers) {
  TestLayer layer;
  const auto refusal_of = [&](const ActivationFunction& function) {
    layer.config.activation = function;
    return message_of([&] { layer.make(); });
  };
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInfinity = INFINITY;
  for (const float value : {kNan, kInfinity, -kInfinity}) {
    EXPECT_NE(refusal_of({ActivationKind::kSwiglu, value}).find("activation alpha: expected a finite number"),
              std::string::npos);
    EXPECT_NE(refusal_of({ActivationKind::kSwiglu, 1.0f, value}).find("activation beta"), std::string::npos);
  }
  for (const float value : {kNan, 0.0f, -1.0f}) {
    EXPECT_NE(refusal_of({ActivationKind::kSwiglu, 1.0f, 0.0f, value}).find("activation limit"),
              std::string::npos);
  }
  EXPECT_EQ(refusal_of({ActivationKind::kSwiglu, 1.702f, 1.0f, 7.0f}), "no error");
}

TEST(Layer, RunsExpertsWithoutAGate) {
  TestLayer layer;
  LayerOptions options;
  options.activations = ActivationFormat::kBf16;
  EXPECT_NE(message_of([&] {
              TestLayer ungated;
              ungated.config.activation.kind = ActivationKind::kReluSquared;
              ungated.make(options);
            }).find("gate"),
            std::string::npos);
  for (Expert& expert : layer.weights.experts) expert.gate = DenseView{};
  EXPECT_THROW(layer.make(options), Error);  // SwiGLU needs one
  layer.config.activation.kind = ActivationKind::kReluSquared;
  const LayerTrace run = trace(*layer.make(options), layer.inputs);
  EXPECT_EQ(run.h_view().cols, kIntermediate);
  for (int64_t row = 0; row < run.rows; ++row) {
    const float up = static_cast<float>(run.h_view()(row, 5));
    EXPECT_EQ(run.activation_view()(row, 5), encode_bf16(up > 0 ? up * up : 0.0f));
  }
}

TEST(Comparison, SeesWhatCosineIsBlindTo) {
  const std::vector<float> reference = {1, 2, 3, 4}, doubled = {2, 4, 6, 8};
  const Comparison c = compare(MatrixView<const float>(reference.data(), 2, 2), {doubled.data(), 2, 2});
  EXPECT_DOUBLE_EQ(c.cosine, 1.0);
  EXPECT_DOUBLE_EQ(c.norm_ratio, 2.0);
  EXPECT_DOUBLE_EQ(c.rel_l2, 1.0);
}

TEST(Comparison, OfManyValuesAtOnceIsThatOfOneAfterTheOther) {
  for (const size_t size : {0, 1, 7, 8, 9, 16, 1003}) {
    std::vector<float> references(size), candidates(size);
    for (size_t i = 0; i < size; ++i) {  // small integers: sums are exact in any order
      references[i] = static_cast<float>(i % 19) - 9.0f;
      candidates[i] = static_cast<float>(i % 23) - 11.0f;
    }
    ErrorSums one_by_one, at_once;
    for (size_t i = 0; i < size; ++i) one_by_one.add(references[i], candidates[i]);
    at_once.add(references, candidates);
    EXPECT_EQ(at_once.reference_squared, one_by_one.reference_squared) << size;
    EXPECT_EQ(at_once.candidate_squared, one_by_one.candidate_squared) << size;
    EXPECT_EQ(at_once.product, one_by_one.product) << size;
    EXPECT_EQ(at_once.difference_squared, one_by_one.difference_squared) << size;
  }
  const std::vector<float> two(2), three(3);
  ErrorSums sums;
  EXPECT_THROW(sums.add(two, three), Error);
}

TEST(Comparison, OfAValueWithItselfIsNoDifferenceButForWhatIsNotFinite) {
  for (const size_t size : {1, 8, 1003}) {
    std::vector<float> values(size);
    for (size_t i = 0; i < size; ++i) values[i] = static_cast<float>(i % 19) - 9.0f;
    ErrorSums one_by_one, at_once;
    for (const float value : values) one_by_one.add(value, value);
    at_once.add(values, values);
    EXPECT_EQ(at_once.reference_squared, one_by_one.reference_squared) << size;
    EXPECT_EQ(at_once.candidate_squared, one_by_one.reference_squared) << size;
    EXPECT_EQ(at_once.product, one_by_one.reference_squared) << size;
    EXPECT_EQ(at_once.difference_squared, 0.0) << size;
    for (const float not_finite : {std::nanf(""), INFINITY}) {
      values[size / 2] = not_finite;
      ErrorSums sums;
      sums.add(values, values);
      EXPECT_TRUE(std::isnan(sums.relative_l2())) << size << " " << not_finite;
    }
  }
}

TEST(Comparison, OfAValueWithItselfIsThatOfNearlyItself) {
  std::vector<float> values(1003);
  std::mt19937 random(7);
  for (float& value : values) value = std::normal_distribution<float>(0.0f, 1.0f)(random);
  values.back() = 0.0f;
  std::vector<float> other_zero = values;
  other_zero.back() = -0.0f;  // the same value in other bits: one sum does not do
  ErrorSums same, nearly;
  same.add(values, values);
  nearly.add(values, other_zero);
  EXPECT_EQ(same.reference_squared, nearly.reference_squared);
  EXPECT_EQ(same.candidate_squared, nearly.candidate_squared);
  EXPECT_EQ(same.product, nearly.product);
  EXPECT_EQ(nearly.difference_squared, 0.0);
}

TEST(Comparison, NamesTheWorstRowAndGroupAndRanksNanFirst) {
  std::vector<float> reference(8, 1.0f), candidate = reference;
  candidate[5] = 2.0f;
  const std::vector<int32_t> groups = {0, 1, 1, 4};
  const auto view = [](const std::vector<float>& v) { return MatrixView<const float>(v.data(), 4, 2); };
  Comparison c = compare(view(reference), view(candidate), groups);
  EXPECT_EQ(c.worst_row, 2);
  EXPECT_EQ(c.worst_group, 2);
  candidate[0] = std::nanf("");
  c = compare(view(reference), view(candidate), groups);
  EXPECT_EQ(c.worst_row, 0);
  EXPECT_EQ(c.worst_group, 0);
  EXPECT_TRUE(std::isnan(c.rel_l2) && std::isnan(c.cosine));
}

}  // namespace
}  // namespace fourfold
