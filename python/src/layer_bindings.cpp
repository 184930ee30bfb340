// MoE layers.
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>

#include <memory>

#include "bindings.h"
#include "failures.h"
#include "layer.h"

namespace fourfold::python {
namespace {

/// Empty policies: the defaults.
LayerOptions options_of(const ExpertWeights& weights, const std::string& activations,
                        const std::string& x_scale, const std::string& intermediate_scale,
                        const std::string& activation_rule) {
  LayerOptions options;
  options.activations = activation_format(activations);
  options.activation_rule = scale_rule("activation_rule", activation_rule);
  if (!x_scale.empty()) options.x_scale = scale_policy(x_scale);
  if (!intermediate_scale.empty()) options.intermediate_scale = scale_policy(intermediate_scale);
  if (x_scale.empty() || intermediate_scale.empty()) {
    const DefaultPolicies defaults = default_scale_policies(weights, options.activations);
    if (x_scale.empty()) options.x_scale = defaults.x;
    if (intermediate_scale.empty()) options.intermediate_scale = defaults.intermediate;
  }
  return options;
}

std::unique_ptr<Layer> make_layer(const std::shared_ptr<ExpertWeights>& weights, const LayerConfig& config,
                                  const std::string& activations, const std::string& x_scale,
                                  const std::string& intermediate_scale, const std::string& activation_rule,
                                  const std::string& backend) {
  const nb::gil_scoped_release release;
  validate(*weights);
  const LayerOptions options =
      options_of(*weights, activations, x_scale, intermediate_scale, activation_rule);
  validate(*weights, config, options);
  return std::make_unique<Layer>(weights, config, options, backend);
}

/// The format in which the shared expert's activations are staged.
std::string shared_activations(const ExpertWeights& weights, const std::string& activations) {
  LayerOptions options;
  options.activations = activation_format(activations);
  if (weights.shared) options = shared_options(*weights.shared, options);
  return std::string(to_string(options.activations));
}

int32_t forward(Layer& layer, const LayerPlan& plan, const Array& x, const Array& topk_ids,
                const Array& topk_weights, const WritableArray& y,
                const std::optional<WritableArray>& workspace, const std::optional<WritableArray>& status,
                const std::map<std::string, WritableArray>& taps, uintptr_t stream) {
  return layer.forward(plan, {x, topk_ids, topk_weights, y, workspace, status, taps},
                       reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_layer(nb::module_& module) {
  nb::class_<LayerPlan>(module, "LayerPlan", "The frozen choice of kernels for up to max_tokens tokens.")
      .def_ro("max_tokens", &LayerPlan::max_tokens)
      .def_ro("workspace_bytes", &LayerPlan::workspace_bytes)
      .def_ro("kernel", &LayerPlan::kernel)
      .def_ro("reason", &LayerPlan::reason);

  nb::class_<Layer>(module, "Layer", "One MoE layer on one backend.")
      .def_prop_ro("backend", [](const Layer& layer) { return std::string(layer.backend().name()); })
      .def_prop_ro("reason", &Layer::reason)
      .def_prop_ro("config", [](const Layer& layer) { return layer.layer().config(); })
      .def_prop_ro(
          "activations",
          [](const Layer& layer) { return std::string(to_string(layer.layer().options().activations)); })
      .def_prop_ro("x_scale",
                   [](const Layer& layer) { return std::string(to_string(layer.layer().options().x_scale)); })
      .def_prop_ro("intermediate_scale",
                   [](const Layer& layer) {
                     return std::string(to_string(layer.layer().options().intermediate_scale));
                   })
      .def_prop_ro(
          "activation_rule",
          [](const Layer& layer) { return std::string(to_string(layer.layer().options().activation_rule)); })
      .def_prop_ro("cuda_device",
                   [](const Layer& layer) -> std::optional<int> {
                     if (layer.device() == Device::host()) return std::nullopt;
                     return layer.device().index;
                   })
      .def(
          "plan", [](const Layer& layer, int64_t max_tokens) { return layer.layer().plan(max_tokens); },
          nb::arg("max_tokens"))
      .def(
          "update_weights",
          [](Layer& layer, const std::shared_ptr<ExpertWeights>& weights) {
            const nb::gil_scoped_release release;
            layer.update_weights(weights);
          },
          nb::arg("weights"))
      .def("forward", forward, nb::arg("plan"), nb::arg("x"), nb::arg("topk_ids"), nb::arg("topk_weights"),
           nb::arg("out"), nb::arg("workspace").none(), nb::arg("status").none(), nb::arg("taps"),
           nb::arg("stream"));
  module.def("make_layer", make_layer, nb::arg("weights"), nb::arg("config"), nb::arg("activations"),
             nb::arg("x_scale"), nb::arg("intermediate_scale"), nb::arg("activation_rule"),
             nb::arg("backend"));
  module.def("shared_activations", shared_activations, nb::arg("weights"), nb::arg("activations"));
}

}  // namespace fourfold::python
