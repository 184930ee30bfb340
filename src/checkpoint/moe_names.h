// Where models keep the tensors of their MoE layers. docs/formats.md, section 3.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "fourfold/checkpoint.h"

namespace fourfold {

/// Names inside a layer: everything of its MoE block starts with "<layers>L<block>".
struct BlockNames {
  std::string_view block;           ///< between the layer's number and what follows, e.g. ".mlp."
  std::string_view gate, up, down;  ///< linears of an expert, usually
};

inline constexpr std::array<BlockNames, 5> kBlockNames = {{
    {".mlp.", "gate_proj", "up_proj", "down_proj"},           // Qwen, DeepSeek-V3, GLM, gpt-oss
    {".block_sparse_moe.", "w1", "w3", "w2"},                 // Mixtral
    {".ffn.", "w1", "w3", "w2"},                              // DeepSeek-V4
    {".feed_forward.", "gate_proj", "up_proj", "down_proj"},  // Llama-4
    {".mixer.", "gate_proj", "up_proj", "down_proj"},         // Nemotron-H, whose experts have no gate
}};

/// What stands before a layer's number: the language models of multimodal ones are nested.
inline constexpr std::array<std::string_view, 5> kBeforeLayer = {
    "model.layers.", "layers.", "model.language_model.layers.", "language_model.model.layers.",
    "backbone.layers."};

/// Children of an MoE block.
inline constexpr std::string_view kExperts = "experts.";
inline constexpr std::array<std::string_view, 2> kRouters = {"gate.", "router."};
inline constexpr std::array<std::string_view, 2> kSharedExperts = {"shared_experts.", "shared_expert."};
inline constexpr std::string_view kSharedGate = "shared_expert_gate.";

/// An MoE block that is there: it has tensors of experts.
struct MoeBlock {
  std::string prefix;  ///< e.g. "model.layers.3.mlp."
  BlockNames names;    ///< as this checkpoint has them
};

/// The block of `layer`. Throws Error, naming the layers that have one, where it has none.
MoeBlock find_block(const Checkpoint& checkpoint, int64_t layer);

/// The number that `text` starts with, written as numbers are, if it is followed by `stop`. At most nine
/// digits.
std::optional<int64_t> leading_number(std::string_view text, char stop);

/// Names of the tensors that start with `prefix`.
std::vector<const Tensor*> tensors_under(const Checkpoint& checkpoint, std::string_view prefix);

}  // namespace fourfold
