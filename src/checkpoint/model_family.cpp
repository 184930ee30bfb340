// The table of families, and how config.json fills in their parameters.
#include "fourfold/model_family.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <map>
#include <utility>
#include <vector>

#include "base/fail.h"

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
  bool has_correction_bias;
  GateUpOrder fused_order;
  ActivationFunction activation;
  bool weight_on_input = false;
};

constexpr ActivationFunction kSiluGate = {};
constexpr ActivationFunction kDeepSeekV4 = {ActivationKind::kSwiglu, 1.0f, 0.0f, 10.0f};
constexpr ActivationFunction kGptOss = {ActivationKind::kSwiglu, 1.702f, 1.0f, 7.0f};
constexpr ActivationFunction kRelu2 = {ActivationKind::kReluSquared};
constexpr GateUpOrder kGateFirst = GateUpOrder::kGateFirst, kInterleaved = GateUpOrder::kInterleaved;

constexpr std::array<Family, 10> kFamilies = {{
    {"deepseek-v4",
     {"deepseek_v4"},
     "DeepseekV4ForCausalLM",
     RouterScore::kSqrtSoftplus,
     true,
     false,
     1.5f,
     1,
     1,
     true,
     kGateFirst,
     kDeepSeekV4},
    {"deepseek-v3",
     {"deepseek_v3", "deepseek_v32", "kimi_k2"},
     "DeepseekV3ForCausalLM",
     RouterScore::kSigmoid,
     true,
     false,
     2.5f,
     8,
     4,
     true,
     kGateFirst,
     kSiluGate},
    {"glm4-moe",
     {"glm4_moe"},
     "Glm4MoeForCausalLM",
     RouterScore::kSigmoid,
     true,
     false,
     1.0f,
     1,
     1,
     true,
     kGateFirst,
     kSiluGate},
    {"qwen3-moe",
     {"qwen3_moe", "qwen3_vl_moe_text"},
     "Qwen3MoeForCausalLM",
     RouterScore::kSoftmax,
     false,
     false,
     1.0f,
     1,
     1,
     false,
     kGateFirst,
     kSiluGate},
    {"qwen2-moe",
     {"qwen2_moe"},
     "Qwen2MoeForCausalLM",
     RouterScore::kSoftmax,
     false,
     false,
     1.0f,
     1,
     1,
     false,
     kGateFirst,
     kSiluGate},
    {"qwen3-next",
     {"qwen3_next"},
     "Qwen3NextForCausalLM",
     RouterScore::kSoftmax,
     true,
     false,
     1.0f,
     1,
     1,
     false,
     kGateFirst,
     kSiluGate},
    {"mixtral",
     {"mixtral"},
     "MixtralForCausalLM",
     RouterScore::kSoftmax,
     true,
     true,
     1.0f,
     1,
     1,
     false,
     kGateFirst,
     kSiluGate},
    {"gpt-oss",
     {"gpt_oss"},
     "GptOssForCausalLM",
     RouterScore::kSoftmaxOfTopK,
     true,
     true,
     1.0f,
     1,
     1,
     false,
     kInterleaved,
     kGptOss},
    {"llama-4",
     {"llama4_text", "llama4"},
     "Llama4ForConditionalGeneration",
     RouterScore::kSigmoid,
     false,
     true,
     1.0f,
     1,
     1,
     false,
     kGateFirst,
     kSiluGate,
     true},
    {"nemotron-h",
     {"nemotron_h"},
     "NemotronHForCausalLM",
     RouterScore::kSigmoid,
     true,
     false,
     1.0f,
     1,
     1,
     true,
     kGateFirst,
     kRelu2},
}};

constexpr std::array<std::pair<std::string_view, RouterScore>, 4> kScores = {{
    {"softmax", RouterScore::kSoftmax},
    {"softmax-of-top-k", RouterScore::kSoftmaxOfTopK},
    {"sigmoid", RouterScore::kSigmoid},
    {"sqrt-softplus", RouterScore::kSqrtSoftplus},
}};

constexpr std::array<std::pair<std::string_view, ActivationKind>, 7> kActivations = {{
    {"swiglu", ActivationKind::kSwiglu},
    {"swiglu-step", ActivationKind::kSwigluStep},
    {"geglu", ActivationKind::kGeglu},
    {"geglu-tanh", ActivationKind::kGegluTanh},
    {"relu2", ActivationKind::kReluSquared},
    {"silu", ActivationKind::kSilu},
    {"gelu", ActivationKind::kGelu},
}};

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

std::string config_name(const ModelConfig& config) {
  return config.file.empty() ? "config.json" : config.file;
}

/// What config.json calls the model, for messages.
std::string identity(const ModelConfig& config) {
  if (!config.model_type.empty()) return fmt::format("model_type '{}'", config.model_type);
  if (!config.architecture.empty()) return fmt::format("architecture '{}'", config.architecture);
  return "neither";
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
       config_name(config), takes_gelu ? "silu, gelu or gelu_pytorch_tanh" : describe(function), family.name,
       name);
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
       config_name(config), family.name, config.scoring_func);
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

/// "name,key=value,..." -> the name and its parameters.
struct Parameters {
  std::string_view name;
  std::map<std::string_view, std::string_view> values;
};

Parameters split_parameters(std::string_view text, const std::string& what) {
  Parameters parameters;
  parameters.name = text.substr(0, text.find(','));
  for (size_t begin = parameters.name.size(); begin < text.size();) {
    const size_t end = std::min(text.find(',', begin + 1), text.size());
    const std::string_view part = text.substr(begin + 1, end - begin - 1);
    const size_t equals = part.find('=');
    if (equals == std::string_view::npos || equals == 0) reject(what, "key=value after the name", part);
    if (!parameters.values.emplace(part.substr(0, equals), part.substr(equals + 1)).second) {
      reject(what, "each parameter once", part);
    }
    begin = end;
  }
  return parameters;
}

template <class Number>
Number parse_number(std::string_view key, std::string_view text, const std::string& what) {
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool whole = error == std::errc() && end == text.data() + text.size();
  if (!whole || !std::isfinite(static_cast<double>(value)))
    reject(what, fmt::format("a number for {}", key), text);
  return value;
}

template <class Table>
std::string names_in(const Table& table) {
  std::vector<std::string_view> names;
  for (const auto& entry : table) names.push_back(entry.first);
  return fmt::format("{}", fmt::join(names, ", "));
}

}  // namespace

std::string_view family_name(const ModelConfig& config) {
  const Family* family = find_family(config);
  return family ? family->name : std::string_view();
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
         config_name(config), known_families(), identity(config));
  }
  LayerRules rules;
  rules.family = family ? family->name : "given";
  rules.activation = overrides.activation ? *overrides.activation : activation_of(*family, config);
  rules.shared_activation = rules.activation;
  rules.weight_on_input = overrides.weight_on_input || (family != nullptr && family->weight_on_input);
  if (overrides.router) {
    rules.router = overrides.router;
    if (rules.router->top_k == 0) rules.router->top_k = config.top_k.value_or(0);
  } else if (family != nullptr) {
    rules.router = router_of(*family, config);
    rules.router_has_correction_bias = family->has_correction_bias;
  }
  return rules;
}

std::string describe_router(const LayerRules& rules, bool by_token_id) {
  const RouterConfig router = rules.router.value();
  std::string_view score = "?";
  for (const auto& [name, value] : kScores) {
    if (value == router.score) score = name;
  }
  std::string text = fmt::format("{}, top-{}", score, router.top_k);
  if (router.groups > 1 && !by_token_id)
    text += fmt::format(" in the best {} of {} groups", router.top_groups, router.groups);
  if (by_token_id) {
    text += " by token id";
  } else if (rules.router_has_correction_bias) {
    text += " by biased score";
  }
  if (router.renormalise && router.score != RouterScore::kSoftmaxOfTopK) text += ", renormalised";
  if (router.scaling_factor != 1.0f) text += fmt::format(", x {}", router.scaling_factor);
  if (rules.weight_on_input) text += ", weight on the expert's input";
  return text;
}

LayerConfig layer_config(const ExpertLayer& layer, const LayerRules& rules) {
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

ActivationFunction parse_activation(std::string_view text) {
  const std::string what = fmt::format("activation '{}'", text);
  const Parameters parameters = split_parameters(text, what);
  const auto it = std::find_if(kActivations.begin(), kActivations.end(),
                               [&](const auto& entry) { return entry.first == parameters.name; });
  if (it == kActivations.end()) reject(what, "one of " + names_in(kActivations), parameters.name);
  ActivationFunction function;
  function.kind = it->second;
  const bool is_swiglu = function.kind == ActivationKind::kSwiglu;
  for (const auto& [key, value] : parameters.values) {
    const auto number = parse_number<float>(key, value, what);
    if (key == "alpha" && is_swiglu) {
      function.alpha = number;
    } else if (key == "beta" && is_swiglu) {
      function.beta = number;
    } else if (key == "limit" && (is_swiglu || function.kind == ActivationKind::kSwigluStep)) {
      if (!(number > 0.0f)) reject(what, "a positive limit", value);
      function.limit = number;
    } else {
      reject(what, "alpha, beta and limit for swiglu, limit for swiglu-step, none for others", key);
    }
  }
  return function;
}

RouterConfig parse_router(std::string_view text) {
  const std::string what = fmt::format("router '{}'", text);
  const Parameters parameters = split_parameters(text, what);
  const auto it = std::find_if(kScores.begin(), kScores.end(),
                               [&](const auto& entry) { return entry.first == parameters.name; });
  if (it == kScores.end()) reject(what, "one of " + names_in(kScores), parameters.name);
  RouterConfig router;
  router.score = it->second;
  for (const auto& [key, value] : parameters.values) {
    const auto count = [&] {
      const auto number = parse_number<int64_t>(key, value, what);
      if (number < 1) reject(what, fmt::format("{} from 1", key), value);
      return number;
    };
    if (key == "top-k") {
      router.top_k = count();
    } else if (key == "groups") {
      router.groups = count();
    } else if (key == "top-groups") {
      router.top_groups = count();
    } else if (key == "scale") {
      router.scaling_factor = parse_number<float>(key, value, what);
      if (!(router.scaling_factor > 0.0f)) reject(what, "a positive scale", value);
    } else if (key == "renormalise" && (value == "yes" || value == "no")) {
      router.renormalise = value == "yes";
    } else {
      reject(what, "top-k, groups, top-groups, scale or renormalise=yes|no",
             fmt::format("{}={}", key, value));
    }
  }
  return router;
}

}  // namespace fourfold
