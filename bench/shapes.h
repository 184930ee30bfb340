// Shapes of real models' expert layers, as data: for `fourfold synthesize` and `fourfold bench`.
//
// Sources: docs/formats.md, section 4; for models that it does not list, their config.json.
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

inline constexpr std::array<ModelShape, 9> kModelShapes = {{
    {"deepseek-v4-flash", 256, 4096, 2048, 6, 43},
    {"deepseek-v4-pro", 384, 7168, 3072, 6, 61},
    {"deepseek-v3", 256, 7168, 2048, 8, 58},
    {"qwen3-30b-a3b", 128, 2048, 768, 8, 48},
    {"gpt-oss-120b", 128, 2880, 2880, 4, 36},
    {"mixtral-8x7b", 8, 4096, 14336, 2, 32},
    {"qwen3-235b-a22b", 128, 4096, 1536, 8, 94},
    {"kimi-k2", 384, 7168, 2048, 8, 60},
    {"gpt-oss-20b", 32, 2880, 2880, 4, 24},
}};

/// Short names of the shapes whose targets and peers the documentation of the Hopper backend lists.
struct ShapeAlias {
  std::string_view alias, name;
};
inline constexpr std::array<ShapeAlias, 3> kShapeAliases = {{
    {"A", "deepseek-v3"},
    {"B", "qwen3-30b-a3b"},
    {"C", "deepseek-v4-flash"},
}};

/// The shape of that name or alias; null where there is none.
constexpr const ModelShape* find_model_shape(std::string_view name) {
  for (const ShapeAlias& alias : kShapeAliases) {
    if (alias.alias == name) name = alias.name;
  }
  for (const ModelShape& shape : kModelShapes) {
    if (shape.name == name) return &shape;
  }
  return nullptr;
}

}  // namespace fourfold
