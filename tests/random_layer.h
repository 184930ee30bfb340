// A small layer of random NVFP4 experts that owns its weights, with inputs to run it on.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "fourfold/moe_layer.h"
#include "fourfold/quantize.h"
#include "tools/layer_inputs.h"

namespace fourfold {

enum class Biases : uint8_t { kNone, kSome, kAll };  ///< kSome: of every other expert
enum class Assignment : uint8_t { kUniform, kOneExpert, kOneAmongAll, kSomeAbsent, kRepeated };

struct RandomLayerShape {
  int64_t tokens = 37, hidden = 192, intermediate = 112, experts = 6, top_k = 3;
  ActivationFunction activation = {};
  Biases biases = Biases::kNone;
  Assignment assignment = Assignment::kUniform;
  ScaleLayout scale_layout = ScaleLayout::kRowMajor;
  GlobalScaleKind global_kind = GlobalScaleKind::kMultiplier;
  bool weight_on_input = false;
  int64_t shared_intermediate = 0;  ///< 0: no shared expert
  bool shared_gate = false;         ///< its output is weighed by x
};

struct RandomLayer {
  RandomLayer(const RandomLayerShape& shape, uint64_t seed);
  RandomLayer(const RandomLayer&) = delete;
  RandomLayer& operator=(const RandomLayer&) = delete;

  LayerConfig config;
  ExpertWeights weights;
  LayerInputs inputs;

 private:
  WeightView add_matrix(int64_t rows, int64_t cols, float sigma);
  DenseView add_bias(int64_t cols, ElementType type);
  Expert make_expert(int64_t index, int64_t intermediate);
  void add_shared_expert();
  void route();

  RandomLayerShape shape_;
  std::mt19937_64 random_;
  std::vector<BlockScaledMatrix> matrices_;
  std::vector<std::vector<uint8_t>> swizzled_scales_;
  std::vector<std::vector<std::byte>> biases_;
};

}  // namespace fourfold
