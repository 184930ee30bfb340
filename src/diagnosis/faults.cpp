#include "diagnosis/faults.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "fourfold/scale_layout.h"

namespace fourfold::diagnosis {
namespace {

using Apply = void (*)(Deviation&, const Fault&);

void drop_tail(WeightReading& reading, const Fault& fault) {
  reading.tail = KTail::kDropped;
  reading.tail_tile = fault.code;
}

/// Collects the faults of one layer.
class FaultTable {
 public:
  explicit FaultTable(const Subject& subject) : subject_(subject) {}

  std::vector<Fault> make() {
    if (has_blocks()) add_scale_faults();
    if (has_blocks()) add_code_faults();
    add_global_faults();
    add_tail_faults();
    add_gate_up_faults();
    add_source_faults();
    add_staging_faults();
    add_activation_faults();
    add_bias_faults();
    add_routing_faults();
    add_expert_faults();
    add_combine_faults();
    return std::move(faults_);
  }

 private:
  const ExpertWeights& weights() const { return *subject_.weights; }
  const Expert& expert() const { return weights().experts.front(); }
  bool gated() const { return expert().has_gate(); }

  template <class Holds>
  bool in_all_matrices(Holds holds) const {
    return std::all_of(weights().experts.begin(), weights().experts.end(), [&](const Expert& e) {
      return (!e.has_gate() || holds(e.gate)) && holds(e.up) && holds(e.down);
    });
  }
  bool has_blocks() const {
    return in_all_matrices([](const WeightView& w) { return std::holds_alternative<BlockScaledView>(w); });
  }
  bool is_nvfp4() const {
    return in_all_matrices([](const WeightView& w) { return is_stored_as(w, QuantFormat::kNvfp4); });
  }

  Fault& add(std::string id, FaultPlace place, Apply apply, std::string sentence, std::string remedy) {
    Fault fault;
    fault.id = std::move(id);
    fault.sentence = std::move(sentence);
    fault.remedy = std::move(remedy);
    fault.place = place;
    fault.apply = apply;
    return faults_.emplace_back(std::move(fault));
  }

  /// Three faults: in both weights, in w13 and in w2 alone. `sentence` has a {} for which.
  template <auto change>
  void add_reading(const std::string& id, const std::string& sentence, const std::string& remedy,
                   int code = 0) {
    const auto both = [](Deviation& d, const Fault& f) {
      change(d.first.reading, f);
      change(d.down, f);
    };
    const auto first = [](Deviation& d, const Fault& f) { change(d.first.reading, f); };
    const auto second = [](Deviation& d, const Fault& f) { change(d.down, f); };
    const auto add_one = [&](const char* suffix, Apply apply, const char* which) {
      add(id + suffix, FaultPlace::kWeights, apply, fmt::format(fmt::runtime(sentence), which), remedy).code =
          code;
    };
    add_one("", both, "w13 and w2");
    add_one(".w13", first, "w13 (gate and up)");
    add_one(".w2", second, "w2 (down)");
  }

  template <ScaleOrder order>
  void add_scale_order(const std::string& id, const std::string& sentence, const std::string& remedy) {
    add_reading<[](WeightReading& r, const Fault&) { r.scale_order = order; }>(id, sentence, remedy);
  }

  template <ScaleCode code>
  void add_scale_code(const std::string& id, const std::string& sentence, const std::string& remedy) {
    add_reading<[](WeightReading& r, const Fault&) { r.scale_code = code; }>(id, sentence, remedy);
  }

  void add_scale_faults() {
    add_scale_order<ScaleOrder::kTransposed>(
        "scales-transposed", "block scales of {} are read as (K_sf, N) where the checkpoint stores (N, K_sf)",
        "the loader's transpose of weight_scale, and strides of the scale tensor");
    if (gated()) {
      add(
          "scales-transposed-halves", FaultPlace::kWeights,
          [](Deviation& d, const Fault&) { d.first.reading.scale_order = ScaleOrder::kTransposedHalves; },
          "block scales of gate and of up are each read as (K_sf, I) where the checkpoint stores (I, K_sf)",
          "the loader's transpose of weight_scale, before gate and up are put together");
    }
    add_scale_order<ScaleOrder::kLinearAsSwizzled>(
        "scales-linear-as-swizzled", "block scales of {} lie row-major and the kernel reads the 128x4 layout",
        "the swizzle after loading (to_blocked, swizzle_blockscale): it is missing");
    add_scale_order<ScaleOrder::kSwizzledAsLinear>(
        "scales-swizzled-as-linear", "block scales of {} are swizzled to 128x4 and the kernel reads rows",
        "a swizzle that this kernel does not want, or that was done twice");
    add_scale_order<ScaleOrder::kUnpaddedStride>(
        "scales-unpadded-stride",
        "in {} the next expert's swizzled scales are looked for after N x K_sf bytes, "
        "without the padding to 128 x 4",
        "the per-expert stride of swizzled scales: round N up to 128 and K_sf to 4");
    if (!is_nvfp4()) return;
    add_scale_code<ScaleCode::kE8m0>(
        "scales-as-e8m0", "block scales of {} are e4m3 and are read as e8m0 (2^(byte - 127))",
        "the scale dtype that the kernel was built for: MXFP4's instead of NVFP4's");
    add_scale_code<ScaleCode::kSaturated240>(
        "scales-saturated-240", "block scales of {} above 240 become 240: exponent 15 is taken for infinity",
        "the e4m3 decoder: e4m3fn has values in exponent 15, and only 0x7F is NaN");
    add_scale_code<ScaleCode::kFnuz>("scales-as-fnuz",
                                     "block scales of {} are read as e4m3fnuz: half of what they are",
                                     "the e4m3 flavour: AMD's fnuz has a bias of 8");
  }

  void add_code_faults() {
    add_reading<[](WeightReading& r, const Fault&) { r.swapped_nibbles = true; }>(
        "nibbles-swapped", "the two codes in a byte of {} are swapped: the even index lies in the low nibble",
        "the unpacking of e2m1 pairs");
    for (int code = 1; code <= 7; ++code) {
      for (const float value : {decode_e2m1(static_cast<uint8_t>(code - 1)),
                                code == 7 ? 8.0f : decode_e2m1(static_cast<uint8_t>(code + 1))}) {
        faults_.push_back(wrong_code_fault(code, value));
      }
    }
  }

  void add_global_faults() {
    if (!is_nvfp4()) return;
    add_reading<[](WeightReading& r, const Fault&) { r.global = GlobalUse::kDropped; }>(
        "weight-global-dropped", "the global scale of {} (weight_scale_2) is not applied",
        "alpha, or the loading of weight_scale_2 / weight_global_scale");
    add_reading<[](WeightReading& r, const Fault&) { r.global = GlobalUse::kReciprocal; }>(
        "weight-global-reciprocal", "the global scale of {} is applied as its reciprocal",
        "ModelOpt's weight_scale_2 multiplies, compressed-tensors' weight_global_scale divides");
  }

  void add_tail_faults() {
    for (const int tile : {64, 128, 256}) {
      const auto cuts = [&](int64_t k) { return k > tile && k % tile != 0; };
      const bool first = cuts(subject_.hidden()), second = cuts(subject_.intermediate());
      const std::string sentence =
          fmt::format("the last K % {} values of a row of {{}} are not multiplied", tile);
      const std::string remedy = "the loop over K, and whether its bound is rounded down to a tile";
      const auto add_one = [&](const char* suffix, Apply apply, const char* which) {
        add(fmt::format("k-tail-dropped-{}{}", tile, suffix), FaultPlace::kWeights, apply,
            fmt::format(fmt::runtime(sentence), which), remedy)
            .code = tile;
      };
      if (first)
        add_one(
            ".w13", [](Deviation& d, const Fault& f) { drop_tail(d.first.reading, f); }, "w13");
      if (second)
        add_one(
            ".w2", [](Deviation& d, const Fault& f) { drop_tail(d.down, f); }, "w2");
      if (subject_.hidden() % tile != 0 && tile == 128) {
        add(
            "k-tail-over-read.w13", FaultPlace::kWeights,
            [](Deviation& d, const Fault& f) {
              d.first.reading.tail = KTail::kOverRead;
              d.first.reading.tail_tile = f.code;
            },
            "K is rounded up to 128 and the start of the next row is read as data, in x and in w13",
            "padding of K: it must be zero, or masked")
            .code = tile;
      }
    }
  }

  void add_gate_up_faults() {
    if (!gated()) return;
    const std::string order =
        "the order in which w1 (gate) and w3 (up) are put into w13, and in which the activation reads it";
    add(
        "gate-up-swapped", FaultPlace::kWeights,
        [](Deviation& d, const Fault&) { d.first.rows = GateUpRows::kSwapped; }, "gate and up are swapped",
        order);
    add(
        "gate-up-rows-swapped", FaultPlace::kWeights,
        [](Deviation& d, const Fault&) { d.first.rows = GateUpRows::kRowsSwapped; },
        "gate's and up's rows are swapped, their global scales are not", order);
    add(
        "gate-up-read-interleaved", FaultPlace::kWeights,
        [](Deviation& d, const Fault&) { d.first.rows = GateUpRows::kHalvesAsInterleaved; },
        "w13 has gate's rows before up's and is read as interleaved (gate even, up odd)", order);
    add(
        "gate-up-read-as-halves", FaultPlace::kWeights,
        [](Deviation& d, const Fault&) { d.first.rows = GateUpRows::kInterleavedAsHalves; },
        "w13 is interleaved (gate even, up odd) and is read as gate's rows before up's", order);
    if (!is_nvfp4()) return;
    const std::string alpha = "alpha of the first GEMM: gate and up have a weight_scale_2 each";
    add(
        "gate-global-for-up", FaultPlace::kWeights,
        [](Deviation& d, const Fault&) { d.first.global = GateUpGlobal::kGate; },
        "gate's global scale is used for up too", alpha);
    add(
        "up-global-for-gate", FaultPlace::kWeights,
        [](Deviation& d, const Fault&) { d.first.global = GateUpGlobal::kUp; },
        "up's global scale is used for gate too", alpha);
    add(
        "larger-global-without-rescale", FaultPlace::kWeights,
        [](Deviation& d, const Fault&) { d.first.global = GateUpGlobal::kLarger; },
        "the larger of gate's and up's global scales is used for both, and block scales are not rescaled",
        alpha);
  }

  void add_source_faults() {
    if (is_nvfp4()) {
      add(
          "quantized-again", FaultPlace::kWeights,
          [](Deviation& d, const Fault&) { d.first.source = WeightSource::kQuantizedAgain; },
          "weights were dequantized to bf16 and quantized again, gate and up as one tensor",
          "the loader: codes and block scales should reach the kernel as they are");
      if (gated()) {
        add(
            "gate-up-folded", FaultPlace::kWeights,
            [](Deviation& d, const Fault&) { d.first.source = WeightSource::kFolded; },
            "gate and up share the larger global scale, and the other's block scales were rescaled and "
            "rounded to e4m3",
            "not a bug, a loss: kernels that take one alpha an expert need it (layertest --gate-up fold "
            "shows its size)");
      }
    }
    const std::string remedy = "the layer index in the loader's names";
    if (subject_.layer_before) {
      add(
          "layer-before", FaultPlace::kWeights,
          [](Deviation& d, const Fault&) { d.first.source = WeightSource::kLayerBefore; },
          "the experts are those of the layer before", remedy);
    }
    if (subject_.layer_after) {
      add(
          "layer-after", FaultPlace::kWeights,
          [](Deviation& d, const Fault&) { d.first.source = WeightSource::kLayerAfter; },
          "the experts are those of the layer after", remedy);
    }
  }

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
          "gate and up are not clamped");
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

  void add_routing_faults() {
    const auto add_one = [&](const char* id, Apply apply, std::string sentence,
                             std::string remedy) -> Fault& {
      return add(id, FaultPlace::kRouting, apply, std::move(sentence), std::move(remedy));
    };
    add_one(
        "weights-reversed",
        [](Deviation& d, const Fault&) { d.first.routing.pairing = WeightPairing::kWeightsReversed; },
        "routing weights are in the reverse order of their experts", "the sort after top-k");
    add_one(
        "ids-sorted", [](Deviation& d, const Fault&) { d.first.routing.pairing = WeightPairing::kIdsSorted; },
        "expert ids were sorted, their routing weights were not",
        "the sort after top-k: ids and weights together");
    add_one(
        "weight-missing", [](Deviation& d, const Fault&) { d.first.weight = WeightUse::kMissing; },
        "routing weights are not applied", "the combine step, or apply_router_weight_on_input");
    add_one(
        "weight-twice", [](Deviation& d, const Fault&) { d.first.weight = WeightUse::kTwice; },
        "routing weights are applied twice", "the combine step: the kernel may have applied them");
    if (subject_.config.weight_on_input) {
      add_one(
          "weight-on-output", [](Deviation& d, const Fault&) { d.first.weight = WeightUse::kOnOutput; },
          "routing weights multiply an expert's output instead of its input", "apply_router_weight_on_input");
    } else {
      add_one(
          "weight-on-input", [](Deviation& d, const Fault&) { d.first.weight = WeightUse::kOnInput; },
          "routing weights multiply an expert's input instead of its output", "apply_router_weight_on_input");
    }
    if (subject_.router) add_router_faults(*subject_.router);
  }

  void add_router_faults(const RoutedBy& router) {
    const float factor = router.config.scaling_factor;
    const auto add_one = [&](const char* id, Apply apply, std::string sentence,
                             std::string remedy) -> Fault& {
      return add(id, FaultPlace::kRouting, apply, std::move(sentence), std::move(remedy));
    };
    if (factor != 1.0f) {
      add_one(
          "scaling-factor-missing", [](Deviation& d, const Fault& f) { d.first.routing.factor = f.value; },
          fmt::format("routed_scaling_factor ({}) is not applied", factor),
          "routed_scaling_factor in the router or after the experts")
          .value = 1.0f / factor;
      add_one(
          "scaling-factor-twice", [](Deviation& d, const Fault& f) { d.first.routing.factor = f.value; },
          fmt::format("routed_scaling_factor ({}) is applied twice", factor),
          "routed_scaling_factor: in the router and after the experts")
          .value = factor;
    }
    if (subject_.routing_given) return;  // these are in the engine's ids and weights
    if (router.config.score != RouterScore::kSoftmaxOfTopK) {
      add_one(
          "router-renormalise",
          [](Deviation& d, const Fault& f) { d.first.routing.renormalise = f.code != 0; },
          router.config.renormalise ? "routing weights are not normalised over the chosen experts"
                                    : "routing weights are normalised, which this model does not do",
          "norm_topk_prob / renormalize")
          .code = !router.config.renormalise;
      add_one(
          "router-score",
          [](Deviation& d, const Fault& f) { d.first.routing.score = static_cast<RouterScore>(f.code); },
          router.config.score == RouterScore::kSoftmax
              ? "the router's scores are sigmoids instead of a softmax"
              : "the router's scores are a softmax",
          "scoring_func")
          .code = static_cast<int>(router.config.score == RouterScore::kSoftmax ? RouterScore::kSigmoid
                                                                                : RouterScore::kSoftmax);
    } else {
      add_one(
          "router-score",
          [](Deviation& d, const Fault&) {
            d.first.routing.score = RouterScore::kSoftmax;
            d.first.routing.renormalise = false;
          },
          "the softmax is over all experts instead of the chosen ones", "softmax before or after top-k");
    }
    if (!router.correction_bias.empty()) {
      add_one(
          "router-bias-in-weights",
          [](Deviation& d, const Fault&) { d.first.routing.bias_in_weights = true; },
          "the correction bias is in the routing weights, not in the selection alone",
          "e_score_correction_bias");
      if (!router.by_token_id) {
        add_one(
            "router-bias-ignored", [](Deviation& d, const Fault&) { d.first.routing.bias_ignored = true; },
            "experts are selected without the correction bias", "the loading of e_score_correction_bias");
      }
    }
    if (router.config.groups > 1) {
      add_one(
          "router-groups-ignored", [](Deviation& d, const Fault&) { d.first.routing.groups_ignored = true; },
          "experts are selected without regard to groups", "n_group and topk_group");
    }
  }

  void add_expert_faults() {
    const auto add_one = [&](const std::string& id, Apply apply, std::string sentence,
                             std::string remedy) -> Fault& {
      return add(id, FaultPlace::kExperts, apply, std::move(sentence), std::move(remedy));
    };
    add_one(
        "expert-next", [](Deviation& d, const Fault&) { d.first.expert_map = ExpertMap::kNext; },
        "every expert computes with the weights of the next one", "the expert index: off by one");
    add_one(
        "expert-previous", [](Deviation& d, const Fault&) { d.first.expert_map = ExpertMap::kPrevious; },
        "every expert computes with the weights of the one before", "the expert index: off by one");
    for (const int ranks : {2, 4, 8}) {
      if (subject_.experts() % ranks != 0 || subject_.experts() / ranks < 2) continue;
      const std::string map = "the expert map of expert parallelism (global id -> rank and local id)";
      add_one(
          fmt::format("expert-map-first-of-{}", ranks),
          [](Deviation& d, const Fault& f) {
            d.first.expert_map = ExpertMap::kModuloRanks;
            d.first.expert_ranks = f.code;
          },
          fmt::format("all of {} ranks compute with the experts of the first", ranks), map)
          .code = ranks;
      add_one(
          fmt::format("expert-map-round-robin-{}", ranks),
          [](Deviation& d, const Fault& f) {
            d.first.expert_map = ExpertMap::kRoundRobin;
            d.first.expert_ranks = f.code;
          },
          fmt::format("experts are placed on {} ranks one after another and looked up round-robin", ranks),
          map)
          .code = ranks;
    }
    for (const int tile : {16, 64, 128}) {
      add_one(
          fmt::format("expert-of-tile-{}", tile),
          [](Deviation& d, const Fault& f) {
            d.first.expert_map = ExpertMap::kOfTile;
            d.first.expert_tile = f.code;
          },
          fmt::format("rows are computed in tiles of {} with the expert of the tile's first row: groups are "
                      "not padded",
                      tile),
          "moe_align_block_size, or padding of groups to the tile")
          .code = tile;
    }
  }

  void add_combine_faults() {
    const auto add_one = [&](const char* id, Apply apply, std::string sentence,
                             std::string remedy) -> Fault& {
      return add(id, FaultPlace::kCombine, apply, std::move(sentence), std::move(remedy));
    };
    if (weights().shared) {
      const std::string remedy = "where the shared expert's output is added";
      add_one(
          "shared-missing", [](Deviation& d, const Fault&) { d.shared.times = 0; },
          "the shared expert is not added", remedy);
      add_one(
          "shared-twice", [](Deviation& d, const Fault&) { d.shared.times = 2; },
          "the shared expert is added twice", remedy);
      if (weights().shared->gate) {
        add_one(
            "shared-gate-missing", [](Deviation& d, const Fault&) { d.shared.gate_ignored = true; },
            "the shared expert's output is not multiplied by its gate", "shared_expert_gate");
      }
      if (subject_.router && subject_.router->config.scaling_factor != 1.0f) {
        add_one(
            "shared-scaled", [](Deviation& d, const Fault& f) { d.shared.factor = f.value; },
            "routed_scaling_factor multiplies the shared expert too", remedy)
            .value = subject_.router->config.scaling_factor;
      }
    }
    const std::string sum = "the all-reduce (or reduce-scatter) after the experts";
    add_one(
        "ranks-upper-experts-missing", [](Deviation& d, const Fault&) { d.missing = Missing::kUpperExperts; },
        "experts from E/2 are not summed: a rank's part is missing", sum);
    add_one(
        "ranks-lower-experts-missing", [](Deviation& d, const Fault&) { d.missing = Missing::kLowerExperts; },
        "experts below E/2 are not summed: a rank's part is missing", sum);
    add_one(
        "ranks-upper-inner-missing", [](Deviation& d, const Fault&) { d.missing = Missing::kUpperInner; },
        "intermediate channels from I/2 are not summed: a rank's part is missing", sum);
    add_one(
        "ranks-lower-inner-missing", [](Deviation& d, const Fault&) { d.missing = Missing::kLowerInner; },
        "intermediate channels below I/2 are not summed: a rank's part is missing", sum);
    if (subject_.tokens < 2) return;
    const std::string rows = "the permutation of rows before, or its inverse after the experts";
    add_one(
        "tokens-next", [](Deviation& d, const Fault&) { d.first.tokens = TokenOrder::kNext; },
        "row t of the output is token t + 1's", rows);
    add_one(
        "tokens-previous", [](Deviation& d, const Fault&) { d.first.tokens = TokenOrder::kPrevious; },
        "row t of the output is token t - 1's", rows);
    add_one(
        "tokens-reversed", [](Deviation& d, const Fault&) { d.first.tokens = TokenOrder::kReversed; },
        "the output's rows are in reverse order", rows);
    if (subject_.top_k > 1) {
      add_one(
          "tokens-slot-modulo", [](Deviation& d, const Fault&) { d.first.tokens = TokenOrder::kSlotModulo; },
          "experts are fed with token slot % T instead of slot / K", rows);
    }
  }

  const Subject& subject_;
  std::vector<Fault> faults_;
};

constexpr std::string_view kWrongCode = "e2m1-code-";

}  // namespace

std::string_view to_string(FaultPlace place) {
  constexpr std::array<std::string_view, 6> kNames = {"weights", "staging", "activation",
                                                      "routing", "experts", "combine"};
  return kNames[static_cast<size_t>(place)];
}

std::vector<Fault> known_faults(const Subject& subject) {
  return FaultTable(subject).make();
}

Fault wrong_code_fault(int code, float value) {
  Fault fault;
  fault.id = fmt::format("{}{}-as-{}", kWrongCode, code, value);
  fault.sentence = fmt::format("e2m1's code {} is decoded as {} instead of {}", code, value,
                               decode_e2m1(static_cast<uint8_t>(code)));
  fault.remedy = "the e2m1 table: 0, 0.5, 1, 1.5, 2, 3, 4, 6";
  fault.place = FaultPlace::kWeights;
  fault.code = code;
  fault.value = value;
  fault.apply = [](Deviation& d, const Fault& f) {
    for (WeightReading* reading : {&d.first.reading, &d.down}) {
      reading->wrong_code = f.code;
      reading->wrong_value = f.value;
    }
  };
  return fault;
}

bool is_wrong_code(const Fault& fault) {
  return fault.id.starts_with(kWrongCode);
}

std::vector<float> wrong_values_of(int code) {
  std::vector<float> values;
  for (const float value : {0.0f, 0.25f, 0.5f, 0.75f, 1.0f, 1.25f, 1.5f, 1.75f, 2.0f, 2.5f, 3.0f, 3.5f, 4.0f,
                            4.5f, 5.0f, 6.0f, 7.0f, 8.0f}) {
    if (value != decode_e2m1(static_cast<uint8_t>(code))) values.push_back(value);
  }
  return values;
}

bool can_be_combined(const Fault& a, const Fault& b) {
  Deviation ab, ba, only_a, only_b;
  a.apply_to(ab);
  b.apply_to(ab);
  b.apply_to(ba);
  a.apply_to(ba);
  a.apply_to(only_a);
  b.apply_to(only_b);
  return ab == ba && !(ab == only_a) && !(ab == only_b);
}

}  // namespace fourfold::diagnosis
