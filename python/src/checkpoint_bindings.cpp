// Checkpoints, expert weights from them or from arrays, routers.
#include "fourfold/checkpoint.h"

#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/set.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>

#include "arrays.h"
#include "bindings.h"
#include "failures.h"
#include "fourfold/model_family.h"

namespace fourfold::python {
namespace {

using CheckpointPtr = std::shared_ptr<const Checkpoint>;

/// A layer's router and the checkpoint that its tensors view.
struct Router {
  CheckpointPtr checkpoint;
  CheckpointRouter router;
  std::string description;
};

std::shared_ptr<ExpertLayer> load(const CheckpointPtr& checkpoint, int64_t layer,
                                  const std::vector<int64_t>& experts, const std::string& order_name,
                                  const std::string& scheme_name) {
  std::optional<GateUpOrder> order;
  std::optional<WeightScheme> scheme;
  if (!order_name.empty()) {
    order =
        parse_name("gate_up_order", order_name, parse_gate_up_order, "gate-first, up-first or interleaved");
  }
  if (!scheme_name.empty()) {
    scheme = parse_name("scheme", scheme_name, parse_weight_scheme, "modelopt, compressed-tensors or mxfp4");
  }
  const nb::gil_scoped_release release;
  return std::make_shared<ExpertLayer>(load_experts(checkpoint, layer, experts, order, scheme));
}

LayerRules rules_for(const Checkpoint& checkpoint, const std::string& activation, const std::string& router) {
  RuleOverrides overrides;
  if (!activation.empty()) overrides.activation = parse_activation(activation);
  if (!router.empty()) overrides.router = parse_router(router);
  return rules_of(checkpoint.config(), overrides);
}

/// The layer that the checkpoint's family computes with these experts. `top_k` 0: the router's.
LayerConfig config_of(const Checkpoint& checkpoint, const ExpertLayer& layer, const std::string& activation,
                      int64_t top_k, bool shared) {
  const LayerRules rules = rules_for(checkpoint, activation, "");
  LayerConfig config = layer_config(layer, rules);
  if (top_k > 0) config.top_k = top_k;
  if (config.top_k < 1) {
    reject("top_k", "a number, since the checkpoint's rules name none", "0; pass top_k=");
  }
  if (!shared) config.shared_intermediate = 0;
  return config;
}

LayerConfig config_of_arrays(const ExpertWeights& weights, int64_t top_k, const std::string& activation,
                             bool weight_on_input) {
  LayerConfig config;
  config.hidden = weights.hidden;
  config.intermediate = weights.intermediate;
  config.experts = weights.count();
  config.top_k = top_k;
  config.activation = parse_activation(activation);
  config.weight_on_input = weight_on_input;
  return config;
}

std::shared_ptr<ExpertWeights> weights_of(const ExpertLayer& layer, bool shared) {
  auto weights = std::make_shared<ExpertWeights>(layer.weights);
  if (!shared) weights->shared.reset();
  return weights;
}

/// One expert from arrays; `gate` is None where the activation has none. Biases are vectors.
void add_expert(ExpertWeights& weights, const std::string& name, const std::optional<Weight>& gate,
                const Weight& up, const Weight& down, const std::optional<Array>& gate_bias,
                const std::optional<Array>& up_bias, const std::optional<Array>& down_bias,
                std::optional<float> gate_input_scale, std::optional<float> up_input_scale,
                std::optional<float> down_input_scale) {
  Expert expert;
  std::vector<Array> biases;
  const auto bias = [&](const std::optional<Array>& array, const char* which) -> std::optional<DenseView> {
    if (!array) return std::nullopt;
    biases.push_back(*array);
    return dense_matrix(view_of(*array, fmt::format("{} {}", name, which)));
  };
  expert.name = name;
  if (gate) expert.gate = gate->view;
  expert.up = up.view;
  expert.down = down.view;
  expert.gate_bias = bias(gate_bias, "gate_bias");
  expert.up_bias = bias(up_bias, "up_bias");
  expert.down_bias = bias(down_bias, "down_bias");
  expert.gate_input_scale = gate_input_scale;
  expert.up_input_scale = up_input_scale;
  expert.down_input_scale = down_input_scale;
  if (weights.experts.empty()) {
    weights.hidden = cols_of(up.view);
    weights.intermediate = rows_of(up.view);
  }
  weights.experts.push_back(std::move(expert));
  // A chain: what the earlier experts need, and what this one does.
  using Owners = std::vector<std::shared_ptr<const void>>;
  auto owners =
      std::make_shared<Owners>(Owners{weights.storage, up.owner, down.owner, keep_alive(std::move(biases))});
  if (gate) owners->push_back(gate->owner);
  weights.storage = std::move(owners);
}

Weight matrix_of(const ExpertWeights& weights, int64_t expert, const std::string& which) {
  if (expert < 0 || expert >= weights.count()) {
    reject("expert", fmt::format("a number from 0 to {}", weights.count() - 1), std::to_string(expert));
  }
  const Expert& found = weights.experts[static_cast<size_t>(expert)];
  if (which == "up") return {found.up, weights.storage};
  if (which == "down") return {found.down, weights.storage};
  if (which != "gate") reject("matrix", "gate, up or down", "'" + which + "'");
  if (!found.has_gate()) reject("matrix", "up or down: these experts have no gate", "'gate'");
  return {found.gate, weights.storage};
}

Router load_router_of(const CheckpointPtr& checkpoint, int64_t layer, int64_t experts, int64_t hidden,
                      const std::string& rule) {
  const LayerRules rules = rules_for(*checkpoint, "", rule);
  if (!rules.router) reject("router", "a family whose rules are known", "none; pass rule=");
  std::string why_not;
  auto router = load_router(*checkpoint, layer, experts, hidden, *rules.router, rules.router_bias, why_not);
  if (!router) throw Error(ErrorCode::kNotFound, fmt::format("layer {}: router: {}", layer, why_not));
  const bool hashed = router->hash_table != nullptr;
  return {checkpoint, std::move(*router), describe_router(rules, hashed)};
}

void route_into(const Router& router, const Array& x_array, const std::optional<Array>& token_array,
                const WritableArray& id_array, const WritableArray& weight_array) {
  const ArrayView x = view_of(x_array, "x");
  if (x.device != Device::host()) reject("x", "host memory", x.describe() + "; copy it to the host");
  const MatrixView<Bf16> rows = bf16_matrix(x);
  std::vector<int64_t> tokens;
  if (token_array) {
    ArrayView ids = view_of(*token_array, "token_ids");
    ids.require_dimensions(1);
    ids.require(Element::kI64);
    for (int64_t t = 0; t < ids.shape[0]; ++t) {
      tokens.push_back(reinterpret_cast<const int64_t*>(ids.data)[t * ids.strides[0]]);
    }
  }
  const ArrayView ids = view_of(id_array, "topk_ids"), weights = view_of(weight_array, "topk_weights");
  ids.require_shape({rows.rows, router.router.config.top_k});
  weights.require_shape(ids.shape);
  const MatrixView<int32_t> id_rows = i32_matrix(ids);
  const MatrixView<float> weight_rows = f32_matrix(weights);
  const nb::gil_scoped_release release;
  const RoutingDecision decision = route(router.router.config, router.router.weights, rows, tokens);
  for (int64_t t = 0; t < rows.rows; ++t) {
    std::copy_n(decision.topk_ids.begin() + t * decision.top_k, decision.top_k, id_rows.row(t));
    std::copy_n(decision.topk_weights.begin() + t * decision.top_k, decision.top_k, weight_rows.row(t));
  }
}

void bind_model_config(nb::module_& module) {
  nb::class_<ModelConfig>(module, "ModelConfig", "What config.json says; None where it does not.")
      .def_ro("model_type", &ModelConfig::model_type)
      .def_ro("architecture", &ModelConfig::architecture)
      .def_ro("hidden", &ModelConfig::hidden)
      .def_ro("intermediate", &ModelConfig::intermediate)
      .def_ro("experts", &ModelConfig::experts)
      .def_ro("top_k", &ModelConfig::top_k)
      .def_ro("layers", &ModelConfig::layers)
      .def_ro("quantization", &ModelConfig::quantization);
}

}  // namespace

void bind_checkpoint(nb::module_& module) {
  bind_model_config(module);
  nb::class_<Checkpoint>(module, "Checkpoint", "An opened model directory, mapped.")
      .def_prop_ro("config", [](const Checkpoint& checkpoint) { return checkpoint.config(); })
      .def_prop_ro("path", [](const Checkpoint& checkpoint) { return checkpoint.path().string(); })
      .def_prop_ro("family",
                   [](const Checkpoint& checkpoint) { return std::string(family_name(checkpoint.config())); })
      .def("layers", [](const Checkpoint& checkpoint) { return layers_with_experts(checkpoint); })
      .def("tensor_names", [](const Checkpoint& checkpoint) {
        std::vector<std::string> names;
        for (const auto& [name, tensor] : checkpoint.tensors()) names.push_back(name);
        return names;
      });
  module.def(
      "open_checkpoint",
      [](const std::string& path) {
        const nb::gil_scoped_release release;
        return std::const_pointer_cast<Checkpoint>(Checkpoint::open(path));
      },
      nb::arg("path"));

  nb::class_<ExpertLayer>(module, "ExpertLayer", "The experts of one layer, as a checkpoint stores them.")
      .def_ro("expert_ids", &ExpertLayer::expert_ids)
      .def_ro("scheme", &ExpertLayer::scheme)
      .def_ro("naming", &ExpertLayer::naming)
      .def_ro("shared_scheme", &ExpertLayer::shared_scheme)
      .def_ro("notes", &ExpertLayer::notes)
      .def("weights", weights_of, nb::arg("shared"));
  module.def(
      "load_experts",
      [](const std::shared_ptr<Checkpoint>& checkpoint, int64_t layer, const std::vector<int64_t>& experts,
         const std::string& order,
         const std::string& scheme) { return load(checkpoint, layer, experts, order, scheme); },
      nb::arg("checkpoint"), nb::arg("layer"), nb::arg("experts"), nb::arg("gate_up_order"),
      nb::arg("scheme"));

  nb::class_<ExpertWeights>(module, "ExpertWeights", "The expert weights of one layer.")
      .def(nb::init<>())
      .def("add_expert", add_expert, nb::arg("name"), nb::arg("gate").none(), nb::arg("up"), nb::arg("down"),
           nb::arg("gate_bias").none(), nb::arg("up_bias").none(), nb::arg("down_bias").none(),
           nb::arg("gate_input_scale").none(), nb::arg("up_input_scale").none(),
           nb::arg("down_input_scale").none())
      .def("validate", [](const ExpertWeights& weights) { validate(weights); })
      .def("matrix", matrix_of, nb::arg("expert"), nb::arg("which"))
      .def_ro("hidden", &ExpertWeights::hidden)
      .def_ro("intermediate", &ExpertWeights::intermediate)
      .def_prop_ro("count", [](const ExpertWeights& weights) { return weights.count(); })
      .def_prop_ro("has_shared", [](const ExpertWeights& weights) { return weights.shared.has_value(); });

  nb::class_<LayerConfig>(module, "LayerConfig", "What a layer computes.")
      .def_ro("hidden", &LayerConfig::hidden)
      .def_ro("intermediate", &LayerConfig::intermediate)
      .def_ro("experts", &LayerConfig::experts)
      .def_ro("top_k", &LayerConfig::top_k)
      .def_ro("weight_on_input", &LayerConfig::weight_on_input)
      .def_ro("shared_intermediate", &LayerConfig::shared_intermediate)
      .def_prop_ro("h_columns", [](const LayerConfig& config) { return config.h_columns(); })
      .def_prop_ro("activation", [](const LayerConfig& config) { return describe(config.activation); });
  module.def("config_of_checkpoint", config_of, nb::arg("checkpoint"), nb::arg("layer"),
             nb::arg("activation"), nb::arg("top_k"), nb::arg("shared"));
  module.def("config_of_weights", config_of_arrays, nb::arg("weights"), nb::arg("top_k"),
             nb::arg("activation"), nb::arg("weight_on_input"));

  nb::class_<Router>(module, "Router", "A layer's router.")
      .def_prop_ro("top_k", [](const Router& router) { return router.router.config.top_k; })
      .def_prop_ro("name", [](const Router& router) { return router.router.name; })
      .def_ro("description", &Router::description)
      .def_prop_ro("by_token_id", [](const Router& router) { return router.router.hash_table != nullptr; })
      .def("route", route_into, nb::arg("x"), nb::arg("token_ids").none(), nb::arg("topk_ids"),
           nb::arg("topk_weights"));
  module.def(
      "load_router",
      [](const std::shared_ptr<Checkpoint>& checkpoint, int64_t layer, int64_t experts, int64_t hidden,
         const std::string& rule) { return load_router_of(checkpoint, layer, experts, hidden, rule); },
      nb::arg("checkpoint"), nb::arg("layer"), nb::arg("experts"), nb::arg("hidden"), nb::arg("rule"));
}

}  // namespace fourfold::python
