// A MoE layer on Hopper: permute, stage, GEMM with activation, restage, GEMM, combine.
#pragma once

#include <memory>

#include "fourfold/moe_layer.h"

namespace fourfold::sm90 {

/// Tokens are taken in parts of at most this many slots, so that the workspace stays bounded: 8192 tokens at
/// top-8.
inline constexpr int64_t kMostRowsAtOnce = 65536;

/// A layer on the current device. `weights`, `config` and `options` fit each other and are supported.
///
/// Calls enqueue on their stream alone. Kernels are chosen by the plan, not by the number of tokens of a
/// call, so that a row's result does not depend on what else is in the batch. Taps need all tokens in one
/// part (kMostRowsAtOnce), and those of h and z 16-byte aligned rows; else Error.
std::unique_ptr<MoeLayer> make_layer(const ExpertWeights& weights, const LayerConfig& config,
                                     const LayerOptions& options);

}  // namespace fourfold::sm90
