// One MoE layer on the CPU.
#pragma once

#include <memory>
#include <string>

#include "cpu/kernels.h"
#include "fourfold/moe_layer.h"

namespace fourfold::cpu {

/// Why the backend can't compute this layer this way; empty when it can.
std::string why_unsupported(const ExpertWeights& weights, const LayerOptions& options);

/// Packs the weights. `reason` says why these kernels. The arguments fit each other and are supported.
std::unique_ptr<MoeLayer> make_layer(const Kernels& kernels, const std::string& reason,
                                     const ExpertWeights& weights, const LayerConfig& config,
                                     const LayerOptions& options);

}  // namespace fourfold::cpu
