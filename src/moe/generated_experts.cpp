#include "moe/generated_experts.h"

#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "base/fail.h"

namespace fourfold {
namespace {

// Root mean squares of generated codes and of scales, by their distributions.
constexpr double kWeightRms = 2.93 * 121.9;

/// Up is this much larger than gate, by expert: engines that mix the halves' scales up must show it.
double up_over_gate(int64_t expert) {
  constexpr double kRatios[4] = {0.5, 1.5, 0.75, 2.0};
  return kRatios[expert % 4];
}

/// Global scale that gives a row of `depth` weights the norm `size`.
float global_scale(int64_t depth, double size) {
  return static_cast<float>(size / (kWeightRms * std::sqrt(static_cast<double>(depth))));
}

void require_shape(const GeneratedLayer& layer) {
  const bool good = layer.experts > 0 && layer.hidden > 0 && layer.intermediate > 0 &&
                    layer.hidden % 16 == 0 && layer.intermediate % 16 == 0;
  if (!good) {
    reject("generated experts", "experts, and H and I that are multiples of 16",
           fmt::format("{} experts of {}", layer.experts, shape_text(layer.hidden, layer.intermediate)));
  }
}

/// Four bytes a word, words of the host's byte order: little-endian, as the device's.
template <class Generate>
void fill_words(uint8_t* bytes, int64_t count, Generate generate) {
#pragma omp parallel for schedule(static)
  for (int64_t word = 0; word < count / 4; ++word) {
    const uint32_t value = generate(word);
    std::memcpy(bytes + 4 * word, &value, 4);
  }
}

}  // namespace

ExpertWeights generated_experts(const GeneratedLayer& layer, const uint8_t* codes, const uint8_t* scales,
                                Device device, std::shared_ptr<const void> storage) {
  require_shape(layer);
  ExpertWeights weights;
  weights.hidden = layer.hidden;
  weights.intermediate = layer.intermediate;
  weights.storage = std::move(storage);
  const auto matrix = [&](int64_t index, int64_t rows, int64_t cols, double size) {
    BlockScaledView view;
    view.rows = rows;
    view.cols = cols;
    view.codes = {codes + index * layer.codes_per_matrix() / 2, rows, cols / 2, cols / 2, device};
    view.scales = scales + index * layer.codes_per_matrix() / 16;
    view.scale_stride = cols / 16;
    view.global.value = global_scale(cols, size);
    return view;
  };
  for (int64_t e = 0; e < layer.experts; ++e) {
    Expert expert;
    const double ratio = up_over_gate(e);
    expert.name = "experts." + std::to_string(e);
    expert.gate = matrix(3 * e, layer.intermediate, layer.hidden, 1.0);
    expert.up = matrix(3 * e + 1, layer.intermediate, layer.hidden, ratio);
    // silu(g) of g ~ N(0, 1) has root mean square 0.6.
    expert.down = matrix(3 * e + 2, layer.hidden, layer.intermediate, 1.0 / (0.6 * ratio));
    // What calibration on N(0, 1) would find, about: |x| up to 6, |silu(g) u| up to 14 |u|'s size.
    expert.gate_input_scale = expert.up_input_scale = 6.0f / kNvfp4Range;
    expert.down_input_scale = static_cast<float>(14.0 * ratio) / kNvfp4Range;
    weights.experts.push_back(std::move(expert));
  }
  return weights;
}

void generate_on_host(const GeneratedLayer& layer, uint8_t* codes, uint8_t* scales) {
  require_shape(layer);
  // A multiple of 768 values: whole words of both.
  fill_words(codes, layer.code_bytes(), [&](int64_t word) { return generated_codes(layer.seed, word); });
  fill_words(scales, layer.scale_bytes(), [&](int64_t word) { return generated_scales(layer.seed, word); });
}

}  // namespace fourfold
