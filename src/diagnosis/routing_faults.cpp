// Known faults of routing, of who computes what, and of sums (faults.h).
#include <fmt/format.h>

#include "diagnosis/fault_list.h"

namespace fourfold::diagnosis {
namespace {

class RoutingFaults : FaultList {
 public:
  RoutingFaults(const Subject& subject, std::vector<Fault>& faults) : FaultList(subject, faults) {}

  void add_all() {
    add_weight_use_faults();
    add_expert_faults();
    add_combine_faults();
  }

 private:
  void add_weight_use_faults() {
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
    add_one(
        "expert-next-in-gemms",
        [](Deviation& d, const Fault&) {
          d.first.expert_map = ExpertMap::kNext;
          d.first.own_input_scales = true;
        },
        "every expert's GEMMs take the weights of the next one, activations are staged for its own",
        "the expert index of the kernel: off by one")
        .needs_nvfp4_staging = true;
    add_one(
        "expert-previous-in-gemms",
        [](Deviation& d, const Fault&) {
          d.first.expert_map = ExpertMap::kPrevious;
          d.first.own_input_scales = true;
        },
        "every expert's GEMMs take the weights of the one before, activations are staged for its own",
        "the expert index of the kernel: off by one")
        .needs_nvfp4_staging = true;
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
          fmt::format("padding-rows-read-{}", tile),
          [](Deviation& d, const Fault& f) { d.first.rows_padded_to = f.code; },
          fmt::format(
              "rows of x lie in groups that are padded to {}, and are read as if they were not: padding "
              "and other experts' rows",
              tile),
          "group offsets of the first GEMM: with padding on both sides, or on none")
          .code = tile;
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
};

}  // namespace

void add_routing_faults(const Subject& subject, std::vector<Fault>& faults) {
  RoutingFaults(subject, faults).add_all();
}

}  // namespace fourfold::diagnosis
