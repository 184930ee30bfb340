#include "random_layer.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "fourfold/scale_layout.h"

namespace fourfold {
namespace {

constexpr int kIndexBits = 12;

/// Normal numbers of deviation 1, the same in every process.
using NormalNumbers = std::array<float, size_t{1} << kIndexBits>;
NormalNumbers draw_normal_numbers() {
  NormalNumbers numbers;
  std::mt19937_64 random(1);
  std::normal_distribution<float> normal;
  for (float& number : numbers) number = normal(random);
  return numbers;
}

/// Each value one of the normal numbers, five for a draw. Drawing every value took longer than the layer's
/// run.
std::vector<float> normal_values(size_t count, float sigma, std::mt19937_64& random) {
  static const NormalNumbers numbers = draw_normal_numbers();
  std::vector<float> values(count);
  uint64_t bits = 0;
  for (size_t i = 0; i < count; ++i) {
    bits = i % (64 / kIndexBits) == 0 ? random() : bits >> kIndexBits;
    values[i] = sigma * numbers[bits % numbers.size()];
  }
  return values;
}

}  // namespace

RandomLayer::RandomLayer(const RandomLayerShape& shape, uint64_t seed)
    : config{shape.hidden,          shape.intermediate,        shape.experts,   shape.top_k, shape.activation,
             shape.weight_on_input, shape.shared_intermediate, shape.activation},
      inputs(make_inputs(shape.tokens, shape.hidden, seed, false)),
      shape_(shape),
      random_(seed) {
  weights.hidden = shape.hidden;
  weights.intermediate = shape.intermediate;
  matrices_.reserve(static_cast<size_t>(3 * (shape.experts + 1)));  // views point into it
  for (int64_t e = 0; e < shape.experts; ++e) {
    weights.experts.push_back(make_expert(e, shape.intermediate));
  }
  if (shape.shared_intermediate > 0) add_shared_expert();
  route();
}

WeightView RandomLayer::add_matrix(int64_t rows, int64_t cols, float sigma) {
  const std::vector<float> values = normal_values(static_cast<size_t>(rows * cols), sigma, random_);
  const MatrixView<const float> matrix(values.data(), rows, cols);
  BlockScaledView view =
      matrices_.emplace_back(quantize_nvfp4(matrix, nvfp4_global_scale(absolute_maximum(matrix)))).view();
  if (shape_.scale_layout == ScaleLayout::kSwizzled128x4) {
    view.scales =
        swizzled_scales_.emplace_back(swizzle_scales({view.scales, rows, view.blocks_per_row()})).data();
    view.scale_layout = ScaleLayout::kSwizzled128x4;
  }
  if (shape_.global_kind == GlobalScaleKind::kDivisor) {
    view.global = {1.0f / view.global.value, GlobalScaleKind::kDivisor};
  }
  return view;
}

DenseView RandomLayer::add_bias(int64_t cols, ElementType type) {
  std::normal_distribution<float> normal(0.0f, 0.5f);
  const size_t width = type == ElementType::kF32 ? 4 : 2;
  std::vector<std::byte>& bytes = biases_.emplace_back(static_cast<size_t>(cols) * width + 1);
  for (size_t i = 0; i < static_cast<size_t>(cols); ++i) {
    const float value = normal(random_);
    const Bf16 rounded = encode_bf16(value);
    std::memcpy(bytes.data() + 1 + i * width, width == 4 ? static_cast<const void*>(&value) : &rounded,
                width);
  }
  return {type, bytes.data() + 1, 1, cols, static_cast<int64_t>(width) * cols, {}};  // at an odd address
}

Expert RandomLayer::make_expert(int64_t index, int64_t intermediate) {
  const int64_t hidden = shape_.hidden;
  const float spread = std::exp2(static_cast<float>(index % 3));  // globals differ between experts and halves
  // h then has a deviation of about 1 to 4: activations and limits matter.
  const float sigma = 1.0f / std::sqrt(static_cast<float>(hidden));
  Expert expert;
  expert.name = "experts." + std::to_string(index);
  if (is_gated(shape_.activation.kind)) expert.gate = add_matrix(intermediate, hidden, sigma * spread);
  expert.up = add_matrix(intermediate, hidden, 2.0f * sigma);
  expert.down = add_matrix(hidden, intermediate, spread / std::sqrt(static_cast<float>(intermediate)));
  if (shape_.biases == Biases::kAll || (shape_.biases == Biases::kSome && index % 2 == 1)) {
    if (expert.has_gate()) expert.gate_bias = add_bias(intermediate, ElementType::kBf16);
    expert.up_bias = add_bias(intermediate, ElementType::kF32);
    expert.down_bias = add_bias(hidden, ElementType::kBf16);
  }
  if (expert.has_gate()) expert.gate_input_scale = 3.0f / 2688.0f;
  expert.up_input_scale = (5.0f + static_cast<float>(index)) / 2688.0f;
  expert.down_input_scale = (20.0f + static_cast<float>(index)) / 2688.0f;
  return expert;
}

void RandomLayer::add_shared_expert() {
  SharedExpert shared;
  shared.expert = make_expert(7, shape_.shared_intermediate);
  shared.expert.name = "shared_expert";
  shared.intermediate = shape_.shared_intermediate;
  if (shape_.shared_gate) shared.gate = add_bias(shape_.hidden, ElementType::kBf16);
  weights.shared = std::move(shared);
}

void RandomLayer::route() {
  route_at_random(inputs, shape_.experts, shape_.top_k, random_());
  const auto repeated = static_cast<uint64_t>(std::min<int64_t>(2, shape_.experts));
  for (size_t slot = 0; slot < inputs.topk_ids.size(); ++slot) {
    int32_t& id = inputs.topk_ids[slot];
    if (shape_.assignment == Assignment::kOneExpert) id = static_cast<int32_t>(shape_.experts - 1);
    if (shape_.assignment == Assignment::kOneAmongAll && slot % static_cast<size_t>(shape_.top_k) == 0) {
      id = static_cast<int32_t>(shape_.experts - 1);
    }
    if (shape_.assignment == Assignment::kSomeAbsent && random_() % 3 == 0) id = -1;
    if (shape_.assignment == Assignment::kRepeated) id = static_cast<int32_t>(random_() % repeated);
  }
}

}  // namespace fourfold
