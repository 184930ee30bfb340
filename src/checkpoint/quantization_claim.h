// What a config claims of the experts' quantization, and how that compares with their tensors.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include <string>
#include <string_view>
#include <vector>

#include "fourfold/checkpoint.h"

namespace fourfold {

/// The claim of config.json's `quantization_config`, or of hf_quant_config.json's `quantization`, as far as
/// it is understood: members of another type than expected claim nothing.
QuantizationClaim read_claim(const nlohmann::json& object);

/// Disagreements between `claim` and the routed experts of a layer, for ExpertLayer::notes. `up`: the name of
/// an expert's up matrix below the expert's, e.g. "up_proj".
std::vector<std::string> compare_claim(const QuantizationClaim& claim, const ExpertLayer& layer,
                                       std::string_view up);

}  // namespace fourfold
