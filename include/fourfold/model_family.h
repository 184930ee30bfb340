// Families of models: what their MoE layers compute, by config.json. docs/formats.md, section 4.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "fourfold/checkpoint.h"
#include "fourfold/export.h"
#include "fourfold/moe_layer.h"
#include "fourfold/router.h"

namespace FOURFOLD_EXPORT fourfold {

/// Rules that a layer's tensors do not tell: they follow from the family, with parameters of config.json.
struct LayerRules {
  std::string family;                    ///< e.g. "deepseek-v4"; "given" where the caller gave everything
  ActivationFunction activation;         ///< of the routed experts
  ActivationFunction shared_activation;  ///< of the shared expert
  bool weight_on_input = false;
  std::optional<RouterConfig> router;  ///< absent where the family is not known and nobody says
  RouterBias router_bias = RouterBias::kByName;
  bool shared_has_gate = false;  ///< the family's shared expert has a gate on its output: so must the layer's
};

/// What a caller says instead of, or in place of, config.json.
struct RuleOverrides {
  std::optional<ActivationFunction> activation;  ///< of the routed and the shared experts
  std::optional<RouterConfig> router;            ///< top_k 0: as config.json says
  bool weight_on_input = false;                  ///< also where the family says otherwise
};

/// The rules of `config`, by model_type or, where it has none, architectures. Throws Error where the family
/// is not known and `overrides` name no activation, listing the families that are known and the options that
/// would be needed; and for parameters that do not fit the family.
LayerRules rules_of(const ModelConfig& config, const RuleOverrides& overrides = {});

/// The family's name, e.g. "qwen3-moe"; empty where it is not known.
std::string_view family_name(const ModelConfig& config);

/// What config.json calls the model, for messages: "model_type 'x'", or that it says nothing.
std::string identity(const ModelConfig& config);

/// Names of the families that are known, with commas.
std::string known_families();

/// The router's rule, e.g. "sigmoid, top-8 in the best 4 of 8 groups by biased score, renormalised, x 2.5".
/// `by_token_id`: experts come from a hash table.
std::string describe_router(const LayerRules& rules, bool by_token_id = false);

/// The layer as its tensors and rules say; top_k is the router's, 0 where there is none. Throws Error where
/// experts have a gate and the activation has none, or the reverse, and where the shared expert lacks the
/// gate on its output that the family's has.
LayerConfig layer_config(const ExpertLayer& layer, const LayerRules& rules);

/// "swiglu", "swiglu-step", "geglu", "geglu-tanh", "relu2", "silu" or "gelu", then ",alpha=A", ",beta=B" and
/// ",limit=L" where it has them, e.g. "swiglu,limit=10". Throws Error for anything else.
ActivationFunction parse_activation(std::string_view text);

/// "softmax", "softmax-of-top-k", "sigmoid" or "sqrt-softplus", then ",top-k=K", ",renormalise=yes|no",
/// ",scale=F", ",groups=G" and ",top-groups=N", e.g. "sigmoid,top-k=8,scale=2.5,groups=8,top-groups=4".
/// Throws Error for anything else.
RouterConfig parse_router(std::string_view text);

}  // namespace fourfold
