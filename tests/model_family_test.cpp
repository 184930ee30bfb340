// Rules of families, shared experts, expert maps and FP8 weights: hand-worked cases and refusals. Whole
// layers are held against the oracle in tests/oracle.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "fourfold/error.h"
#include "fourfold/model_family.h"
#include "fourfold/quantize.h"
#include "fourfold/reference.h"
#include "fourfold/routing.h"
#include "refusals.h"

namespace fourfold {
namespace {

ModelConfig config_of(const std::string& model_type) {
  ModelConfig config;
  config.file = "m/config.json";
  config.model_type = model_type;
  config.top_k = 4;
  return config;
}

TEST(Rules, FollowFromTheModelType) {
  const LayerRules v4 = rules_of(config_of("deepseek_v4"));
  EXPECT_EQ(v4.family, "deepseek-v4");
  EXPECT_EQ(describe(v4.activation), "silu(min(g, 10)) * clamp(u, -10, 10)");
  EXPECT_EQ(describe_router(v4), "sqrt-softplus, top-4 by biased score, renormalised, x 1.5");
  EXPECT_EQ(describe_router(v4, true), "sqrt-softplus, top-4 by token id, renormalised, x 1.5");
  EXPECT_EQ(describe_router(rules_of(config_of("kimi_k2"))),
            "sigmoid, top-4 in the best 4 of 8 groups by biased score, renormalised, x 2.5");
  const LayerRules gpt_oss = rules_of(config_of("gpt_oss"));
  EXPECT_EQ(describe(gpt_oss.activation), "(clamp(u, -7, 7) + 1) * g' * sigmoid(1.702 g'), g' = min(g, 7)");
  EXPECT_EQ(describe_router(gpt_oss), "softmax-of-top-k, top-4");
  EXPECT_TRUE(rules_of(config_of("llama4_text")).weight_on_input);
  EXPECT_EQ(describe_router(rules_of(config_of("qwen3_moe"))), "softmax, top-4") << "norm_topk_prob is off";
  EXPECT_EQ(describe_router(rules_of(config_of("mixtral"))), "softmax, top-4, renormalised");
  EXPECT_FALSE(is_gated(rules_of(config_of("nemotron_h")).activation.kind));
}

TEST(Rules, FollowFromTheArchitectureWhereThereIsNoModelType) {
  ModelConfig config;
  config.architecture = "MixtralForCausalLM";
  EXPECT_EQ(rules_of(config).family, "mixtral");
}

TEST(Rules, TakeParametersOfTheConfig) {
  ModelConfig config = config_of("deepseek_v3");
  config.renormalise = false;
  config.routed_scaling_factor = 3.0f;
  config.groups = 1;
  config.top_groups = 1;
  config.swiglu_limit = 5.0f;
  EXPECT_EQ(describe_router(rules_of(config)), "sigmoid, top-4 by biased score, x 3");
  EXPECT_EQ(describe(rules_of(config).activation), "silu(min(g, 5)) * clamp(u, -5, 5)");
  config = config_of("qwen3_moe");
  config.hidden_act = "gelu_pytorch_tanh";
  EXPECT_EQ(describe(rules_of(config).activation), "gelu_tanh(g) * u");
}

TEST(Rules, RefuseWhatTheyDoNotKnow) {
  const std::string message = message_of([] { rules_of(config_of("mamba9")); });
  for (const char* part : {"m/config.json", "mamba9", "--activation", "--router", "deepseek-v4", "gpt-oss"}) {
    EXPECT_NE(message.find(part), std::string::npos) << part << " in " << message;
  }
  ModelConfig config = config_of("deepseek_v3");
  config.scoring_func = "softmax";
  EXPECT_NE(message_of([&] { rules_of(config); }).find("scoring_func"), std::string::npos);
  config = config_of("gpt_oss");
  config.hidden_act = "gelu";
  EXPECT_NE(message_of([&] { rules_of(config); }).find("hidden_act"), std::string::npos);
}

TEST(Rules, LetTheCallerSayWhatTheConfigDoesNot) {
  RuleOverrides overrides;
  overrides.activation = parse_activation("swiglu,limit=10");
  const LayerRules half = rules_of(config_of("mamba9"), overrides);
  EXPECT_EQ(half.family, "given");
  EXPECT_FALSE(half.router);
  overrides.router = parse_router("sigmoid,scale=2.5");
  const LayerRules whole = rules_of(config_of("mamba9"), overrides);
  EXPECT_EQ(describe_router(whole), "sigmoid, top-4, renormalised, x 2.5") << "top-k of the config";
}

TEST(ParseActivation, TakesNamesAndParameters) {
  const ActivationFunction function = parse_activation("swiglu,alpha=1.702,beta=1,limit=7");
  EXPECT_EQ(function.alpha, 1.702f);
  EXPECT_EQ(function.beta, 1.0f);
  EXPECT_EQ(function.limit, 7.0f);
  EXPECT_EQ(parse_activation("relu2").kind, ActivationKind::kReluSquared);
  for (const char* bad :
       {"", "Swiglu", "swiglu,", "swiglu,limit", "swiglu,limit=0", "swiglu,limit=x", "gelu,limit=1",
        "geglu,alpha=1", "swiglu,alpha=1,alpha=1", "swiglu,limit=nan", "swiglu limit=1"}) {
    EXPECT_THROW(parse_activation(bad), Error) << bad;
  }
}

TEST(ParseRouter, TakesNamesAndParameters) {
  const RouterConfig router = parse_router("sigmoid,top-k=8,renormalise=no,scale=2.5,groups=8,top-groups=4");
  EXPECT_EQ(router.score, RouterScore::kSigmoid);
  EXPECT_EQ(router.top_k, 8);
  EXPECT_FALSE(router.renormalise);
  EXPECT_EQ(router.scaling_factor, 2.5f);
  EXPECT_EQ(router.groups, 8);
  EXPECT_EQ(router.top_groups, 4);
  for (const char* bad : {"", "softmax,top-k=0", "softmax,top-k=-1", "softmax,top-k=1.5", "softmax,scale=0",
                          "softmax,renormalise=maybe", "softmax,topk=8", "soft", "softmax,groups="}) {
    EXPECT_THROW(parse_router(bad), Error) << bad;
  }
}

TEST(LocalExperts, MapARangeOfTheModelsExperts) {
  EXPECT_EQ(local_expert_range(2, 3, 6), (std::vector<int32_t>{-1, -1, 0, 1, 2, -1}));
  EXPECT_EQ(local_expert_range(0, 0, 2), (std::vector<int32_t>{-1, -1}));
  EXPECT_THROW(local_expert_range(-1, 1, 4), Error);
  EXPECT_THROW(local_expert_range(2, 3, 4), Error);
  EXPECT_THROW(local_expert_range(5, 0, 4), Error);
}

TEST(LocalExperts, SendGlobalIdsToLocalRows) {
  const std::vector<int32_t> local = local_expert_range(2, 2, 6);
  const std::vector<int64_t> ids = {2, 5, 3, 2, -1, 3};
  const std::vector<float> weights(6, 1.0f);
  Routing routing{MatrixView<const int64_t>(ids.data(), 3, 2), {weights.data(), 3, 2}, local};
  const Permutation p = permute_by_expert(routing, 2);
  EXPECT_EQ(p.group_offsets, (std::vector<int32_t>{0, 2, 4}));
  EXPECT_EQ(p.slot_of_row, (std::vector<int32_t>{0, 3, 2, 5}));
  EXPECT_EQ(p.status, kStatusOk) << "an expert elsewhere is no error";

  const std::vector<int64_t> beyond = {6, -3};
  routing.topk_ids = MatrixView<const int64_t>(beyond.data(), 1, 2);
  routing.topk_weights = {weights.data(), 1, 2};
  EXPECT_EQ(permute_by_expert(routing, 2).status, kStatusExpertOutOfRange);
  const std::vector<int32_t> wrong_map = {7, 0};
  const std::vector<int64_t> both = {0, 1};
  routing.topk_ids = MatrixView<const int64_t>(both.data(), 1, 2);
  routing.local_experts = wrong_map;
  EXPECT_EQ(permute_by_expert(routing, 2).status, kStatusExpertOutOfRange) << "the map names no local expert";
}

TEST(Fp8, ScalesEveryTile) {
  std::vector<float> values(130 * 129);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i % 7) - 3.0f;
  values[0] = 896.0f;                // tile (0, 0): scale 2
  values[129 * 129 + 128] = 224.0f;  // tile (1, 1), 2 x 1: scale 0.5
  for (const TileScaleType type : {TileScaleType::kF32, TileScaleType::kE8m0}) {
    const Fp8Matrix matrix = quantize_fp8_tiles({values.data(), 130, 129}, type);
    const Fp8View view = matrix.view();
    EXPECT_EQ(view.tiles_per_row(), 2);
    EXPECT_EQ(view.scale(0, 0), 2.0f);
    EXPECT_EQ(view.scale(129, 128), 0.5f);
    std::vector<float> row(129);
    decode_row(view, 129, row.data());
    EXPECT_EQ(row[128], 224.0f);
    decode_row(view, 0, row.data());
    EXPECT_EQ(row[0], 896.0f);
    EXPECT_EQ(format_name(view), "fp8");
  }
}

TEST(Fp8, RoundsE8m0ScalesUp) {
  const std::vector<float> values = {500.0f, 1.0f};  // amax / 448 = 1.116: 2 as a power of two
  const Fp8Matrix matrix = quantize_fp8_tiles({values.data(), 1, 2}, TileScaleType::kE8m0);
  EXPECT_EQ(matrix.view().scale(0, 0), 2.0f);
}

/// A shared expert of one channel, whose numbers can be worked out by hand.
struct SharedCase {
  std::vector<float> one = std::vector<float>(16, 1.0f), gate = std::vector<float>(16, 0.0f);
  ExpertWeights weights;
  LayerConfig config;

  SharedCase() {
    weights.hidden = 16;
    weights.intermediate = 16;
    Expert expert;
    expert.name = "shared";
    expert.gate = expert.up = DenseView{ElementType::kF32, bytes(one), 1, 16, 64, {}};
    expert.down = DenseView{ElementType::kF32, bytes(one), 16, 1, 4, {}};
    weights.shared = SharedExpert{expert, 1, DenseView{ElementType::kF32, bytes(gate), 1, 16, 64, {}}};
    config.hidden = config.intermediate = 16;
    config.top_k = 1;
    config.shared_intermediate = 1;
  }
  static const std::byte* bytes(const std::vector<float>& values) {
    return reinterpret_cast<const std::byte*>(values.data());
  }
};

TEST(SharedExpert, IsAddedOnceWithItsGate) {
  SharedCase layer;
  LayerOptions options;
  options.activations = ActivationFormat::kBf16;
  const auto moe = reference_backend().make_layer(layer.weights, layer.config, options);
  const LayerPlan plan = moe->plan(1);
  Buffer space(plan.workspace_bytes + kWorkspaceAlignment);
  std::vector<Bf16> x(16, encode_bf16(0.0f));
  x[3] = encode_bf16(2.0f);
  const int32_t id = -1;
  const float weight = 1.0f;
  std::vector<float> y(16, NAN);
  ForwardArgs args;
  args.x = {x.data(), 1, 16};
  args.routing = {MatrixView<const int32_t>(&id, 1, 1), {&weight, 1, 1}};
  args.y = MatrixView<float>(y.data(), 1, 16);
  const size_t beyond = reinterpret_cast<uintptr_t>(space.data()) % kWorkspaceAlignment;
  args.workspace = {space.data() + (kWorkspaceAlignment - beyond) % kWorkspaceAlignment,
                    plan.workspace_bytes};
  moe->forward(plan, args);
  const float hidden = static_cast<float>(encode_bf16(2.0f / (1.0f + std::exp(-2.0f)) * 2.0f));
  for (const float value : y) EXPECT_EQ(value, 0.5f * hidden) << "sigmoid(0) x silu(2) x 2";
}

TEST(SharedExpert, MustBeThatOfTheConfig) {
  SharedCase layer;
  layer.config.shared_intermediate = 0;
  LayerOptions options;
  options.activations = ActivationFormat::kBf16;
  const auto make = [&] { reference_backend().make_layer(layer.weights, layer.config, options); };
  EXPECT_NE(message_of(make).find("shared expert"), std::string::npos);
  layer.config.shared_intermediate = 1;
  layer.weights.shared->gate->cols = 8;
  EXPECT_NE(message_of(make).find("gate of the output"), std::string::npos);
  layer = SharedCase();
  layer.config.shared_activation.kind = ActivationKind::kReluSquared;
  EXPECT_NE(message_of(make).find("shared gate"), std::string::npos) << "a gate that the activation lacks";
}

}  // namespace
}  // namespace fourfold
