// What goes through a layer in a test: hidden states and a routing, made or read.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "fourfold/routing.h"
#include "fourfold/tensor.h"

namespace fourfold {

struct LayerInputs {
  int64_t tokens = 0;
  int64_t hidden = 0;
  int64_t top_k = 0;
  std::vector<Bf16> x;              ///< [T, H]
  std::vector<int32_t> topk_ids;    ///< [T, K]; empty until routed
  std::vector<float> topk_weights;  ///< [T, K]
  std::vector<int64_t> token_ids;   ///< [T], for routers that go by them; empty where unknown
  std::string x_origin, routing_origin;
  bool made_up = false;  ///< random, not what some calibration has seen

  MatrixView<const Bf16> x_view() const { return {x.data(), tokens, hidden}; }
  Routing routing() const;
};

/// N(0, 1) hidden states; `outliers`: heavy tails, and one channel in 64 ten to thirty times as large.
LayerInputs make_inputs(int64_t tokens, int64_t hidden, uint64_t seed, bool outliers);

/// Each token to `top_k` different experts out of `experts`, uniformly, with positive weights that sum to 1.
void route_at_random(LayerInputs& inputs, int64_t experts, int64_t top_k, uint64_t seed);

/// Reads `x` [T, H] (bf16, f16 or f32: rounded to bf16), and `topk_ids` and `topk_weights` [T, K], and
/// `token_ids` [T], where they are. At most `max_tokens` tokens (0: all). Throws Error naming file, tensor,
/// expected and found.
LayerInputs read_inputs(const std::filesystem::path& path, int64_t hidden, int64_t max_tokens);

/// The routing of such a file alone, `topk_ids` and `topk_weights`: x is left empty. Throws Error where the
/// file has none.
LayerInputs read_routing(const std::filesystem::path& path);

/// Writes what read_inputs reads.
void write_inputs(const std::filesystem::path& path, const LayerInputs& inputs);

}  // namespace fourfold
