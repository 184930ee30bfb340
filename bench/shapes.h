// Shapes of real models' expert layers, as data. Source: docs/formats.md, section 4.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace fourfold {

struct ModelShape {
  std::string_view name;
  int64_t experts, hidden, intermediate, top_k;
  int64_t layers;  ///< layers that hold experts, about
};

inline constexpr std::array<ModelShape, 6> kModelShapes = {{
    {"deepseek-v4-flash", 256, 4096, 2048, 6, 43},
    {"deepseek-v4-pro", 384, 7168, 3072, 6, 61},
    {"deepseek-v3", 256, 7168, 2048, 8, 58},
    {"qwen3-30b-a3b", 128, 2048, 768, 8, 48},
    {"gpt-oss-120b", 128, 2880, 2880, 4, 36},
    {"mixtral-8x7b", 8, 4096, 14336, 2, 32},
}};

}  // namespace fourfold
