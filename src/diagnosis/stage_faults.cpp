// Known faults of staging, of activations and of biases (faults.h).
#include <fmt/format.h>

#include <cmath>

#include "diagnosis/fault_list.h"

namespace fourfold::diagnosis {
namespace {

class StageFaults : FaultList {
 public:
  StageFaults(const Subject& subject, std::vector<Fault>& faults) : FaultList(subject, faults) {}

  void add_all() {
    add_staging_faults();
    add_activation_faults();
    add_bias_faults();
  }

 private:
  template <InputScaleUse use>
  void add_input_scale(const std::string& id, const std::string& what, const std::string& remedy) {
    const auto add_one = [&](const char* suffix, Apply apply, const char* which) {
      add(id + suffix, FaultPlace::kStaging, apply, fmt::format(fmt::runtime(what), which), remedy)
          .needs_nvfp4_staging = true;
    };
    add_one(
        "", [](Deviation& d, const Fault&) { d.first.input_scale = d.intermediate_scale = use; },
        "x and of the intermediate");
    add_one(
        ".x", [](Deviation& d, const Fault&) { d.first.input_scale = use; }, "x");
    add_one(
        ".intermediate", [](Deviation& d, const Fault&) { d.intermediate_scale = use; }, "the intermediate");
  }

  void add_staging_faults() {
    const std::string alpha = "alpha: it needs the global scale that staging actually used";
    add_input_scale<InputScaleUse::kDroppedFromAlpha>(
        "input-scale-dropped", "the activation global scale of {} is left out of alpha", alpha);
    add_input_scale<InputScaleUse::kReciprocalInAlpha>(
        "input-scale-reciprocal", "alpha has the reciprocal of the activation global scale of {}", alpha);
    add_input_scale<InputScaleUse::kReciprocalInStaging>(
        "input-scale-reciprocal-in-staging",
        "the quantizer of activations takes the reciprocal of the global scale of {}",
        "whether the quantize kernel wants input_scale or 1 / input_scale");
    add_input_scale<InputScaleUse::kFirstExpert>(
        "input-scale-of-expert-0", "the input_scale of {} is expert 0's for every expert",
        "the loading of input_scale: one value an expert, or the largest of all");
    add_input_scale<InputScaleUse::kFirstExpertInAlpha>(
        "input-scale-stale-in-alpha",
        "activations of {} are quantized by the expert's input_scale, and alpha has expert 0's", alpha);
    add_input_scale<InputScaleUse::kOne>("input-scale-one", "the input_scale of {} is 1: it was never loaded",
                                         "the loading of input_scale, and what a missing one becomes");
    Fault& groups = add(
        "x-scales-unpadded-groups", FaultPlace::kStaging,
        [](Deviation& d, const Fault&) { d.first.scale_groups_unpadded = true; },
        "a group's swizzled scales of x are looked for at its unpadded first row",
        "offsets of activation scales: every group is padded to 128 rows (formats.md, section 2)");
    groups.needs_nvfp4_staging = true;
  }

  void add_activation_faults() {
    const ActivationFunction& f = subject_.config.activation;
    const std::string remedy =
        "the activation's parameters (hidden_act, swiglu_limit, swiglu_alpha) as the engine's kernel has "
        "them";
    const auto add_one = [&](const char* id, Apply apply, std::string sentence) -> Fault& {
      return add(id, FaultPlace::kActivation, apply, std::move(sentence), remedy);
    };
    if (std::isfinite(f.limit)) {
      add_one(
          "clamp-missing", [](Deviation& d, const Fault&) { d.activation.limit = INFINITY; },
          weights().shared ? "gate and up of the routed experts are not clamped"
                           : "gate and up are not clamped");
      if (weights().shared && std::isfinite(subject_.config.shared_activation.limit)) {
        add_one(
            "clamp-missing-everywhere",
            [](Deviation& d, const Fault&) {
              d.activation.limit = INFINITY;
              d.shared.not_clamped = true;
            },
            "gate and up are not clamped, in the shared expert neither");
      }
      add_one(
          "clamp-gate-both-sides",
          [](Deviation& d, const Fault&) { d.activation.clamp = ClampForm::kGateBothSides; },
          "gate is clamped from below too: clamp(g, -L, L) for min(g, L)");
      add_one(
          "clamp-up-from-above",
          [](Deviation& d, const Fault&) { d.activation.clamp = ClampForm::kUpFromAbove; },
          "up is clamped from above alone: min(u, L) for clamp(u, -L, L)");
      add_one(
          "clamp-gate-alone", [](Deviation& d, const Fault&) { d.activation.clamp = ClampForm::kGateAlone; },
          "up is not clamped");
      add_one(
          "clamp-up-alone", [](Deviation& d, const Fault&) { d.activation.clamp = ClampForm::kUpAlone; },
          "gate is not clamped");
      for (const float limit : {7.0f, 10.0f}) {
        if (limit == f.limit) continue;
        add(
            fmt::format("clamp-limit-{}", limit), FaultPlace::kActivation,
            [](Deviation& d, const Fault& fault) { d.activation.limit = fault.value; },
            fmt::format("the clamp is at {} instead of {}", limit, f.limit), remedy)
            .value = limit;
      }
      if (f.kind == ActivationKind::kSwiglu && f.alpha == 1.0f) {
        add_one(
            "clamp-after-silu",
            [](Deviation& d, const Fault&) { d.activation.kind = ActivationKind::kSwigluStep; },
            "min(silu(g), L) for silu(min(g, L))");
      }
    } else if (f.kind == ActivationKind::kSwiglu) {
      add_one(
          "clamp-unasked-7", [](Deviation& d, const Fault&) { d.activation.limit = 7.0f; },
          "gate and up are clamped at 7");
      add_one(
          "clamp-unasked-10", [](Deviation& d, const Fault&) { d.activation.limit = 10.0f; },
          "gate and up are clamped at 10");
    }
    if (f.kind == ActivationKind::kSwiglu) {
      if (f.alpha == 1.0f) {
        add_one(
            "activation-alpha", [](Deviation& d, const Fault&) { d.activation.alpha = 1.702f; },
            "sigmoid(1.702 g) for sigmoid(g)");
        add_one(
            "activation-gelu", [](Deviation& d, const Fault&) { d.activation.kind = ActivationKind::kGeglu; },
            "gelu(g) for silu(g)");
        add_one(
            "activation-gelu-tanh",
            [](Deviation& d, const Fault&) { d.activation.kind = ActivationKind::kGegluTanh; },
            "gelu's tanh form for silu(g)");
      } else {
        add_one(
            "activation-alpha", [](Deviation& d, const Fault&) { d.activation.alpha = 1.0f; },
            fmt::format("sigmoid(g) for sigmoid({:.4g} g)", f.alpha));
      }
      if (f.beta == 0.0f) {
        add_one(
            "activation-beta", [](Deviation& d, const Fault&) { d.activation.beta = 1.0f; }, "u + 1 for u");
      } else {
        add_one(
            "activation-beta", [](Deviation& d, const Fault&) { d.activation.beta = 0.0f; },
            fmt::format("u for u + {}", f.beta));
      }
    }
    if (f.kind == ActivationKind::kReluSquared) {
      add_one(
          "activation-relu", [](Deviation& d, const Fault&) { d.activation.relu_not_squared = true; },
          "relu(u) for relu(u)^2");
      add_one(
          "activation-silu", [](Deviation& d, const Fault&) { d.activation.kind = ActivationKind::kSilu; },
          "silu(u) for relu(u)^2");
    }
  }

  void add_bias_faults() {
    const bool first = expert().up_bias.has_value(), second = expert().down_bias.has_value();
    const std::string remedy = "whether the engine loads biases and its kernel adds them";
    if (first) {
      add(
          "bias-missing.w13", FaultPlace::kExperts,
          [](Deviation& d, const Fault&) { d.first.bias_missing = true; },
          "the bias of gate and up is not added", remedy);
    }
    if (second) {
      add(
          "bias-missing.w2", FaultPlace::kExperts,
          [](Deviation& d, const Fault&) { d.down_bias = DownBias::kMissing; },
          "the bias of down is not added", remedy);
      add(
          "weight-before-down", FaultPlace::kCombine,
          [](Deviation& d, const Fault&) { d.down_bias = DownBias::kUnweighted; },
          "routing weights multiply before down_proj: its bias is not weighted",
          "where the kernel multiplies by the routing weight");
    }
    if (first && second) {
      add(
          "bias-missing", FaultPlace::kExperts,
          [](Deviation& d, const Fault&) {
            d.first.bias_missing = true;
            d.down_bias = DownBias::kMissing;
          },
          "biases are not added", remedy);
    }
  }
};

}  // namespace

void add_stage_faults(const Subject& subject, std::vector<Fault>& faults) {
  StageFaults(subject, faults).add_all();
}

}  // namespace fourfold::diagnosis
