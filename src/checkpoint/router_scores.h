// Names of the routers' score functions, for options and reports.
#pragma once

#include <array>
#include <string_view>
#include <utility>

#include "fourfold/router.h"

namespace fourfold {

inline constexpr std::array<std::pair<std::string_view, RouterScore>, 4> kRouterScores = {{
    {"softmax", RouterScore::kSoftmax},
    {"softmax-of-top-k", RouterScore::kSoftmaxOfTopK},
    {"sigmoid", RouterScore::kSigmoid},
    {"sqrt-softplus", RouterScore::kSqrtSoftplus},
}};

}  // namespace fourfold
