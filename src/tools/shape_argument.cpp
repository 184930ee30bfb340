#include "tools/shape_argument.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>

#include "bench/shapes.h"
#include "tools/commands.h"

namespace fourfold {
namespace {

[[noreturn]] void bad_shape(const std::string& expected, const std::string& found) {
  throw CLI::ValidationError(
      "--shape",
      fmt::format("expected four numbers E,H,I,K (experts, hidden, intermediate, top-k) or {} of {}; "
                  "found {}",
                  expected, shape_names(), found));
}

bool parse_extents(const std::string& text, LayerShape& shape) {
  int64_t* const fields[] = {&shape.experts, &shape.hidden, &shape.intermediate, &shape.top_k};
  shape.name = text;
  return parse_numbers(text, fields);
}

std::optional<LayerShape> named_shape(const std::string& name) {
  const ModelShape* const model = find_model_shape(name);
  if (model == nullptr) return std::nullopt;
  return LayerShape{std::string(model->name), model->experts, model->hidden, model->intermediate,
                    model->top_k};
}

}  // namespace

std::string shape_names() {
  std::string names;
  for (const ModelShape& shape : kModelShapes) {
    names += fmt::format("{}{}", names.empty() ? "" : ", ", shape.name);
    for (const ShapeAlias& alias : kShapeAliases) {
      if (alias.name == shape.name) names += fmt::format(" ({})", alias.alias);
    }
  }
  return names;
}

LayerShape parse_shape(const std::string& text) {
  LayerShape shape;
  if (parse_extents(text, shape)) return shape;
  const auto named = named_shape(text);
  if (!named) bad_shape("one", fmt::format("'{}'", text));
  return *named;
}

std::vector<LayerShape> parse_shapes(const std::string& text) {
  LayerShape shape;
  if (parse_extents(text, shape)) return {shape};
  std::vector<LayerShape> shapes;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const std::string name = text.substr(begin, end - begin);
    const auto named = named_shape(name);
    if (!named) {
      bad_shape("names, with commas,",
                name == text ? fmt::format("'{}'", text) : fmt::format("'{}' in '{}'", name, text));
    }
    shapes.push_back(*named);
    begin = end + 1;
  }
  return shapes;
}

}  // namespace fourfold
