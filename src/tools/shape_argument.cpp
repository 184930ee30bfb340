#include "tools/shape_argument.h"

#include <fmt/format.h>

#include "bench/shapes.h"
#include "tools/commands.h"

namespace fourfold {
namespace {

[[noreturn]] void bad_shape(const std::string& text) {
  throw CLI::ValidationError("--shape",
                             fmt::format("expected E,H,I,K (experts, hidden, intermediate, top-k) or one of "
                                         "{}; found '{}'",
                                         shape_names(), text));
}

bool parse_extents(const std::string& text, LayerShape& shape) {
  int64_t* const fields[] = {&shape.experts, &shape.hidden, &shape.intermediate, &shape.top_k};
  shape.name = text;
  return parse_numbers(text, fields);
}

LayerShape named_shape(const std::string& name) {
  const ModelShape* const model = find_model_shape(name);
  if (model == nullptr) bad_shape(name);
  return {std::string(model->name), model->experts, model->hidden, model->intermediate, model->top_k};
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
  return parse_extents(text, shape) ? shape : named_shape(text);
}

std::vector<LayerShape> parse_shapes(const std::string& text) {
  LayerShape shape;
  if (parse_extents(text, shape)) return {shape};
  std::vector<LayerShape> shapes;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    shapes.push_back(named_shape(text.substr(begin, end - begin)));
    begin = end + 1;
  }
  return shapes;
}

}  // namespace fourfold
