// The router of the planted engine.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "tools/planted_parts.h"

namespace fourfold::planted {
namespace {

using diagnosis::Subject;

class Router {
 public:
  Router(const Subject& subject, const Faults& faults)
      : subject_(subject), faults_(faults), experts_(subject.experts()) {}

  Routes route() {
    routes_.ids.assign(subject_.topk_ids.begin(), subject_.topk_ids.end());
    routes_.weights.assign(subject_.topk_weights.begin(), subject_.topk_weights.end());
    if (changes_router()) {
      for (int64_t token = 0; token < subject_.tokens; ++token) route_token(token);
    }
    const auto top_k = static_cast<std::ptrdiff_t>(subject_.top_k);
    for (std::ptrdiff_t first = 0; first < static_cast<std::ptrdiff_t>(routes_.ids.size()); first += top_k) {
      if (has("weights-reversed"))
        std::reverse(routes_.weights.begin() + first, routes_.weights.begin() + first + top_k);
      if (has("ids-sorted")) std::sort(routes_.ids.begin() + first, routes_.ids.begin() + first + top_k);
    }
    const float factor = subject_.router ? subject_.router->config.scaling_factor : 1.0f;
    for (float& weight : routes_.weights) {
      if (has("scaling-factor-missing")) weight /= factor;
      if (has("scaling-factor-twice")) weight *= factor;
    }
    return std::move(routes_);
  }

 private:
  bool has(std::string_view id) const { return faults_.has(id); }
  bool changes_router() const { return faults_.find_prefix("router-") != nullptr; }

  std::vector<float> scores(int64_t token, bool softmax_of_chosen) const {
    const auto& router = *subject_.router;
    std::vector<float> result(router.logits.begin() + token * experts_,
                              router.logits.begin() + (token + 1) * experts_);
    RouterScore score = router.config.score;
    if (has("router-score")) {
      score = score == RouterScore::kSoftmax ? RouterScore::kSigmoid : RouterScore::kSoftmax;
    }
    if (score == RouterScore::kSoftmaxOfTopK && !softmax_of_chosen) return result;
    float sum = 0.0f;
    const float largest = *std::max_element(result.begin(), result.end());
    for (const float logit : result) sum += std::exp(logit - largest);
    for (float& logit : result) {
      if (score == RouterScore::kSigmoid) logit = 1.0f / (1.0f + std::exp(-logit));
      if (score == RouterScore::kSqrtSoftplus) logit = std::sqrt(std::log1p(std::exp(logit)));
      if (score == RouterScore::kSoftmax || score == RouterScore::kSoftmaxOfTopK)
        logit = std::exp(logit - largest) / sum;
    }
    return result;
  }

  void route_token(int64_t token) {
    const auto& router = *subject_.router;
    const std::vector<float> own = scores(token, false);
    std::vector<float> biased = own;
    for (size_t e = 0; !router.correction_bias.empty() && !has("router-bias-ignored") && e < own.size();
         ++e) {
      biased[e] += router.correction_bias[e];
    }
    std::vector<int32_t> chosen(static_cast<size_t>(subject_.top_k));
    if (router.by_token_id) {
      std::copy_n(subject_.topk_ids.begin() + token * subject_.top_k, subject_.top_k, chosen.begin());
    } else {
      chosen = choose(biased, router.config);
    }
    const bool whole = has("router-score") && router.config.score == RouterScore::kSoftmaxOfTopK;
    const std::vector<float> weighed = whole                           ? scores(token, true)
                                       : has("router-bias-in-weights") ? biased
                                                                       : own;
    bool renormalises = router.config.renormalise != has("router-renormalise");
    if (router.config.score == RouterScore::kSoftmaxOfTopK) renormalises = false;
    float sum = 0.0f;
    for (const int32_t id : chosen) sum += weighed[static_cast<size_t>(id)];
    for (size_t k = 0; k < chosen.size(); ++k) {
      const size_t slot = static_cast<size_t>(token * subject_.top_k) + k;
      routes_.ids[slot] = chosen[k];
      routes_.weights[slot] = weighed[static_cast<size_t>(chosen[k])] / (renormalises ? sum : 1.0f) *
                              router.config.scaling_factor;
    }
  }

  std::vector<int32_t> choose(std::vector<float> selection, const RouterConfig& config) const {
    const auto count = selection.size();
    if (config.groups > 1 && !has("router-groups-ignored")) {
      const size_t size = count / static_cast<size_t>(config.groups);
      std::vector<std::pair<float, size_t>> groups;
      for (size_t first = 0; first < count; first += size) {
        std::vector<float> sorted(selection.begin() + static_cast<std::ptrdiff_t>(first),
                                  selection.begin() + static_cast<std::ptrdiff_t>(first + size));
        std::sort(sorted.rbegin(), sorted.rend());
        groups.emplace_back(-(sorted[0] + (size > 1 ? sorted[1] : 0.0f)), first);
      }
      std::sort(groups.begin(), groups.end());
      for (size_t g = static_cast<size_t>(config.top_groups); g < groups.size(); ++g) {
        std::fill_n(selection.begin() + static_cast<std::ptrdiff_t>(groups[g].second), size, -INFINITY);
      }
    }
    std::vector<int32_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return selection[static_cast<size_t>(a)] > selection[static_cast<size_t>(b)];
    });
    order.resize(static_cast<size_t>(subject_.top_k));
    return order;
  }

  const Subject& subject_;
  const Faults& faults_;
  int64_t experts_;
  Routes routes_;
};

}  // namespace

Routes route_tokens(const Subject& subject, const Faults& faults) {
  return Router(subject, faults).route();
}

}  // namespace fourfold::planted
