// The layers of layertest --stress: small, of odd sizes, and stored with holes that hold NaN.
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "fourfold/scale_layout.h"
#include "moe/generated_experts.h"
#include "tools/stress.h"

namespace fourfold {
namespace {

constexpr uint8_t kNanScale = 0x7F;       // of e4m3
constexpr uint8_t kPoisonedCodes = 0x77;  // 6 and 6: read as data, they show

using Bytes = std::vector<uint8_t>;
using ByteStore = std::vector<Bytes>;

/// The same matrix with `hole` bytes between the rows of codes and of scales.
void pad_rows(BlockScaledView& matrix, ByteStore& store) {
  constexpr int64_t kHole = 16;
  const auto pad = [&](const uint8_t* data, int64_t stride, int64_t width, uint8_t poison) {
    Bytes& padded = store.emplace_back(static_cast<size_t>(matrix.rows * (width + kHole)), poison);
    for (int64_t row = 0; row < matrix.rows; ++row) {
      std::memcpy(padded.data() + row * (width + kHole), data + row * stride, static_cast<size_t>(width));
    }
    return padded.data();
  };
  const int64_t width = matrix.cols / 2, blocks = matrix.blocks_per_row();
  matrix.codes = {pad(matrix.codes.data, matrix.codes.stride, width, kPoisonedCodes), matrix.rows, width,
                  width + kHole};
  matrix.scales = pad(matrix.scales, matrix.scale_stride, blocks, kNanScale);
  matrix.scale_stride = blocks + kHole;
}

/// The same matrix with swizzled scales, whose padding is NaN.
void swizzle(BlockScaledView& matrix, ByteStore& store) {
  const int64_t blocks = matrix.blocks_per_row();
  Bytes& swizzled =
      store.emplace_back(static_cast<size_t>(swizzled_scale_bytes(matrix.rows, blocks)), kNanScale);
  for (int64_t row = 0; row < matrix.rows; ++row) {
    for (int64_t block = 0; block < blocks; ++block) {
      swizzled[static_cast<size_t>(swizzled_scale_offset(row, block, blocks))] =
          matrix.scale_code(row, block);
    }
  }
  matrix.scales = swizzled.data();
  matrix.scale_layout = ScaleLayout::kSwizzled128x4;
}

struct Shape {
  int64_t tokens, hidden, intermediate, experts, top_k;
  ScaleLayout scales = ScaleLayout::kRowMajor;
};

ExpertWeights make_weights(const Shape& shape, uint64_t seed) {
  const GeneratedLayer layer{shape.experts, shape.hidden, shape.intermediate, seed};
  auto store = std::make_shared<ByteStore>();
  store->reserve(static_cast<size_t>(2 + 6 * shape.experts));  // views point into it
  Bytes& codes = store->emplace_back(static_cast<size_t>(layer.code_bytes()));
  Bytes& scales = store->emplace_back(static_cast<size_t>(layer.scale_bytes()));
  generate_on_host(layer, codes.data(), scales.data());
  ExpertWeights weights = generated_experts(layer, codes.data(), scales.data(), Device::host(), store);
  for (Expert& expert : weights.experts) {
    for (WeightView* weight : {&expert.gate, &expert.up, &expert.down}) {
      auto& matrix = std::get<BlockScaledView>(*weight);
      if (shape.scales == ScaleLayout::kSwizzled128x4) {
        swizzle(matrix, *store);
      } else {
        pad_rows(matrix, *store);
      }
    }
  }
  return weights;
}

}  // namespace

std::vector<StressSubject> stress_layers(ActivationFormat format, uint64_t seed) {
  constexpr Shape kShapes[] = {
      {33, 64, 64, 4, 2},    {17, 48, 80, 5, 3},    {5, 16, 16, 1, 1},
      {29, 160, 112, 37, 8}, {131, 272, 144, 3, 2}, {19, 80, 208, 4, 2, ScaleLayout::kSwizzled128x4},
      {5, 128, 192, 60, 4},  // few rows an expert, whole tiles of 64: what one fused kernel takes
  };
  std::vector<StressSubject> subjects;
  for (const Shape& shape : kShapes) {
    StressSubject subject;
    subject.name = fmt::format("T {}, H {}, I {}, E {}, top-{}, {}", shape.tokens, shape.hidden,
                               shape.intermediate, shape.experts, shape.top_k,
                               shape.scales == ScaleLayout::kRowMajor ? "padded rows" : "swizzled scales");
    subject.weights = make_weights(shape, seed + subjects.size());
    subject.expert_ids.resize(static_cast<size_t>(shape.experts));
    std::iota(subject.expert_ids.begin(), subject.expert_ids.end(), 0);
    subject.config = {shape.hidden, shape.intermediate, shape.experts, shape.top_k, {}};
    subject.options.activations = format;
    subject.inputs = make_inputs(shape.tokens, shape.hidden, seed + subjects.size(), false);
    route_at_random(subject.inputs, shape.experts, shape.top_k, seed + subjects.size());
    subjects.push_back(std::move(subject));
  }
  return subjects;
}

}  // namespace fourfold
