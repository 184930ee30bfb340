// The table of families, and how config.json fills in their parameters.
#include "fourfold/model_family.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>
#include <vector>

#include "base/fail.h"
#include "checkpoint/router_scores.h"

namespace fourfold {
namespace {

/// Defaults are those of the family's config class in transformers, which fill in what config.json leaves
/// out.
struct Family {
  std::string_view name;
  std::array<std::string_view, 3> model_types;
  std::string_view architecture;
  RouterScore score;
  bool renormalise;         ///< default of norm_topk_prob
  bool always_renormalise;  ///< its router knows no norm_topk_prob
  float scaling_factor;     ///< default of routed_scaling_factor
  int64_t groups, top_groups;
  RouterBias router_bias;
  GateUpOrder fused_order;
  ActivationFunction activation;
  bool weight_on_input = false;
  bool shared_has_gate = false;
};

constexpr ActivationFunction kSiluGate = {};
constexpr ActivationFunction kDeepSeekV4 = {ActivationKind::kSwiglu, 1.0f, 0.0f, 10.0f};
constexpr ActivationFunction kGptOss = {ActivationKind::kSwiglu, 1.702f, 1.0f, 7.0f};
constexpr ActivationFunction kRelu2 = {ActivationKind::kReluSquared};
constexpr RouterBias kNoBias = RouterBias::kNone, kLogits = RouterBias::kLogits,
                     kCorrection = RouterBias::kCorrection;
constexpr GateUpOrder kGateFirst = GateUpOrder::kGateFirst, kInterleaved = GateUpOrder::kInterleaved;

// clang-format off
constexpr std::array<Family, 10> kFamilies = {{
    {"deepseek-v4", {"deepseek_v4"}, "DeepseekV4ForCausalLM",
     RouterScore::kSqrtSoftplus, true, false, 1.5f, 1, 1, kCorrection, kGateFirst, kDeepSeekV4},
    {"deepseek-v3", {"deepseek_v3", "deepseek_v32", "kimi_k2"}, "DeepseekV3ForCausalLM",
     RouterScore::kSigmoid, true, false, 2.5f, 8, 4, kCorrection, kGateFirst, kSiluGate},
    {"glm4-moe", {"glm4_moe"}, "Glm4MoeForCausalLM",
     RouterScore::kSigmoid, true, false, 1.0f, 1, 1, kCorrection, kGateFirst, kSiluGate},
    {"qwen3-moe", {"qwen3_moe", "qwen3_vl_moe_text"}, "Qwen3MoeForCausalLM",
     RouterScore::kSoftmax, false, false, 1.0f, 1, 1, kNoBias, kGateFirst, kSiluGate},
    {"qwen2-moe", {"qwen2_moe"}, "Qwen2MoeForCausalLM",
     RouterScore::kSoftmax, false, false, 1.0f, 1, 1, kNoBias, kGateFirst, kSiluGate, false, true},
    {"qwen3-next", {"qwen3_next"}, "Qwen3NextForCausalLM",
     RouterScore::kSoftmax, true, false, 1.0f, 1, 1, kNoBias, kGateFirst, kSiluGate, false, true},
    {"mixtral", {"mixtral"}, "MixtralForCausalLM",
     RouterScore::kSoftmax, true, true, 1.0f, 1, 1, kNoBias, kGateFirst, kSiluGate},
    {"gpt-oss", {"gpt_oss"}, "GptOssForCausalLM",
     RouterScore::kSoftmaxOfTopK, true, true, 1.0f, 1, 1, kLogits, kInterleaved, kGptOss},
    {"llama-4", {"llama4_text", "llama4"}, "Llama4ForConditionalGeneration",
     RouterScore::kSigmoid, false, true, 1.0f, 1, 1, kNoBias, kGateFirst, kSiluGate, true},
    {"nemotron-h", {"nemotron_h"}, "NemotronHForCausalLM",
     RouterScore::kSigmoid, true, false, 1.0f, 1, 1, kCorrection, kGateFirst, kRelu2},
}};
// clang-format on

const Family* find_family(const ModelConfig& config) {
  const auto is_it = [&](const Family& family) {
    return config.model_type.empty()
               ? !config.architecture.empty() && family.architecture == config.architecture
               : std::find(family.model_types.begin(), family.model_types.end(), config.model_type) !=
                     family.model_types.end();
  };
  const auto it = std::find_if(kFamilies.begin(), kFamilies.end(), is_it);
  return it == kFamilies.end() ? nullptr : &*it;
}

/// The family's activation, with the limit and alpha of config.json; hidden_act may replace SiLU as the
/// gate's function.
ActivationFunction activation_of(const Family& family, const ModelConfig& config) {
  ActivationFunction function = family.activation;
  if (config.swiglu_limit) function.limit = *config.swiglu_limit;
  if (config.swiglu_alpha) function.alpha = *config.swiglu_alpha;
  const std::string& name = config.hidden_act;
  const bool takes_gelu = family.name != "gpt-oss" && family.name != "nemotron-h" && !config.swiglu_limit;
  if (name.empty() || name == "silu" || name == "swish") return function;
  if (name == "relu2" && function.kind == ActivationKind::kReluSquared) return function;
  if (takes_gelu && name == "gelu") return {ActivationKind::kGeglu};
  if (takes_gelu && (name == "gelu_pytorch_tanh" || name == "gelu_new")) return {ActivationKind::kGegluTanh};
  fail(ErrorCode::kUnsupported, "{}: hidden_act: expected {} for {}, found '{}'; --activation overrides it",
       config.file, takes_gelu ? "silu, gelu or gelu_pytorch_tanh" : describe(function), family.name, name);
}

/// config.json may name the scores; then they must be the family's.
void require_scores(const Family& family, const ModelConfig& config) {
  if (config.scoring_func.empty()) return;
  constexpr std::array<std::pair<std::string_view, RouterScore>, 3> kNames = {
      {{"softmax", RouterScore::kSoftmax},
       {"sigmoid", RouterScore::kSigmoid},
       {"sqrtsoftplus", RouterScore::kSqrtSoftplus}}};
  for (const auto& [name, score] : kNames) {
    if (name == config.scoring_func && score == family.score) return;
  }
  fail(ErrorCode::kUnsupported, "{}: scoring_func: expected that of {}, found '{}'; --router overrides it",
       config.file, family.name, config.scoring_func);
}

RouterConfig router_of(const Family& family, const ModelConfig& config) {
  require_scores(family, config);
  RouterConfig router;
  router.score = family.score;
  router.top_k = config.top_k.value_or(0);
  router.renormalise =
      family.always_renormalise ? family.renormalise : config.renormalise.value_or(family.renormalise);
  router.scaling_factor = config.routed_scaling_factor.value_or(family.scaling_factor);
  router.groups = config.groups.value_or(family.groups);
  router.top_groups = config.top_groups.value_or(family.top_groups);
  return router;
}

void require_gates(const Expert& expert, const ActivationFunction& function, const std::string& naming) {
  if (expert.has_gate() == is_gated(function.kind)) return;
  reject(fmt::format("{}, for {}", naming, describe(function)),
         is_gated(function.kind) ? "experts with a gate" : "experts without a gate",
         "the other kind; --activation overrides the config's");
}

}  // namespace

std::string_view family_name(const ModelConfig& config) {
  const Family* family = find_family(config);
  return family ? family->name : std::string_view();
}

std::string identity(const ModelConfig& config) {
  if (!config.model_type.empty()) return fmt::format("model_type '{}'", config.model_type);
  if (!config.architecture.empty()) return fmt::format("architecture '{}'", config.architecture);
  return "neither, or no such file";
}

std::string known_families() {
  std::vector<std::string_view> names;
  for (const Family& family : kFamilies) names.push_back(family.name);
  return fmt::format("{}", fmt::join(names, ", "));
}

std::optional<GateUpOrder> fused_gate_up_order(const ModelConfig& config) {
  const Family* family = find_family(config);
  return family ? std::optional(family->fused_order) : std::nullopt;
}

LayerRules rules_of(const ModelConfig& config, const RuleOverrides& overrides) {
  const Family* family = find_family(config);
  if (family == nullptr && !overrides.activation) {
    fail(ErrorCode::kUnsupported,
         "{}: expected a model_type or architecture of a known family ({}), found {}; say how the layer is "
         "computed: --activation (e.g. swiglu), and --router (e.g. softmax,top-k=8) or topk_ids and "
         "topk_weights in --input",
         config.file, known_families(), identity(config));
  }
  LayerRules rules;
  rules.family = family ? family->name : "given";
  rules.activation = overrides.activation ? *overrides.activation : activation_of(*family, config);
  rules.shared_activation = rules.activation;
  rules.shared_has_gate = family != nullptr && family->shared_has_gate;
  rules.weight_on_input = overrides.weight_on_input || (family != nullptr && family->weight_on_input);
  if (overrides.router) {
    rules.router = overrides.router;
    if (rules.router->top_k == 0) rules.router->top_k = config.top_k.value_or(0);
  } else if (family != nullptr) {
    rules.router = router_of(*family, config);
    rules.router_bias = family->router_bias;
  }
  return rules;
}

std::string describe_router(const LayerRules& rules, bool by_token_id) {
  const RouterConfig router = rules.router.value();
  std::string_view score = "?";
  for (const auto& [name, value] : kRouterScores) {
    if (value == router.score) score = name;
  }
  std::string text = fmt::format("{}, top-{}", score, router.top_k);
  if (router.groups > 1 && !by_token_id)
    text += fmt::format(" in the best {} of {} groups", router.top_groups, router.groups);
  if (by_token_id) {
    text += " by token id";
  } else if (rules.router_bias == RouterBias::kCorrection) {
    text += " by biased score";
  }
  if (router.renormalise && router.score != RouterScore::kSoftmaxOfTopK) text += ", renormalised";
  if (router.scaling_factor != 1.0f) text += fmt::format(", x {}", router.scaling_factor);
  if (rules.weight_on_input) text += ", weight on the expert's input";
  return text;
}

LayerConfig layer_config(const ExpertLayer& layer, const LayerRules& rules) {
  require_gates(layer.weights.experts.front(), rules.activation, layer.naming);
  if (layer.weights.shared) {
    require_gates(layer.weights.shared->expert, rules.shared_activation, layer.shared_naming);
    if (rules.shared_has_gate && !layer.weights.shared->gate) {
      const std::string name = layer.shared_naming.substr(0, layer.shared_naming.rfind(".{"));
      reject(name, fmt::format("'{}_gate.weight' beside it, as {} has", name, rules.family), "none");
    }
  }
  LayerConfig config;
  config.hidden = layer.weights.hidden;
  config.intermediate = layer.weights.intermediate;
  config.experts = layer.weights.count();
  config.top_k = rules.router ? rules.router->top_k : 0;
  config.activation = rules.activation;
  config.weight_on_input = rules.weight_on_input;
  config.shared_intermediate = layer.weights.shared ? layer.weights.shared->intermediate : 0;
  config.shared_activation = rules.shared_activation;
  return config;
}

}  // namespace fourfold
