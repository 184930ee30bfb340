// Sizes of Hopper's fused layer kernel, without a GPU: shared memory for the shapes of real models, and which
// layers it is taken for.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "bench/shapes.h"
#include "sm90/fused_layer.h"
#include "sm90/fused_layer_layout.h"

namespace fourfold::sm90 {
namespace {

LayerConfig config_of(int64_t experts, int64_t hidden, int64_t intermediate, int64_t top_k) {
  LayerConfig config;
  config.experts = experts;
  config.hidden = hidden;
  config.intermediate = intermediate;
  config.top_k = top_k;
  return config;
}

LayerOptions bf16() {
  LayerOptions options;
  options.activations = ActivationFormat::kBf16;
  return options;
}

int32_t units_of(int64_t hidden, int64_t intermediate) {
  return static_cast<int32_t>(std::max(hidden, intermediate) / kUnitDepth);
}

TEST(Sm90FusedLayout, FitsSharedMemoryWithEnoughWeightsInFlightForEveryModel) {
  for (const ModelShape& shape : kModelShapes) {
    SCOPED_TRACE(shape.name);
    const int32_t most = fused_tile_tokens(shape.hidden, shape.intermediate);
    ASSERT_GE(most, 1);
    for (int32_t tokens = 1; tokens <= most; ++tokens) {
      const int32_t units = units_of(shape.hidden, shape.intermediate);
      const FusedSizes sizes = size_fused_layer(units, tokens);
      const FusedShared layout(units, tokens, sizes.token_buffers, sizes.stages);
      EXPECT_LE(layout.end, 227u * 1024);
      EXPECT_GE(sizes.token_buffers, 2);
      EXPECT_LE(sizes.token_buffers, kFusedMostTokenBuffers);
      EXPECT_GE(sizes.stages, 7);  // 65 KB: 3 TB/s x 2.8 us / 132
      EXPECT_LE(sizes.stages, kFusedMostStages);
      EXPECT_EQ(layout.token_row_bytes % 128, 16u) << "eight rows at the same k share banks";
      for (const uint32_t vector :
           {layout.tokens, layout.token_buffer_bytes, layout.partials, layout.stage_tiles, layout.queue}) {
        EXPECT_EQ(vector % 16, 0u);
      }
      for (const uint32_t barrier :
           {layout.token_tiles, layout.full, layout.empty, layout.tokens_full, layout.tokens_empty,
            layout.queued, layout.partials_full, layout.partials_free, layout.nearly_asked}) {
        EXPECT_EQ(barrier % 8, 0u);
      }
    }
  }
}

/// Every lane of a token that a tile may have writes 16 bytes of its own, inside the buffer.
TEST(Sm90FusedLayout, GivesEveryPartialSumAPlaceOfItsOwn) {
  for (int32_t tokens = 1; tokens <= 8; ++tokens) {
    const FusedShared layout(32, tokens, 2, 4);
    std::set<uint32_t> places;
    size_t writers = 0;
    for (uint32_t finisher = 0; finisher < kFusedFinishers; ++finisher) {
      for (uint32_t part = 0; part < kFusedParts; ++part) {
        for (uint32_t slab = 0; slab < 4; ++slab) {
          for (uint32_t lane = 0; lane < 32; ++lane) {
            if (static_cast<int32_t>(lane % 4 * 2) >= tokens) continue;
            const uint32_t at = layout.partial(finisher, part, slab, lane);
            EXPECT_GE(at, layout.partials);
            EXPECT_LE(at + 16, layout.stage_tiles);
            places.insert(at);
            ++writers;
          }
        }
      }
    }
    EXPECT_EQ(places.size(), writers);
  }
}

TEST(Sm90FusedLayout, IsTakenWhereExpertsHaveFewRows) {
  const LayerConfig qwen = config_of(128, 2048, 768, 8);
  EXPECT_TRUE(can_fuse(qwen, bf16(), 8));
  EXPECT_TRUE(can_fuse(qwen, bf16(), 4 * 8));
  EXPECT_FALSE(can_fuse(qwen, bf16(), 5 * 8));  // 106 MB of weights, and more than a handful of slots
  const LayerConfig flash = config_of(256, 4096, 2048, 6);
  EXPECT_TRUE(can_fuse(flash, bf16(), 2 * 6));   // 170 MB, a handful
  EXPECT_FALSE(can_fuse(flash, bf16(), 3 * 6));  // 255 MB
  const LayerConfig small = config_of(128, 512, 768, 8);
  EXPECT_TRUE(can_fuse(small, bf16(), 16 * 8));
  EXPECT_FALSE(can_fuse(small, bf16(), 64 * 8));  // 4 rows an expert
  EXPECT_FALSE(can_fuse(qwen, bf16(), 0));
  // One token has no more than a row an expert, however few experts there are.
  const LayerConfig mixtral = config_of(8, 4096, 14336, 2);
  EXPECT_TRUE(can_fuse(mixtral, bf16(), 2));
  EXPECT_FALSE(can_fuse(mixtral, bf16(), 4 * 2));
  // What the kernel's lists have room for.
  EXPECT_FALSE(can_fuse(config_of(2000, 512, 512, 8), bf16(), 8));
  EXPECT_FALSE(can_fuse(config_of(512, 64, 64, 4), bf16(), 516));
}

TEST(Sm90FusedLayout, LeavesOtherLayersToTheSeparateKernels) {
  const LayerConfig plain = config_of(128, 2048, 768, 8);
  LayerOptions options;
  EXPECT_TRUE(can_fuse(plain, options, 8));
  options.x_scale = ScalePolicy::kDynamicToken;  // x is staged before
  EXPECT_TRUE(can_fuse(plain, options, 8));
  options.intermediate_scale = ScalePolicy::kDynamicToken;
  EXPECT_FALSE(can_fuse(plain, options, 8));
  for (const ActivationFormat format : {ActivationFormat::kFp8, ActivationFormat::kNvfp4x2}) {
    LayerOptions other;
    other.activations = format;
    EXPECT_FALSE(can_fuse(plain, other, 8));
  }
  LayerConfig other = plain;
  other.activation.kind = ActivationKind::kGeglu;
  EXPECT_FALSE(can_fuse(other, bf16(), 8));
  other = plain;
  other.weight_on_input = true;
  EXPECT_FALSE(can_fuse(other, bf16(), 8));
  EXPECT_FALSE(can_fuse(config_of(128, 2048 + 16, 768, 8), bf16(), 8));
  EXPECT_FALSE(can_fuse(config_of(128, 2048, 768 + 16, 8), bf16(), 8));
}

}  // namespace
}  // namespace fourfold::sm90
