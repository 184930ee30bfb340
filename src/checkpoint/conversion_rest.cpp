// What a conversion does beside the experts: the order of tensors, those that are carried, configs and files.
#include <cstring>
#include <tuple>

#include "base/fail.h"
#include "checkpoint/conversion_config.h"
#include "checkpoint/conversion_planner.h"
#include "checkpoint/moe_names.h"

namespace fourfold {

void ConversionPlanner::require_all_input_scales_used() const {
  if (!input_scales_) return;
  for (const auto& [name, tensor] : input_scales_->tensors()) {
    if (used_scales_.contains(name)) continue;
    fail(ErrorCode::kInvalidArgument,
         "{}: tensor '{}': expected input scales of converted matrices alone, such as '{}', found another",
         input_scales_->path().string(), name, used_scales_.empty() ? "?" : *used_scales_.begin());
  }
}

void ConversionPlanner::require_something_to_do() const {
  if (request_.scale != ScaleRule::kAmax && !quantizes_) {
    fail(ErrorCode::kInvalidArgument,
         "--scale {}: expected weights to quantize, found none: codes and scales of this source stay as "
         "they "
         "are",
         to_string(request_.scale));
  }
  if (is_changed_ || request_.dynamic_inputs || input_scales_) return;
  fail(ErrorCode::kInvalidArgument, "{}: expected experts to convert, found that they are {} already",
       source_.path().string(), to_string(request_.to));
}

void ConversionPlanner::place_tensors() {
  for (const int64_t layer : layers_with_experts(source_)) {
    const std::string prefix = find_block(source_, layer).prefix + std::string(kExperts);
    if (std::find(prefixes_.begin(), prefixes_.end(), prefix) == prefixes_.end()) note_left(layer, prefix);
  }
  std::vector<const Tensor*> order;
  for (const auto& [name, tensor] : source_.tensors()) order.push_back(tensor);
  std::sort(order.begin(), order.end(), [](const Tensor* a, const Tensor* b) {
    return std::tie(a->file, a->data) < std::tie(b->file, b->data);
  });
  auto& tensors = result_->plan.tensors;
  for (const Tensor* tensor : order) {
    if (const auto planned = new_tensors_.find(tensor); planned != new_tensors_.end()) {
      tensors.insert(tensors.end(), planned->second.begin(), planned->second.end());
    }
    if (!replaced_.contains(tensor->name)) tensors.push_back(carried(*tensor));
  }
}

void ConversionPlanner::note_left(int64_t layer, const std::string& prefix) {
  const std::string scheme = load_one(layer);
  const bool is_same = scheme.starts_with(to_string(request_.to)) &&
                       (scheme.find("compressed-tensors") != std::string::npos) == names_.divides;
  left_prefixes_.push_back(prefix);
  if (!is_same) left_experts_.push_back(prefix);
}

std::string ConversionPlanner::load_one(int64_t layer) const {
  return load_experts(result_->source, layer, {0}).scheme;
}

PlannedTensor ConversionPlanner::carried(const Tensor& tensor) {
  PlannedTensor same{{tensor.name, tensor.dtype, tensor.shape}, tensor.data};
  const auto is_left = [&](const std::string& prefix) { return tensor.name.starts_with(prefix); };
  if (request_.to != TargetFormat::kNvfp4 ||
      std::any_of(left_prefixes_.begin(), left_prefixes_.end(), is_left)) {
    return same;
  }
  const size_t dot = tensor.name.rfind('.');
  const std::string linear = tensor.name.substr(0, dot);
  const bool divides = names_.divides;
  const char* global = divides ? ".weight_scale_2" : ".weight_global_scale";  // as the source has it
  if (dot == std::string::npos || source_.find(linear + global) == nullptr) return same;
  const std::string suffix = tensor.name.substr(dot);
  if (suffix == (divides ? ".weight" : ".weight_packed")) {
    same.spec.name = linear + std::string(names_.weight);
  } else if (suffix == global || suffix == (divides ? ".input_scale" : ".input_global_scale")) {
    if (tensor.dtype != DType::kF32 || tensor.elements() != 1) bad_tensor(tensor, "one F32 number");
    float value = 0.0f;
    std::memcpy(&value, tensor.data, sizeof(value));
    return scalar(linear + std::string(suffix == global ? names_.global : names_.input_scale), names_.scalar,
                  inverse(value, tensor.name));
  }
  return same;
}

void ConversionPlanner::write_configs() {
  ConvertedModel model;
  model.source = source_.path();
  model.to = request_.to;
  model.scheme = *scheme_;
  model.is_deepseek_v4 = is_deepseek_v4_;
  model.has_input_scales = has_input_scales_;
  model.left_experts = left_experts_;
  for (const PlannedTensor& tensor : result_->plan.tensors) {
    model.tensors.push_back(tensor.spec);
    model.has_blocks |= tensor.spec.name.ends_with("gate_up_proj_blocks");
  }
  result_->plan.files = converted_configs(model);
  for (PlannedFile& file : other_files(source_.path(), result_->notes)) {
    result_->plan.files.push_back(std::move(file));
  }
  if (!left_experts_.empty()) {
    result_->notes.push_back(
        fmt::format("{} layers keep their experts in another format; loaders that want one format for all "
                    "experts refuse such a model",
                    left_experts_.size()));
  }
}

}  // namespace fourfold
