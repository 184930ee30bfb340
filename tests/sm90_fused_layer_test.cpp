// Hopper's kernel for few tokens, stage by stage, and the backend that the tests beside it run.
#include <gtest/gtest.h>

#include "layer_soundness.h"
#include "sm90/fused_layer.h"

namespace fourfold {

const Backend& tested_backend() {
  return sm90_backend();
}

std::string why_not_on_this_gpu() {
  return sm90_backend().why_unavailable();
}

namespace {

/// Few tokens and many experts: the kernel that has both GEMMs and combine (sm90/fused_layer.h), with x
/// staged in it or before it, more rows than a tile has, and K that no number of parts divides.
TEST(Sm90FusedLayer, IsSoundInOneKernel) {
  const RandomLayerShape shapes[] = {
      {1, 64, 64, 3, 1},     {1, 2048, 768, 9, 8}, {2, 7168, 128, 12, 3}, {3, 320, 2880, 16, 4},
      {4, 256, 128, 64, 8},  {9, 320, 192, 60, 7}, {12, 512, 64, 80, 8},  {40, 64, 448, 128, 4},
      {30, 64, 320, 300, 8}, {1, 16384, 64, 4, 4},
  };
  const LayerOptions options[] = {
      options_for(ActivationFormat::kNvfp4), options_for(ActivationFormat::kBf16),
      options_for(ActivationFormat::kNvfp4, ScalePolicy::kDynamicToken, ScalePolicy::kMaxOverExperts)};
  uint64_t salt = 250;
  size_t turn = 0;  // every shape has every assignment and every option; every pair of those comes up
  for (RandomLayerShape shape : shapes) {
    ++turn;
    for (const Assignment assignment :
         {Assignment::kUniform, Assignment::kOneExpert, Assignment::kRepeated}) {
      const LayerOptions& chosen = options[turn++ % std::size(options)];
      shape.assignment = assignment;
      shape.biases = ++salt % 3 == 0 ? Biases::kAll : Biases::kNone;
      if (salt % 4 == 0) shape.activation = {ActivationKind::kSwiglu, 1.702f, 1.0f, 3.0f};
      LayerConfig config;
      config.experts = shape.experts;
      config.hidden = shape.hidden;
      config.intermediate = shape.intermediate;
      config.top_k = shape.top_k;
      ASSERT_TRUE(sm90::can_fuse(config, chosen, shape.tokens * shape.top_k));
      expect_sound(shape, chosen, salt);
    }
  }
}

}  // namespace
}  // namespace fourfold
