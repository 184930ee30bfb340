// Routers: from hidden states, or logits, to topk_ids and topk_weights.
//
// Scores are computed in float64 and rounded to float32; selection compares float32 numbers and breaks ties
// by the lower expert index, everywhere. Weights come from the scores themselves, never from a biased score
// with the bias taken off.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "fourfold/export.h"
#include "fourfold/routing.h"
#include "fourfold/tensor.h"

namespace FOURFOLD_EXPORT fourfold {

/// What a logit becomes.
enum class RouterScore : uint8_t {
  kSoftmax,        ///< over all experts: Mixtral, Qwen3-MoE
  kSoftmaxOfTopK,  ///< selection on logits, softmax over the selected ones alone: gpt-oss
  kSigmoid,        ///< DeepSeek-V3, Llama-4
  kSqrtSoftplus,   ///< sqrt(log(1 + exp(logit))): DeepSeek-V4
};

struct RouterConfig {
  RouterScore score = RouterScore::kSoftmax;
  int64_t top_k = 0;
  /// Divide the selected scores by their sum (+ 1e-20). kSoftmaxOfTopK is normalised as it is.
  bool renormalise = true;
  float scaling_factor = 1.0f;  ///< multiplies the weights, after normalisation
  /// Group-limited selection (DeepSeek-V3): experts lie in `groups` equal groups, a group's score is the sum
  /// of its two best selection scores, and only the best `top_groups` groups take part. 1: no groups.
  int64_t groups = 1;
  int64_t top_groups = 1;
};

/// A router's tensors. Host views.
struct RouterWeights {
  DenseView weight;                          ///< [E, H]
  std::optional<DenseView> bias;             ///< [1, E], added to the logits: gpt-oss
  std::optional<DenseView> correction_bias;  ///< [1, E], added to the scores for selection alone: DeepSeek
  /// Hash routing (DeepSeek-V4, layers 0 to 2): the experts of every token id, [vocabulary, K]. Empty: none.
  MatrixView<const int64_t> experts_of_token;
};

/// An owned routing.
struct RoutingDecision {
  int64_t tokens = 0, top_k = 0;
  std::vector<int32_t> topk_ids;    ///< [T, K], best first
  std::vector<float> topk_weights;  ///< [T, K]

  Routing view() const;
};

/// logits [T, E] = x [T, H] . weight [E, H]^T + bias, float32 sums over ascending h. Throws Error when shapes
/// disagree.
std::vector<float> router_logits(MatrixView<const Bf16> x, const RouterWeights& weights);

/// Selects and weighs. `correction_bias` [E] or empty. Throws Error for a config that does not fit E (top_k
/// beyond the experts that can be selected, groups that do not divide E).
RoutingDecision route(const RouterConfig& config, MatrixView<const float> logits,
                      std::span<const float> correction_bias = {});

/// Hash routing: the ids are given, [T, K]; weights by the same formula. Throws Error for an id outside [0,
/// E).
RoutingDecision weigh(const RouterConfig& config, MatrixView<const float> logits,
                      MatrixView<const int64_t> topk_ids);

/// The whole router: logits, then hash routing by `token_ids` [T] where the router has a table, else
/// selection. Throws Error when the table is there and `token_ids` is not, or a token id is beyond it.
RoutingDecision route(const RouterConfig& config, const RouterWeights& weights, MatrixView<const Bf16> x,
                      std::span<const int64_t> token_ids = {});

/// The same from its logits [T, E].
RoutingDecision route(const RouterConfig& config, const RouterWeights& weights,
                      MatrixView<const float> logits, std::span<const int64_t> token_ids = {});

}  // namespace fourfold
