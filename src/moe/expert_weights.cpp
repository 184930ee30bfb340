// Checks of expert weights, and the two named steps that change them: folding gate and up, quantizing again.
#include "fourfold/expert_weights.h"

#include <algorithm>
#include <cmath>

#include "base/fail.h"
#include "fourfold/quantize.h"

namespace fourfold {
namespace {

void require_shape(const Expert& expert, const char* which, const WeightView& weight, int64_t rows,
                   int64_t cols) {
  if (rows_of(weight) != rows || cols_of(weight) != cols) {
    reject(expert.name + " " + which, shape_text(rows, cols), shape_text(rows_of(weight), cols_of(weight)));
  }
}

void require_bias(const Expert& expert, const char* which, const std::optional<DenseView>& bias,
                  int64_t cols) {
  if (bias && (bias->rows != 1 || bias->cols != cols)) {
    reject(expert.name + " " + which, shape_text(1, cols), shape_text(bias->rows, bias->cols));
  }
}

void validate_expert(const Expert& expert, int64_t hidden, int64_t intermediate) {
  if (expert.has_gate()) require_shape(expert, "gate", expert.gate, intermediate, hidden);
  require_shape(expert, "up", expert.up, intermediate, hidden);
  require_shape(expert, "down", expert.down, hidden, intermediate);
  require_bias(expert, "gate bias", expert.gate_bias, intermediate);
  require_bias(expert, "up bias", expert.up_bias, intermediate);
  require_bias(expert, "down bias", expert.down_bias, hidden);
}

/// `half`'s block scales for the larger global scale of the other one.
BlockScaledMatrix rescale(const BlockScaledView& half, float global, FoldReport& report) {
  BlockScaledMatrix folded{half.format, half.rows, half.cols, {}, {}, {global, GlobalScaleKind::kMultiplier}};
  const int64_t blocks = half.blocks_per_row();
  const float own = half.global.multiplier(), ratio = own / global;
  folded.scales.resize(static_cast<size_t>(half.rows * blocks));
  for (int64_t row = 0; row < half.rows; ++row) {
    for (int64_t block = 0; block < blocks; ++block) {
      const float scale = decode_e4m3(half.scale_code(row, block));
      const uint8_t code = encode_e4m3(scale * ratio);
      folded.scales[static_cast<size_t>(row * blocks + block)] = code;
      const double before = double{scale} * own, after = double{decode_e4m3(code)} * global;
      ++report.blocks;
      if (before == after) continue;
      ++report.changed;
      report.underflowed += code == 0;
      report.largest_relative_change =
          std::max(report.largest_relative_change, std::abs(after / before - 1.0));
    }
  }
  return folded;
}

/// The view `half` with scales and global scale of `folded`; codes stay where they are.
BlockScaledView with_scales(BlockScaledView half, const BlockScaledMatrix& folded) {
  half.scales = folded.scales.data();
  half.scale_stride = half.blocks_per_row();
  half.scale_layout = ScaleLayout::kRowMajor;
  half.global = folded.global;
  return half;
}

/// dequantize -> bf16, as an engine that goes through bf16 holds the weight.
std::vector<float> through_bf16(const WeightView& weight) {
  std::vector<float> values = dequantize(weight);
  for (float& value : values) value = static_cast<float>(encode_bf16(value));
  return values;
}

/// Owner of derived tensors beside the storage they were derived from.
struct DerivedStorage {
  std::shared_ptr<const void> source;
  std::vector<std::unique_ptr<BlockScaledMatrix>> matrices;

  const BlockScaledMatrix& add(BlockScaledMatrix matrix) {
    return *matrices.emplace_back(std::make_unique<BlockScaledMatrix>(std::move(matrix)));
  }
};

/// The view `half` with scales of the larger global scale, where gate and up are NVFP4 and differ in it.
void fold(Expert& expert, DerivedStorage& storage, FoldReport& counts) {
  if (!is_stored_as(expert.gate, QuantFormat::kNvfp4) || !is_stored_as(expert.up, QuantFormat::kNvfp4))
    return;
  auto &gate = std::get<BlockScaledView>(expert.gate), &up = std::get<BlockScaledView>(expert.up);
  const float gate_global = gate.global.multiplier(), up_global = up.global.multiplier();
  if (gate_global == up_global) return;
  BlockScaledView& smaller = gate_global < up_global ? gate : up;
  smaller = with_scales(smaller, storage.add(rescale(smaller, std::max(gate_global, up_global), counts)));
}

void quantize_again(Expert& expert, DerivedStorage& storage) {
  const int64_t hidden = cols_of(expert.up), intermediate = rows_of(expert.up);
  const auto quantize = [&](const std::vector<float>& values, float global, int64_t rows, int64_t cols) {
    return storage.add(quantize_nvfp4({values.data(), rows, cols}, global)).view();
  };
  const std::vector<float> up = through_bf16(expert.up), down = through_bf16(expert.down);
  float amax = absolute_maximum({up.data(), intermediate, hidden});
  if (expert.has_gate()) {
    const std::vector<float> gate = through_bf16(expert.gate);
    amax = std::max(amax, absolute_maximum({gate.data(), intermediate, hidden}));
    expert.gate = quantize(gate, nvfp4_global_scale(amax), intermediate, hidden);
  }
  expert.up = quantize(up, nvfp4_global_scale(amax), intermediate, hidden);
  expert.down = quantize(down, nvfp4_global_scale(absolute_maximum({down.data(), hidden, intermediate})),
                         hidden, intermediate);
}

}  // namespace

bool is_all_nvfp4(const Expert& expert) {
  const auto stored = [](const WeightView& weight) { return is_stored_as(weight, QuantFormat::kNvfp4); };
  return (!expert.has_gate() || stored(expert.gate)) && stored(expert.up) && stored(expert.down);
}

void validate(const ExpertWeights& weights) {
  for (const Expert& expert : weights.experts) {
    validate_expert(expert, weights.hidden, weights.intermediate);
  }
  if (!weights.shared) return;
  const SharedExpert& shared = *weights.shared;
  validate_expert(shared.expert, weights.hidden, shared.intermediate);
  if (shared.gate && (shared.gate->rows != 1 || shared.gate->cols != weights.hidden)) {
    reject(shared.expert.name + " gate of the output", shape_text(1, weights.hidden),
           shape_text(shared.gate->rows, shared.gate->cols));
  }
}

bool shared_is_stored_as_routed(const ExpertWeights& weights) {
  const Expert& shared = weights.shared->expert;
  const std::string_view routed = format_name(weights.experts.front().up);
  return format_name(shared.up) == routed && format_name(shared.down) == routed &&
         (!shared.has_gate() || format_name(shared.gate) == routed);
}

ExpertWeights shared_as_layer(const ExpertWeights& weights) {
  const SharedExpert& shared = weights.shared.value();
  return {weights.hidden, shared.intermediate, {shared.expert}, std::nullopt, weights.storage};
}

bool is_usable_input_scale(std::optional<float> scale) {
  return scale && std::isfinite(*scale) && *scale >= kSmallestDynamicScale;
}

std::vector<float> x_input_scales(const ExpertWeights& weights) {
  std::vector<float> scales;
  for (const Expert& expert : weights.experts) {
    scales.push_back(std::max(expert.gate_input_scale.value_or(0.0f), expert.up_input_scale.value_or(0.0f)));
  }
  return scales;
}

std::vector<float> intermediate_input_scales(const ExpertWeights& weights) {
  std::vector<float> scales;
  for (const Expert& expert : weights.experts) scales.push_back(expert.down_input_scale.value_or(0.0f));
  return scales;
}

ExpertWeights fold_gate_up(const ExpertWeights& weights, FoldReport* report) {
  auto storage = std::make_shared<DerivedStorage>();
  storage->source = weights.storage;
  ExpertWeights folded = weights;
  FoldReport counts;
  for (Expert& expert : folded.experts) fold(expert, *storage, counts);
  if (folded.shared) fold(folded.shared->expert, *storage, counts);
  folded.storage = std::move(storage);
  if (report) *report = counts;
  return folded;
}

ExpertWeights quantize_again(const ExpertWeights& weights) {
  auto storage = std::make_shared<DerivedStorage>();
  ExpertWeights quantized = weights;
  for (Expert& expert : quantized.experts) quantize_again(expert, *storage);
  if (quantized.shared && is_all_nvfp4(quantized.shared->expert)) {
    quantize_again(quantized.shared->expert, *storage);
  }
  storage->source = weights.storage;  // biases still point there
  quantized.storage = std::move(storage);
  return quantized;
}

}  // namespace fourfold
