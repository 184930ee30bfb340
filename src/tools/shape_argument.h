// `--shape`: numbers, or names of bench/shapes.h.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fourfold {

/// An expert layer's shape under the name that reports use.
struct LayerShape {
  std::string name;  ///< of bench/shapes.h, or e.g. "16,64,48,2"
  int64_t experts = 0, hidden = 0, intermediate = 0, top_k = 0;
};

/// Names and aliases of bench/shapes.h, for help and messages.
std::string shape_names();

/// "E,H,I,K", or one name. Throws CLI::ValidationError for anything else; extents are not checked.
LayerShape parse_shape(const std::string& text);

/// "E,H,I,K", or names separated by commas.
std::vector<LayerShape> parse_shapes(const std::string& text);

}  // namespace fourfold
