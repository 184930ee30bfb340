// The matrices of an expert, by the names that reports give them.
#pragma once

#include <array>

#include "fourfold/expert_weights.h"

namespace fourfold {

struct ExpertMatrix {
  const char* name;
  WeightView Expert::*member;
};

/// Where the activation has no gate, gate has no rows.
inline constexpr std::array<ExpertMatrix, 3> kExpertMatrices = {
    {{"gate", &Expert::gate}, {"up", &Expert::up}, {"down", &Expert::down}}};

}  // namespace fourfold
