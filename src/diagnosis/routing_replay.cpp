#include "diagnosis/routing_replay.h"

#include <algorithm>
#include <cmath>

namespace fourfold::diagnosis {
namespace {

double log1p_exp(double x) {
  return x > 0.0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}

/// Scores of one token's selected experts; softmax over all of `logits`, or over the selected.
std::vector<double> scores_of(RouterScore score, std::span<const float> logits,
                              std::span<const int32_t> ids) {
  std::vector<double> scores;
  for (const int32_t id : ids) {
    const double logit = logits[static_cast<size_t>(id)];
    double sum = 0.0;
    switch (score) {
      case RouterScore::kSoftmax:
        for (const float other : logits) sum += std::exp(double{other} - logit);
        scores.push_back(1.0 / sum);
        break;
      case RouterScore::kSoftmaxOfTopK:
        for (const int32_t other : ids) sum += std::exp(double{logits[static_cast<size_t>(other)]} - logit);
        scores.push_back(1.0 / sum);
        break;
      case RouterScore::kSigmoid:
        scores.push_back(1.0 / (1.0 + std::exp(-logit)));
        break;
      case RouterScore::kSqrtSoftplus:
        scores.push_back(std::sqrt(log1p_exp(logit)));
        break;
    }
  }
  return scores;
}

RouterConfig changed_config(const RoutedBy& router, const RoutingChange& change) {
  RouterConfig config = router.config;
  if (change.renormalise) config.renormalise = *change.renormalise;
  if (change.score) config.score = *change.score;
  if (change.groups_ignored) config.groups = config.top_groups = 1;
  return config;
}

/// Weights of ids that are known, biased where the fault has it so.
void weigh_again(const RoutedBy& router, const RouterConfig& config, bool biased, int64_t top_k,
                 RoutedSlots& slots) {
  const auto experts =
      static_cast<int64_t>(router.logits.size()) * top_k / static_cast<int64_t>(slots.ids.size());
  const auto tokens = static_cast<int64_t>(slots.ids.size()) / top_k;
  for (int64_t token = 0; token < tokens; ++token) {
    const std::span ids(slots.ids.data() + token * top_k, static_cast<size_t>(top_k));
    if (std::any_of(ids.begin(), ids.end(), [](int32_t id) { return id < 0; })) continue;
    auto scores =
        scores_of(config.score, {router.logits.data() + token * experts, static_cast<size_t>(experts)}, ids);
    for (size_t k = 0; biased && k < scores.size(); ++k) {
      scores[k] += router.correction_bias[static_cast<size_t>(ids[k])];
    }
    double sum = 1e-20;
    for (const double score : scores) sum += score;
    const bool divides = config.renormalise && config.score != RouterScore::kSoftmaxOfTopK;
    for (size_t k = 0; k < scores.size(); ++k) {
      slots.weights[static_cast<size_t>(token * top_k) + k] =
          static_cast<float>(scores[k] / (divides ? sum : 1.0) * config.scaling_factor);
    }
  }
}

void pair_differently(WeightPairing pairing, int64_t top_k, RoutedSlots& slots) {
  for (size_t first = 0; first < slots.ids.size(); first += static_cast<size_t>(top_k)) {
    const auto ids = slots.ids.begin() + static_cast<std::ptrdiff_t>(first);
    const auto weights = slots.weights.begin() + static_cast<std::ptrdiff_t>(first);
    if (pairing == WeightPairing::kWeightsReversed) std::reverse(weights, weights + top_k);
    if (pairing == WeightPairing::kIdsSorted) std::sort(ids, ids + top_k);
  }
}

}  // namespace

RoutedSlots route_with(const Subject& subject, const RoutingChange& change) {
  RoutedSlots slots{{subject.topk_ids.begin(), subject.topk_ids.end()},
                    {subject.topk_weights.begin(), subject.topk_weights.end()}};
  if (change.needs_router()) {
    const RoutedBy& router = *subject.router;
    const RouterConfig config = changed_config(router, change);
    if (!router.by_token_id) {
      const std::vector<float> none;
      const RoutingDecision decision =
          route(config, {router.logits.data(), subject.tokens, subject.experts()},
                change.bias_ignored ? none : router.correction_bias);
      slots = {decision.topk_ids, decision.topk_weights};
    }
    if (router.by_token_id || change.bias_in_weights) {
      weigh_again(router, config, change.bias_in_weights, subject.top_k, slots);
    }
  }
  pair_differently(change.pairing, subject.top_k, slots);
  for (float& weight : slots.weights) weight *= change.factor;
  return slots;
}

double routing_distance(const RoutedSlots& a, const RoutedSlots& b, int64_t tokens, int64_t experts) {
  const size_t top_a = a.ids.size() / static_cast<size_t>(tokens),
               top_b = b.ids.size() / static_cast<size_t>(tokens);
  double difference = 0.0, norm = 0.0;
  for (size_t token = 0; token < static_cast<size_t>(tokens); ++token) {
    std::vector<double> mine(static_cast<size_t>(experts)), other(static_cast<size_t>(experts));
    const auto add = [&](const RoutedSlots& from, size_t top_k, std::vector<double>& to) {
      for (size_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
        if (from.ids[slot] >= 0) to[static_cast<size_t>(from.ids[slot])] += from.weights[slot];
      }
    };
    add(a, top_a, mine);
    add(b, top_b, other);
    for (size_t e = 0; e < mine.size(); ++e) {
      difference += (mine[e] - other[e]) * (mine[e] - other[e]);
      norm += other[e] * other[e];
    }
  }
  return norm == 0.0 ? (difference == 0.0 ? 0.0 : INFINITY) : std::sqrt(difference / norm);
}

}  // namespace fourfold::diagnosis
