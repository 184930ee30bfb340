// What a conversion does beside the experts: the order of tensors, those that are carried, configs and files.
#include <cstring>
#include <set>
#include <tuple>

#include "base/fail.h"
#include "checkpoint/conversion_config.h"
#include "checkpoint/conversion_planner.h"
#include "checkpoint/moe_names.h"

namespace fourfold {
namespace {

/// Codes of four bits have scales of a byte beside them; int8 weights have wider ones.
bool is_four_bit_weight(const Checkpoint& source, const Tensor& tensor) {
  const bool is_packed = tensor.name.ends_with(".weight_packed");
  const bool is_pair = tensor.dtype == DType::kU8 || tensor.dtype == DType::kI8;
  if (!is_pair || (!is_packed && !tensor.name.ends_with(".weight"))) return false;
  const std::string linear = tensor.name.substr(0, tensor.name.rfind('.'));
  const Tensor* scales = source.find(linear + ".weight_scale");
  if (scales == nullptr) scales = source.find(linear + ".scale");
  return scales != nullptr && scales->shape.size() == 2 && bits_of(scales->dtype) == 8;
}

/// NVFP4 matrices, or tensors of all experts, of the model to be.
struct InputScaleCount {
  int64_t matrices = 0, missing = 0;
};

InputScaleCount count_input_scales(const std::vector<PlannedTensor>& tensors) {
  constexpr std::pair<std::string_view, std::string_view> kScales[] = {
      {".weight_scale_2", ".input_scale"},
      {"_weight_scale_2", "_input_scale"},
      {".weight_global_scale", ".input_global_scale"}};
  std::set<std::string_view> names;
  for (const PlannedTensor& tensor : tensors) names.insert(tensor.spec.name);
  InputScaleCount count;
  for (const std::string_view name : names) {
    for (const auto& [global, input] : kScales) {
      if (!name.ends_with(global)) continue;
      ++count.matrices;
      count.missing +=
          names.contains(std::string(name.substr(0, name.size() - global.size())) + std::string(input)) ? 0
                                                                                                        : 1;
    }
  }
  return count;
}

}  // namespace

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

void ConversionPlanner::plan_other_linears() {
  LayerConversion others;
  others.layer = LayerConversion::kElsewhere;
  result_->layers.push_back(others);
  std::set<std::string> schemes;
  for (const auto& [name, tensor] : source_.tensors()) {
    if (replaced_.contains(name) || !is_four_bit_weight(source_, *tensor)) continue;
    Job job;
    job.name = name.substr(0, name.rfind('.'));
    const LinearReader reader(source_, job.name);
    job.view = reader.weight(schemes);
    reader.require_all_known();
    replace_linear(job);
    plan_job(std::move(job), reader.input_scale());
  }
  if (result_->layers.back().matrices == 0) return result_->layers.pop_back();
  result_->layers.back().from = fmt::format("{}", fmt::join(schemes, ", "));
  finish_jobs();
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
    if (!replaced_.contains(tensor->name))
      tensors.push_back({{tensor->name, tensor->dtype, tensor->shape}, tensor->data});
  }
}

void ConversionPlanner::note_left(int64_t layer, const std::string& prefix) {
  const std::string scheme = load_one(layer);
  const bool is_same = scheme.starts_with(to_string(request_.to)) &&
                       (scheme.find("compressed-tensors") != std::string::npos) ==
                           (scheme_ == WeightScheme::kCompressedTensors);
  if (!is_same) left_experts_.push_back(prefix);
}

std::string ConversionPlanner::load_one(int64_t layer) const {
  return load_experts(result_->source, layer, {0}).scheme;
}

void ConversionPlanner::write_configs() {
  ConvertedModel model;
  model.source = source_.path();
  model.to = request_.to;
  model.scheme = *scheme_;
  model.is_deepseek_v4 = is_deepseek_v4_;
  model.left_experts = left_experts_;
  for (const PlannedTensor& tensor : result_->plan.tensors) {
    model.tensors.push_back(tensor.spec);
    model.has_blocks |= tensor.spec.name.ends_with("gate_up_proj_blocks");
  }
  const InputScaleCount scales = count_input_scales(result_->plan.tensors);
  model.has_input_scales = request_.to != TargetFormat::kMxfp4 && scales.matrices > scales.missing;
  if (model.has_input_scales && scales.missing > 0) {
    result_->notes.push_back(
        fmt::format("{} of {} NVFP4 matrices have no input scale, and the config says that all have; "
                    "fourfold calibrate fills "
                    "them, --input-scale dynamic leaves all out",
                    scales.missing, scales.matrices));
  }
  result_->plan.files = converted_configs(model, result_->notes);
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
