#include "tools/calibrated_copy.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

#include "base/fail.h"
#include "checkpoint/conversion_config.h"
#include "checkpoint/model_directory.h"
#include "checkpoint/moe_names.h"
#include "fourfold/quantize.h"

namespace fourfold {
namespace {

class CopyPlanner {
 public:
  CopyPlanner(const Checkpoint& checkpoint, std::optional<WeightScheme> scheme)
      : checkpoint_(checkpoint), scheme_(scheme) {}

  void add_layer(const LayerCalibration& layer, const InputAmax& amax) {
    const MoeBlock block = find_block(checkpoint_, layer.layer);
    for (auto it = amax.lower_bound(block.prefix); it != amax.end() && it->first.starts_with(block.prefix);
         ++it) {
      add_linear(it->first, it->second);
    }
    const std::string experts = block.prefix + std::string(kExperts);
    const auto count = static_cast<int64_t>(layer.experts.size());
    add_fused(experts + "gate_up_proj", experts, block.names.gate, count, amax);
    add_fused(experts + "down_proj", experts, block.names.down, count, amax);
  }

  int64_t matrices() const { return matrices_; }

  /// Views into this object. Files that are left out are named in `notes`.
  ModelPlan plan(std::vector<std::string>& notes) const {
    ModelPlan plan;
    for (const auto& [name, tensor] : checkpoint_.tensors()) {
      if (!scales_.contains(name))
        plan.tensors.push_back({{name, tensor->dtype, tensor->shape}, tensor->data});
    }
    for (const auto& [name, scale] : scales_) {
      plan.tensors.push_back(
          {{name, DType::kF32, scale.shape}, reinterpret_cast<const std::byte*>(scale.values.data())});
    }
    std::sort(plan.tensors.begin(), plan.tensors.end(),
              [](const PlannedTensor& a, const PlannedTensor& b) { return a.spec.name < b.spec.name; });
    plan.files = other_files(checkpoint_.path(), notes);
    for (const char* config : {"config.json", "hf_quant_config.json"}) {
      const std::filesystem::path file = checkpoint_.path() / config;
      if (!std::filesystem::exists(file)) continue;
      require_no_way_out(checkpoint_.path(), config, checkpoint_.path().string());
      plan.files.push_back({config, file, ""});
    }
    return plan;
  }

 private:
  struct StoredScale {
    std::vector<int64_t> shape;
    std::vector<float> values;
  };

  /// As the scheme stores it: amax / 2688, or 2688 / amax.
  static float stored(float amax, bool divides) {
    const float multiplier = nvfp4_global_scale(amax);
    if (!divides) return multiplier;
    return multiplier == kSmallestDynamicScale ? 1.0f / multiplier : kNvfp4Range / amax;
  }

  bool divides(bool by_name) const { return scheme_ ? scheme_ == WeightScheme::kCompressedTensors : by_name; }

  /// A matrix stored on its own; nothing where it is not NVFP4, or not stored on its own.
  void add_linear(const std::string& linear, float amax) {
    const bool has_divisor = checkpoint_.find(linear + ".weight_global_scale") != nullptr;
    if (!has_divisor && checkpoint_.find(linear + ".weight_scale_2") == nullptr) return;
    const Tensor* multiplier = checkpoint_.find(linear + ".input_scale");
    const Tensor* divisor = checkpoint_.find(linear + ".input_global_scale");
    const bool named_divisor = divisor != nullptr || (multiplier == nullptr && has_divisor);
    const Tensor* old = named_divisor ? divisor : multiplier;
    std::vector<int64_t> shape = named_divisor ? std::vector<int64_t>{1} : std::vector<int64_t>{};
    if (old != nullptr) shape = old->shape;
    scales_[linear + (named_divisor ? ".input_global_scale" : ".input_scale")] = {
        shape, {stored(amax, divides(named_divisor))}};
    ++matrices_;
  }

  /// A tensor of all experts: one scale for all, or one each where it is stored so.
  void add_fused(const std::string& fused, const std::string& experts, std::string_view linear, int64_t count,
                 const InputAmax& amax) {
    if (checkpoint_.find(fused + "_weight_scale_2") == nullptr) return;
    const std::string name = fused + "_input_scale";
    const Tensor* old = checkpoint_.find(name);
    StoredScale scale{old ? old->shape : std::vector<int64_t>{}, {0.0f}};
    const bool one_each = old != nullptr && count > 1 && old->elements() == count;
    if (one_each) {
      scale.values.resize(static_cast<size_t>(count));
      std::memcpy(scale.values.data(), old->data, static_cast<size_t>(old->bytes));
    }
    float largest = 0.0f;
    for (int64_t expert = 0; expert < count; ++expert) {
      const auto found = amax.find(fmt::format("{}{}.{}", experts, expert, linear));
      if (found == amax.end()) continue;
      largest = std::max(largest, found->second);
      if (one_each) scale.values[static_cast<size_t>(expert)] = stored(found->second, divides(false));
      ++matrices_;
    }
    if (largest == 0.0f) return;
    if (!one_each) scale.values.front() = stored(largest, divides(false));
    scales_[name] = std::move(scale);
  }

  const Checkpoint& checkpoint_;
  std::optional<WeightScheme> scheme_;
  std::map<std::string, StoredScale, std::less<>> scales_;
  int64_t matrices_ = 0;
};

}  // namespace

int64_t write_calibrated_copy(const Checkpoint& checkpoint, const std::filesystem::path& target,
                              const CalibrateResult& result, std::optional<WeightScheme> scheme,
                              const WriteProgress& progress, std::vector<std::string>& notes) {
  CopyPlanner planner(checkpoint, scheme);
  for (const LayerCalibration& layer : result.layers) planner.add_layer(layer, result.amax);
  if (planner.matrices() == 0) {
    reject(checkpoint.path().string(), "NVFP4 experts, whose copy could hold input scales",
           "none in these layers; write the scales with --output, for convert --input-scale");
  }
  write_model(target, planner.plan(notes), progress);
  return planner.matrices();
}

}  // namespace fourfold
