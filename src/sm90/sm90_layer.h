// A MoE layer on Hopper: permute, stage, GEMM with activation, restage, GEMM, combine.
#pragma once

#include <memory>

#include "fourfold/moe_layer.h"

namespace fourfold::sm90 {

/// A layer on the current device (cuda/expert_layer.h).
std::unique_ptr<MoeLayer> make_layer(const ExpertWeights& weights, const LayerConfig& config,
                                     const LayerOptions& options);

}  // namespace fourfold::sm90
