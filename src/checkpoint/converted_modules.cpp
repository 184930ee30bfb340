#include "checkpoint/converted_modules.h"

#include <algorithm>
#include <string_view>

namespace fourfold {
namespace {

using Index = std::map<std::string_view, const TensorSpec*>;

const TensorSpec* find(const Index& index, const std::string& name) {
  const auto it = index.find(name);
  return it == index.end() ? nullptr : it->second;
}

/// Separate tensors are "module.scale", those of all experts "module_scale".
ModuleFormat four_bit_format(const Index& index, const std::string& module, bool is_packed) {
  ModuleFormat found;
  if (is_packed) found.scheme = WeightScheme::kCompressedTensors;
  for (const char* suffix : {".weight_scale", ".scale", "_weight_scale"}) {
    const TensorSpec* scales = find(index, module + suffix);
    if (scales != nullptr && scales->dtype != DType::kF8E4m3) found.format = TargetFormat::kMxfp4;
  }
  for (const char* suffix : {".input_scale", ".input_global_scale", "_input_scale"}) {
    found.has_input_scale |= find(index, module + suffix) != nullptr;
  }
  return found;
}

Fp8Format fp8_format(const Index& index, const std::string& module) {
  Fp8Format found;
  const TensorSpec* scales = find(index, module + ".weight_scale");
  found.has_blocks = scales == nullptr;
  found.is_by_row = scales != nullptr && std::any_of(scales->shape.begin(), scales->shape.end(),
                                                     [](int64_t extent) { return extent > 1; });
  found.has_input_scale = find(index, module + ".input_scale") != nullptr;
  return found;
}

}  // namespace

ConvertedModules modules_of(const std::vector<TensorSpec>& tensors) {
  Index index;
  for (const TensorSpec& tensor : tensors) index[tensor.name] = &tensor;
  ConvertedModules modules;
  for (const TensorSpec& tensor : tensors) {
    const bool is_packed = tensor.name.ends_with(".weight_packed"),
               is_weight = tensor.name.ends_with(".weight"),
               is_pair = tensor.dtype == DType::kU8 || tensor.dtype == DType::kI8;
    const std::string module = tensor.name.substr(0, tensor.name.rfind('.'));
    // Tensors of all experts have no ".weight".
    if (tensor.name.ends_with("experts.gate_up_proj") || tensor.name.ends_with("experts.down_proj")) {
      if (is_pair) {
        modules.four_bit[tensor.name] = four_bit_format(index, tensor.name, false);
      } else {
        modules.plain.insert(tensor.name);
      }
    } else if (is_packed || (is_weight && is_pair)) {
      modules.four_bit[module] = four_bit_format(index, module, is_packed);
    } else if (is_weight && tensor.dtype == DType::kF8E4m3) {
      modules.fp8[module] = fp8_format(index, module);
    } else if (is_weight && tensor.shape.size() == 2 && !module.ends_with("embed_tokens")) {
      modules.plain.insert(module);
    }
  }
  return modules;
}

}  // namespace fourfold
