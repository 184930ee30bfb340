#include "tools/input_routing.h"

#include <algorithm>
#include <optional>

#include "base/fail.h"
#include "tools/random.h"

namespace fourfold {
namespace {

class InputRouter {
 public:
  InputRouter(const RoutingTask& task, LayerInputs& inputs) : task_(task), inputs_(inputs) {}

  std::vector<std::string> run() {
    if (!inputs_.topk_ids.empty() || route_by_checkpoint()) {
      map_expert_ids();
    } else {
      route_uniformly();
    }
    note_idle_experts();
    return std::move(notes_);
  }

 private:
  bool tests_all_experts() const {
    return task_.experts.weights.count() == task_.experts.experts_in_checkpoint;
  }

  /// The checkpoint's own router, on the tokens at hand. Not for made-up tokens on a part of the experts:
  /// most would go elsewhere.
  bool route_by_checkpoint() {
    require_rule();
    if (inputs_.made_up && !tests_all_experts() && !task_.router_given) return false;
    std::string why_not;
    const auto router =
        load_router(task_.checkpoint, task_.layer, task_.experts.experts_in_checkpoint,
                    task_.experts.weights.hidden, *task_.rules.router, task_.rules.router_bias, why_not);
    if (!router) {
      if (task_.router_given) reject("--router", "the router's weight in the checkpoint", why_not);
      why_no_router_ = why_not;
      return false;
    }
    if (router->hash_table) require_token_ids(*router);
    const RoutingDecision decision = apply(*router);
    inputs_.top_k = decision.top_k;
    inputs_.topk_ids = decision.topk_ids;
    inputs_.topk_weights = decision.topk_weights;
    inputs_.routing_origin =
        fmt::format("{}: {}", router->name, describe_router(task_.rules, router->hash_table != nullptr));
    return true;
  }

  void require_rule() const {
    if (task_.rules.router) return;
    fail(ErrorCode::kUnsupported,
         "{}: expected a known family ({}), which tells how its router works, found {}; give --router (e.g. "
         "softmax,top-k=8), or topk_ids and topk_weights in --input",
         task_.checkpoint.config().file, known_families(), identity(task_.checkpoint.config()));
  }

  /// Hash routing goes by token ids: the input's, or made up with x.
  void require_token_ids(const CheckpointRouter& router) {
    const int64_t vocabulary = router.weights.experts_of_token.rows;
    if (inputs_.token_ids.empty() && inputs_.made_up) {
      for (int64_t token = 0; token < inputs_.tokens; ++token) {
        Random random(task_.seed, Random::Purpose::kTokenId, static_cast<uint64_t>(token));
        inputs_.token_ids.push_back(random.below(vocabulary));
      }
    }
    if (inputs_.token_ids.empty()) {
      reject(
          inputs_.x_origin,
          fmt::format("'token_ids' [T] beside x, since {} routes by token id; or topk_ids and topk_weights",
                      router.name),
          "none of them");
    }
    for (const int64_t id : inputs_.token_ids) {
      if (id >= 0 && id < vocabulary) continue;
      reject(fmt::format("{}: token_ids", inputs_.x_origin),
             fmt::format("0 to {}, the rows of '{}.tid2eid'", vocabulary - 1, router.name), id);
    }
  }

  /// Errors name who gave the rule: --router, or the checkpoint, whose config then does not fit its tensors.
  RoutingDecision apply(const CheckpointRouter& router) const {
    try {
      return route(router.config, router.weights, inputs_.x_view(), inputs_.token_ids);
    } catch (const Error& error) {
      fail(ErrorCode::kBadFile, "{}: {}; give topk_ids and topk_weights in --input",
           task_.router_given ? "--router" : task_.checkpoint.config().file, error.what());
    }
  }

  void route_uniformly() {
    if (!task_.may_be_random) {
      reject(inputs_.x_origin,
             "topk_ids and topk_weights beside x, or a router in the checkpoint, since experts see what the "
             "router sends them",
             why_no_router_);
    }
    const int64_t top_k = task_.rules.router->top_k;
    if (top_k < 1) {
      const auto found = task_.checkpoint.config().top_k;
      fail(ErrorCode::kInvalidArgument,
           "{}: expected num_experts_per_tok from 1, found {}; give topk_ids and topk_weights in --input, or "
           "--router with top-k",
           task_.checkpoint.config().file, found ? std::to_string(*found) : "none");
    }
    const int64_t experts = task_.experts.weights.count();
    route_at_random(inputs_, experts, std::min(top_k, experts), task_.seed);
    if (!why_no_router_.empty()) inputs_.routing_origin += fmt::format(" ({})", why_no_router_);
  }

  /// Expert numbers of the checkpoint -> positions among the experts under test; -1 for the others.
  void map_expert_ids() {
    const std::vector<int64_t>& under_test = task_.experts.expert_ids;
    int64_t left_out = 0;
    for (int32_t& id : inputs_.topk_ids) {
      if (id >= task_.experts.experts_in_checkpoint) {
        reject(fmt::format("{}: topk_ids", inputs_.x_origin),
               fmt::format("expert numbers below {}", task_.experts.experts_in_checkpoint), id);
      }
      const auto position = std::lower_bound(under_test.begin(), under_test.end(), id);
      const bool present = position != under_test.end() && *position == id;
      left_out += !present;
      id = present ? static_cast<int32_t>(position - under_test.begin()) : int32_t{kAbsentExpert};
    }
    if (left_out > 0) {
      notes_.push_back(fmt::format("{} slots go to experts that are not under test", left_out));
    }
  }

  void note_idle_experts() {
    const Permutation permutation = permute_by_expert(inputs_.routing(), task_.experts.weights.count());
    int64_t idle = 0;
    for (size_t e = 0; e + 1 < permutation.group_offsets.size(); ++e) {
      idle += permutation.group_offsets[e] == permutation.group_offsets[e + 1];
    }
    if (idle > 0) {
      notes_.push_back(fmt::format("{} of {} experts get no token: only their weights are compared", idle,
                                   task_.experts.weights.count()));
    }
  }

  const RoutingTask& task_;
  LayerInputs& inputs_;
  std::string why_no_router_;  // empty: there is one, or none was looked for
  std::vector<std::string> notes_;
};

}  // namespace

std::vector<std::string> route_inputs(const RoutingTask& task, LayerInputs& inputs) {
  return InputRouter(task, inputs).run();
}

}  // namespace fourfold
