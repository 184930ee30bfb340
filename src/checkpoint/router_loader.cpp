// The router of a layer: its rule from the model type, its tensors by name. docs/formats.md, section 4.
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "base/fail.h"
#include "fourfold/checkpoint.h"

namespace fourfold {
namespace {

/// How a family of models routes, and where its tensors are.
struct RouterFamily {
  std::string_view model_type;
  RouterScore score;
  std::string_view before_layer, gate;  ///< "model.layers." L ".mlp.gate" ".weight"
  std::string_view correction_bias;     ///< suffix of the gate's name; empty where the family has none
};

constexpr std::array<RouterFamily, 4> kFamilies = {{
    {"mixtral", RouterScore::kSoftmax, "model.layers.", ".block_sparse_moe.gate", ""},
    {"qwen3_moe", RouterScore::kSoftmax, "model.layers.", ".mlp.gate", ""},
    {"deepseek_v3", RouterScore::kSigmoid, "model.layers.", ".mlp.gate", ".e_score_correction_bias"},
    {"deepseek_v4", RouterScore::kSqrtSoftplus, "layers.", ".ffn.gate", ".bias"},
}};

/// A dense tensor of `shape`, [rows, cols] or [cols], as a matrix.
DenseView dense(const Tensor& tensor, const std::vector<int64_t>& shape) {
  ElementType type = ElementType::kBf16;
  if (tensor.dtype == DType::kF16) type = ElementType::kF16;
  if (tensor.dtype == DType::kF32) type = ElementType::kF32;
  const bool is_dense = tensor.dtype == DType::kBf16 || type != ElementType::kBf16;
  if (!is_dense || tensor.shape != shape) {
    fail(ErrorCode::kBadFile, "{}: tensor '{}': expected BF16, F16 or F32 [{}], found {}", tensor.file,
         tensor.name, fmt::join(shape, ", "), tensor.describe());
  }
  const int64_t rows = shape.size() == 2 ? shape[0] : 1;
  return {type, tensor.data, rows, shape.back(), tensor.bytes / rows, {}};
}

std::string describe(const RouterFamily& family, const RouterConfig& config) {
  constexpr std::array<const char*, 4> kScores = {"softmax", "softmax of the top-k", "sigmoid",
                                                  "sqrt(softplus)"};
  std::string text = fmt::format("{}, top-{}", kScores[static_cast<size_t>(config.score)], config.top_k);
  if (config.groups > 1)
    text += fmt::format(" in the best {} of {} groups", config.top_groups, config.groups);
  if (!family.correction_bias.empty()) text += " by biased score";
  if (config.renormalise) text += ", renormalised";
  if (config.scaling_factor != 1.0f) text += fmt::format(", x {}", config.scaling_factor);
  return text;
}

}  // namespace

std::optional<CheckpointRouter> load_router(const Checkpoint& checkpoint, int64_t layer, int64_t experts,
                                            int64_t hidden, std::string& why_not) {
  const ModelConfig& config = checkpoint.config();
  for (const RouterFamily& family : kFamilies) {
    if (family.model_type != config.model_type) continue;
    const std::string name = fmt::format("{}{}{}", family.before_layer, layer, family.gate);
    const Tensor* weight = checkpoint.find(name + ".weight");
    if (weight == nullptr) {
      why_not = fmt::format("the checkpoint has no '{}.weight'", name);
      return std::nullopt;
    }
    if (checkpoint.find(name + ".tid2eid")) {
      why_not = fmt::format("'{}' routes by token id, which an input of hidden states does not have", name);
      return std::nullopt;
    }
    CheckpointRouter router;
    router.config = {family.score,
                     config.top_k.value_or(0),
                     config.renormalise.value_or(true),
                     config.routed_scaling_factor.value_or(1.0f),
                     config.groups.value_or(1),
                     config.top_groups.value_or(1)};
    router.weights.weight = dense(*weight, {experts, hidden});
    if (!family.correction_bias.empty()) {
      const Tensor* bias = checkpoint.find(name + std::string(family.correction_bias));
      if (bias == nullptr) {
        fail(ErrorCode::kBadFile, "{}: expected a tensor '{}{}' beside the router's weight, found none",
             checkpoint.path().string(), name, family.correction_bias);
      }
      router.weights.correction_bias = dense(*bias, {experts});
    }
    router.description = fmt::format("{}: {}", name, describe(family, router.config));
    return router;
  }
  why_not = fmt::format("the router of model type '{}' is not known", config.model_type);
  return std::nullopt;
}

}  // namespace fourfold
