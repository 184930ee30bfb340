// What a diagnosis is about: a layer, what went into it, and what an engine made of that.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "fourfold/expert_weights.h"
#include "fourfold/moe_layer.h"
#include "fourfold/router.h"

namespace fourfold::diagnosis {

/// The layer's router on the tokens at hand.
struct RoutedBy {
  RouterConfig config;
  std::vector<float> logits;           ///< [T, E]
  std::vector<float> correction_bias;  ///< [E], or empty
  bool by_token_id = false;            ///< ids come from a hash table: those of the subject
};

/// A layer and its input. Expert ids are positions in `weights`.
struct Subject {
  const ExpertWeights* weights = nullptr;
  const ExpertWeights* layer_before = nullptr;  ///< the same of the neighbouring layers; null: not there
  const ExpertWeights* layer_after = nullptr;
  LayerConfig config;
  std::optional<RoutedBy> router;
  bool routing_given = false;  ///< ids and weights are the engine's own: routing faults are in them already

  int64_t tokens = 0, top_k = 0;
  std::span<const Bf16> x;              ///< [T, H]
  std::span<const int32_t> topk_ids;    ///< [T, K]; -1: elsewhere
  std::span<const float> topk_weights;  ///< [T, K]

  int64_t hidden() const { return config.hidden; }
  int64_t intermediate() const { return config.intermediate; }
  int64_t experts() const { return weights->count(); }
};

/// What an engine computed. Stages may be empty; their rows are slots, token * K + k.
struct Candidate {
  std::vector<float> output;      ///< [T, H]
  std::vector<float> h;           ///< [T*K, 2I], gate first ([T*K, I] without a gate), or empty
  std::vector<float> activation;  ///< [T*K, I], or empty
};

}  // namespace fourfold::diagnosis
