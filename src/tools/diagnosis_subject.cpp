#include "tools/diagnosis_subject.h"

#include "base/fail.h"
#include "tools/input_routing.h"

namespace fourfold {
namespace {

/// A neighbour with the same shapes; none where it is not there, or of another kind.
std::optional<ExpertLayer> load_neighbour(const std::shared_ptr<const Checkpoint>& checkpoint,
                                          const SubjectSource& source, int64_t layer,
                                          const ExpertLayer& like) {
  if (layer < 0) return std::nullopt;
  try {
    ExpertLayer neighbour = load_experts(checkpoint, layer, {}, source.gate_up_order, source.scheme);
    const ExpertWeights &a = neighbour.weights, &b = like.weights;
    const bool alike = a.count() == b.count() && a.hidden == b.hidden && a.intermediate == b.intermediate &&
                       neighbour.scheme == like.scheme;
    if (alike) return neighbour;
  } catch (const Error&) {
    // dense layers, and the last one's successor
  }
  return std::nullopt;
}

}  // namespace

LoadedSubject::LoadedSubject(const SubjectSource& source, LayerInputs inputs) : inputs_(std::move(inputs)) {
  checkpoint_ = Checkpoint::open(source.checkpoint);
  layer_ = load_experts(checkpoint_, source.layer, {}, source.gate_up_order, source.scheme);
  if (inputs_.hidden != layer_.weights.hidden) {
    fail(ErrorCode::kInvalidArgument, "{}: x: expected [T, {}], the hidden size of {}, found [{}, {}]",
         inputs_.x_origin, layer_.weights.hidden, source.checkpoint, inputs_.tokens, inputs_.hidden);
  }
  before_ = load_neighbour(checkpoint_, source, source.layer - 1, layer_);
  after_ = load_neighbour(checkpoint_, source, source.layer + 1, layer_);
  rules_ = rules_of(checkpoint_->config(), source.overrides);
  subject_.config = layer_config(layer_, rules_);
  subject_.routing_given = !inputs_.topk_ids.empty();
  const RoutingTask task{*checkpoint_, source.layer, layer_, rules_, source.overrides.router.has_value(),
                         source.seed};
  notes_ = route_inputs(task, inputs_);
  subject_.config.top_k = inputs_.top_k;
  subject_.weights = &layer_.weights;
  if (before_) subject_.layer_before = &before_->weights;
  if (after_) subject_.layer_after = &after_->weights;
  subject_.tokens = inputs_.tokens;
  subject_.top_k = inputs_.top_k;
  subject_.x = inputs_.x;
  subject_.topk_ids = inputs_.topk_ids;
  subject_.topk_weights = inputs_.topk_weights;
  load_router_logits(source);
}

void LoadedSubject::load_router_logits(const SubjectSource& source) {
  if (!rules_.router) {
    why_no_router_ = "the model's family is not known, and no --router is given";
    return;
  }
  const auto router = load_router(*checkpoint_, source.layer, layer_.experts_in_checkpoint,
                                  layer_.weights.hidden, *rules_.router, rules_.router_bias, why_no_router_);
  if (!router) return;
  diagnosis::RoutedBy routed;
  routed.config = router->config;
  if (routed.config.top_k < 1) routed.config.top_k = inputs_.top_k;
  routed.by_token_id = router->hash_table != nullptr;
  if (routed.config.top_k != inputs_.top_k) {
    why_no_router_ =
        fmt::format("the router's top-{} is not the input's {}", routed.config.top_k, inputs_.top_k);
    return;
  }
  routed.logits = router_logits(inputs_.x_view(), router->weights);
  if (router->weights.correction_bias) {
    routed.correction_bias.resize(static_cast<size_t>(subject_.experts()));
    decode_row(*router->weights.correction_bias, 0, routed.correction_bias.data());
  }
  subject_.router = std::move(routed);
}

}  // namespace fourfold
