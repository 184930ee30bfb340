// Routers as plain loops over tokens and experts.
#include "fourfold/router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/fail.h"
#include "base/thread_scratch.h"

namespace fourfold {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

std::vector<int32_t> all_indices(size_t count) {
  std::vector<int32_t> indices(count);
  std::iota(indices.begin(), indices.end(), 0);
  return indices;
}

/// Those `count` of the `candidates`, ascending indices, that have the largest scores, best first; the lower
/// index wins a tie, and NaN loses to everything.
std::vector<int32_t> select_largest(std::span<const float> scores, std::vector<int32_t> candidates,
                                    int64_t count) {
  const auto rank = [&](int32_t i) {
    const float score = scores[static_cast<size_t>(i)];
    return std::isnan(score) ? kNever : score;
  };
  std::stable_sort(candidates.begin(), candidates.end(),
                   [&](int32_t a, int32_t b) { return rank(a) > rank(b); });
  candidates.resize(static_cast<size_t>(count));
  return candidates;
}

/// exp(logit - largest) / sum, rounded to float32.
std::vector<float> softmax(std::span<const float> logits) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  std::vector<double> powers(logits.size());
  std::transform(logits.begin(), logits.end(), powers.begin(),
                 [&](float x) { return std::exp(double{x} - largest); });
  const double sum = std::accumulate(powers.begin(), powers.end(), 0.0);
  std::vector<float> scores(logits.size());
  std::transform(powers.begin(), powers.end(), scores.begin(),
                 [&](double p) { return static_cast<float>(p / sum); });
  return scores;
}

/// One score an expert; logits themselves where the softmax comes after the selection.
std::vector<float> scores_of(RouterScore score, std::span<const float> logits) {
  if (score == RouterScore::kSoftmax) return softmax(logits);
  std::vector<float> scores(logits.begin(), logits.end());
  if (score == RouterScore::kSoftmaxOfTopK) return scores;
  for (float& value : scores) {
    const double x = value;
    if (score == RouterScore::kSigmoid) {
      value = static_cast<float>(1.0 / (1.0 + std::exp(-x)));
    } else {
      const double softplus = std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x)));  // without overflow
      value = static_cast<float>(std::sqrt(softplus));
    }
  }
  return scores;
}

/// The experts that can be selected: those of the best groups, whatever their own scores are.
std::vector<int32_t> candidates_of(const RouterConfig& config, std::span<const float> selection) {
  if (config.groups <= 1) return all_indices(selection.size());
  const auto size = selection.size() / static_cast<size_t>(config.groups);
  std::vector<float> group_scores;
  for (int64_t group = 0; group < config.groups; ++group) {
    const auto members = selection.subspan(static_cast<size_t>(group) * size, size);
    float sum = 0.0f;
    for (const int32_t best :
         select_largest(members, all_indices(size), std::min<int64_t>(2, static_cast<int64_t>(size)))) {
      sum += members[static_cast<size_t>(best)];
    }
    group_scores.push_back(sum);
  }
  std::vector<int32_t> kept =
      select_largest(group_scores, all_indices(group_scores.size()), config.top_groups);
  std::sort(kept.begin(), kept.end());
  std::vector<int32_t> candidates;
  for (const int32_t group : kept) {
    for (size_t member = 0; member < size; ++member) {
      candidates.push_back(static_cast<int32_t>(static_cast<size_t>(group) * size + member));
    }
  }
  return candidates;
}

/// Weights of the selected experts, in their order.
std::vector<float> weights_of(const RouterConfig& config, std::span<const float> scores,
                              std::span<const int32_t> selected) {
  std::vector<float> weights;
  for (const int32_t expert : selected) weights.push_back(scores[static_cast<size_t>(expert)]);
  double divisor = 1.0;
  if (config.score == RouterScore::kSoftmaxOfTopK) {
    weights = softmax(weights);
  } else if (config.renormalise) {
    divisor = std::accumulate(weights.begin(), weights.end(), 0.0) + 1e-20;
  }
  for (float& weight : weights) weight = static_cast<float>(weight / divisor * config.scaling_factor);
  return weights;
}

void validate(const RouterConfig& config, int64_t experts) {
  if (config.groups < 1 || experts % config.groups != 0) {
    reject("router: groups", fmt::format("a divisor of {} experts", experts), config.groups);
  }
  if (config.top_groups < 1 || config.top_groups > config.groups) {
    reject("router: top groups", fmt::format("1 to {}", config.groups), config.top_groups);
  }
  const int64_t selectable = experts / config.groups * config.top_groups;
  if (config.top_k < 1 || config.top_k > selectable) {
    reject("router: top-k", fmt::format("1 to {}, the experts that can be selected", selectable),
           config.top_k);
  }
}

std::span<const float> row_of(MatrixView<const float> logits, int64_t token) {
  return {logits.row(token), static_cast<size_t>(logits.cols)};
}

void append(RoutingDecision& decision, std::span<const int32_t> ids, std::span<const float> weights) {
  decision.topk_ids.insert(decision.topk_ids.end(), ids.begin(), ids.end());
  decision.topk_weights.insert(decision.topk_weights.end(), weights.begin(), weights.end());
}

std::vector<float> decode_vector(const std::optional<DenseView>& vector, const char* what, int64_t size) {
  if (!vector) return {};
  if (vector->rows != 1 || vector->cols != size) {
    reject(fmt::format("router: {}", what), shape_text(1, size), shape_text(vector->rows, vector->cols));
  }
  std::vector<float> values(static_cast<size_t>(size));
  decode_row(*vector, 0, values.data());
  return values;
}

}  // namespace

Routing RoutingDecision::view() const {
  return {MatrixView<const int32_t>(topk_ids.data(), tokens, top_k), {topk_weights.data(), tokens, top_k}};
}

std::vector<float> router_logits(MatrixView<const Bf16> x, const RouterWeights& weights) {
  const int64_t experts = weights.weight.rows, hidden = weights.weight.cols;
  if (x.cols != hidden) reject("router: x", shape_text(x.rows, hidden), shape_text(x.rows, x.cols));
  const std::vector<float> bias = decode_vector(weights.bias, "bias", experts);
  std::vector<float> logits(static_cast<size_t>(x.rows * experts));
  ThreadScratch scratch(hidden);
#pragma omp parallel
  {
    const std::span<float> row = scratch.mine();
#pragma omp for schedule(static)
    for (int64_t expert = 0; expert < experts; ++expert) {
      decode_row(weights.weight, expert, row.data());
      for (int64_t token = 0; token < x.rows; ++token) {
        float sum = 0.0f;
        for (int64_t h = 0; h < hidden; ++h)
          sum += static_cast<float>(x(token, h)) * row[static_cast<size_t>(h)];
        const float shift = bias.empty() ? 0.0f : bias[static_cast<size_t>(expert)];
        logits[static_cast<size_t>(token * experts + expert)] = sum + shift;
      }
    }
  }
  return logits;
}

RoutingDecision route(const RouterConfig& config, MatrixView<const float> logits,
                      std::span<const float> correction_bias) {
  validate(config, logits.cols);
  if (!correction_bias.empty() && static_cast<int64_t>(correction_bias.size()) != logits.cols) {
    reject("router: correction bias", logits.cols, correction_bias.size());
  }
  RoutingDecision decision{logits.rows, config.top_k, {}, {}};
  for (int64_t token = 0; token < logits.rows; ++token) {
    const std::vector<float> scores = scores_of(config.score, row_of(logits, token));
    std::vector<float> selection = scores;
    for (size_t e = 0; e < correction_bias.size(); ++e) selection[e] += correction_bias[e];
    const std::vector<int32_t> selected =
        select_largest(selection, candidates_of(config, selection), config.top_k);
    append(decision, selected, weights_of(config, scores, selected));
  }
  return decision;
}

RoutingDecision weigh(const RouterConfig& config, MatrixView<const float> logits,
                      MatrixView<const int64_t> topk_ids) {
  if (topk_ids.rows != logits.rows || topk_ids.cols != config.top_k) {
    reject("router: given ids", shape_text(logits.rows, config.top_k),
           shape_text(topk_ids.rows, topk_ids.cols));
  }
  RoutingDecision decision{logits.rows, config.top_k, {}, {}};
  for (int64_t token = 0; token < logits.rows; ++token) {
    std::vector<int32_t> selected;
    for (int64_t k = 0; k < config.top_k; ++k) {
      const int64_t expert = topk_ids(token, k);
      if (expert < 0 || expert >= logits.cols) {
        reject(fmt::format("router: expert of token {}", token), fmt::format("0 to {}", logits.cols - 1),
               expert);
      }
      selected.push_back(static_cast<int32_t>(expert));
    }
    append(decision, selected, weights_of(config, scores_of(config.score, row_of(logits, token)), selected));
  }
  return decision;
}

RoutingDecision route(const RouterConfig& config, const RouterWeights& weights, MatrixView<const Bf16> x,
                      std::span<const int64_t> token_ids) {
  const std::vector<float> logits = router_logits(x, weights);
  return route(config, weights, MatrixView<const float>(logits.data(), x.rows, weights.weight.rows),
               token_ids);
}

RoutingDecision route(const RouterConfig& config, const RouterWeights& weights,
                      MatrixView<const float> logits, std::span<const int64_t> token_ids) {
  const int64_t experts = weights.weight.rows;
  if (logits.cols != experts) {
    reject("router: logits", shape_text(logits.rows, experts), shape_text(logits.rows, logits.cols));
  }
  const MatrixView<const int64_t>& table = weights.experts_of_token;
  if (table.empty())
    return route(config, logits, decode_vector(weights.correction_bias, "correction bias", experts));

  if (static_cast<int64_t>(token_ids.size()) != logits.rows) {
    reject("router: token ids for hash routing", logits.rows, token_ids.size());
  }
  std::vector<int64_t> ids;
  for (const int64_t token_id : token_ids) {
    if (token_id < 0 || token_id >= table.rows) {
      reject("router: token id", fmt::format("0 to {}, the rows of its table", table.rows - 1), token_id);
    }
    ids.insert(ids.end(), table.row(token_id), table.row(token_id) + table.cols);
  }
  return weigh(config, logits, {ids.data(), logits.rows, table.cols});
}

}  // namespace fourfold
