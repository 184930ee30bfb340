// The quantizer's sequence on hand-worked blocks; the numpy oracle covers the breadth.
#include "fourfold/quantize.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "fourfold/error.h"
#include "numeric/block_quantizer.h"

namespace fourfold {
namespace {

using Block = std::array<float, 16>;

struct Quantized {
  std::array<uint8_t, 8> codes{};
  uint8_t scale = 0;
  uint8_t code(int i) const {
    return static_cast<uint8_t>((codes[static_cast<size_t>(i / 2)] >> (4 * (i % 2))) & 15);
  }
};

constexpr Quantized quantize_block(const Block& x, float global, bool modelopt_floor = false) {
  Quantized q;
  q.scale = quantize_nvfp4_block(x.data(), global, modelopt_floor, q.codes.data());
  return q;
}

// At compile time: amax 6, g 1: t = 1, s = 1.0, codes are the values' own.
static_assert(quantize_block({6, 4, 3, 2}, 1.0f).scale == kE4m3One);
static_assert(quantize_block({6, 4, 3, 2}, 1.0f).codes[0] == 0x67);

TEST(QuantizeNvfp4, PutsTheEvenIndexInTheLowNibble) {
  const Quantized q = quantize_block({1, 2, 6}, 1.0f);
  EXPECT_EQ(q.codes[0], 0x42);  // 1.0 is code 2, 2.0 is code 4
}

TEST(QuantizeNvfp4, RoundsTiesToEven) {
  const Quantized q = quantize_block({6, 5, 3.5f, 2.5f, 1.75f, 1.25f, 0.75f, 0.25f, -0.25f, -5}, 1.0f);
  const uint8_t expected[] = {7, 6, 6, 4, 4, 2, 2, 0, 8, 14};
  for (int i = 0; i < 10; ++i) EXPECT_EQ(q.code(i), expected[i]) << i;
}

TEST(QuantizeNvfp4, SaturatesWhenTheGlobalScaleIsTooSmall) {
  const Quantized q = quantize_block({6000, -3}, 1.0f);  // t = 1000 > 448
  EXPECT_EQ(q.scale, kE4m3MaxCode);
  EXPECT_EQ(q.code(0), 7);
}

TEST(QuantizeNvfp4, GivesSignedZerosWhenTheScaleUnderflows) {
  const Quantized q = quantize_block({1e-6f, -1e-6f}, 1.0f);
  EXPECT_EQ(q.scale, 0);
  EXPECT_EQ(q.code(0), 0);
  EXPECT_EQ(q.code(1), 8);
}

TEST(QuantizeNvfp4, FollowsModelOptsFloorForWeights) {
  EXPECT_EQ(quantize_block({}, 1.0f, true).scale, kE4m3One);
  EXPECT_EQ(quantize_block({1e-6f}, 1.0f, true).scale, kE4m3SmallestCode);
  EXPECT_EQ(quantize_block({}, 1.0f, false).scale, 0);
}

TEST(QuantizeNvfp4, ShowsNanAndInfinityInTheScale) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Block x{1, 2, 3};
    x[7] = bad;
    EXPECT_EQ(quantize_block(x, 1.0f).scale, kE4m3NanCode);
    x = {bad, 1};  // amax must not swallow it wherever it stands
    EXPECT_EQ(quantize_block(x, 1.0f).scale, kE4m3NanCode);
  }
}

TEST(QuantizeNvfp4, IsIdempotentOnItsOwnValues) {
  std::vector<float> x(64 * 16);
  for (size_t i = 0; i < x.size(); ++i)
    x[i] = std::sin(static_cast<float>(i)) * static_cast<float>(1 + i / 100);
  const MatrixView<const float> matrix(x.data(), 64, 16);
  const BlockScaledMatrix once = quantize_nvfp4(matrix, nvfp4_global_scale(absolute_maximum(matrix)));
  const std::vector<float> values = dequantize(once.view());
  const BlockScaledMatrix twice = quantize_nvfp4({values.data(), 64, 16}, once.global.value);
  EXPECT_EQ(dequantize(twice.view()), values);
}

TEST(QuantizeNvfp4, RefusesRowsThatAreNotWholeBlocks) {
  const std::vector<float> x(24);
  EXPECT_THROW(quantize_nvfp4({x.data(), 1, 24}, 1.0f), Error);
}

TEST(QuantizeNvfp4x2, LeavesLessThanOneTerm) {
  std::vector<float> x(16);
  for (size_t i = 0; i < 16; ++i) x[i] = 0.37f * static_cast<float>(i) - 2.9f;
  std::array<uint8_t, 8> codes, residual_codes;
  uint8_t scale, residual_scale;
  const float global = nvfp4_global_scale(2.9f);
  quantize_row_nvfp4x2(x, global, codes.data(), &scale, residual_codes.data(), &residual_scale);
  const auto term = [&](const std::array<uint8_t, 8>& packed, uint8_t s, size_t i) {
    return decode_e2m1(static_cast<uint8_t>(packed[i / 2] >> (4 * (i % 2)))) * decode_e4m3(s) * global;
  };
  for (size_t i = 0; i < 16; ++i) {
    const float one = term(codes, scale, i), two = one + term(residual_codes, residual_scale, i);
    EXPECT_LE(std::abs(x[i] - two), std::abs(x[i] - one) + 1e-6f);
    EXPECT_LT(std::abs(x[i] - two), 0.05f);
  }
}

TEST(DynamicScale, HasAFloorThatKeepsReciprocalsFinite) {
  EXPECT_EQ(nvfp4_global_scale(0.0f), 1.0f);
  EXPECT_EQ(nvfp4_global_scale(2688.0f), 1.0f);
  const float tiny = 0x1p-130f;
  EXPECT_EQ(nvfp4_global_scale(tiny), kSmallestDynamicScale);
  const Quantized q = quantize_block({tiny, 0.0f, -tiny}, nvfp4_global_scale(tiny));
  for (int i = 0; i < 16; ++i) EXPECT_EQ(q.code(i) & 7, 0) << i;  // without the floor, zeros became 6
  EXPECT_TRUE(std::isnan(nvfp4_global_scale(std::numeric_limits<float>::quiet_NaN())));
}

TEST(CastMxfp4, IsExactWithinSeventeenOctavesAndCountsWhatIsNot) {
  // Blocks with scales 2^0, 2^-17 and 2^-18; all codes 0.5, so that the last one can't be halved.
  const std::vector<uint8_t> codes(48, 0x11), scales = {127, 110, 109};
  const BlockScaledView mxfp4{QuantFormat::kMxfp4, 1, 96, {codes.data(), 1, 48}, scales.data(), 3, {}, {}};
  CastReport report;
  const BlockScaledMatrix nvfp4 = cast_mxfp4_to_nvfp4(mxfp4, &report);
  EXPECT_EQ(nvfp4.global.value, 0x1p-8f);
  EXPECT_EQ(report.blocks, 3);
  EXPECT_EQ(report.recoded, 1);
  EXPECT_EQ(report.inexact, 1);
  const std::vector<float> before = dequantize(mxfp4), after = dequantize(nvfp4.view());
  for (size_t i = 0; i < 64; ++i) EXPECT_EQ(after[i], before[i]);
}

TEST(CastMxfp4, IgnoresTheExponentsOfZeroBlocks) {
  std::vector<uint8_t> codes(32, 0x00), scales = {254, 127};
  codes[16] = 0x01;  // the second block holds one 0.5; the first only zeros
  const BlockScaledView mxfp4{QuantFormat::kMxfp4, 1, 64, {codes.data(), 1, 32}, scales.data(), 2, {}, {}};
  CastReport report;
  const BlockScaledMatrix nvfp4 = cast_mxfp4_to_nvfp4(mxfp4, &report);
  EXPECT_EQ(report.recoded, 0);
  EXPECT_EQ(dequantize(nvfp4.view()), dequantize(mxfp4));
}

TEST(CastMxfp4, RefusesNanScales) {
  const std::vector<uint8_t> codes(16, 0x11), scales = {0xFF};
  const BlockScaledView mxfp4{QuantFormat::kMxfp4, 1, 32, {codes.data(), 1, 16}, scales.data(), 1, {}, {}};
  EXPECT_THROW(cast_mxfp4_to_nvfp4(mxfp4), Error);
}

/// 4 and 3 in turn, global scale 1: amax / 6 is 0.6875 in e4m3, by which they become 4.125 and 2.75; amax / 4
/// is 1, by which they are exact. Twice that is exact too, and comes later.
TEST(ScaleRules, TakeTheScaleWithTheSmallerError) {
  std::array<float, 16> x;
  for (size_t i = 0; i < x.size(); ++i) x[i] = i % 2 == 0 ? 4.0f : 3.0f;
  for (const ScaleRule rule : {ScaleRule::kAmax, ScaleRule::kFourOverSix, ScaleRule::kMse}) {
    std::array<uint8_t, 8> codes = {};
    uint8_t scale = 0;
    quantize_weight_row_nvfp4(x, 1.0f, rule, codes.data(), &scale);
    const bool searches = rule != ScaleRule::kAmax;
    EXPECT_EQ(scale, searches ? 0x38 : 0x33) << to_string(rule);
    EXPECT_EQ(codes[0], searches ? 0x56 : 0x67) << to_string(rule);
  }
}

TEST(ScaleRules, LeaveBlocksOfZerosAsModelOptWritesThem) {
  const std::array<float, 16> zeros = {};
  for (const ScaleRule rule : {ScaleRule::kFourOverSix, ScaleRule::kMse}) {
    std::array<uint8_t, 8> codes;
    codes.fill(0xFF);
    uint8_t scale = 0;
    quantize_weight_row_nvfp4(zeros, 1.0f, rule, codes.data(), &scale);
    EXPECT_EQ(scale, 0x38);
    EXPECT_EQ(codes, (std::array<uint8_t, 8>{}));
  }
}

/// One block 18 octaves below the largest: of odd codes, which halving rounds, and of 2s, which it does not.
TEST(Cast, CountsBeforehandWhatItWillRound) {
  for (const uint8_t pair : {uint8_t{0x11}, uint8_t{0x44}, uint8_t{0x00}}) {
    std::vector<uint8_t> codes(32, 0x22);
    std::fill(codes.begin() + 16, codes.end(), pair);
    const std::vector<uint8_t> scales = {127, 127 - 18};
    const BlockScaledView view{QuantFormat::kMxfp4, 1, 64, {codes.data(), 1, 32}, scales.data(), 2, {}, {}};
    CastReport done;
    cast_mxfp4_to_nvfp4(view, &done);
    const CastReport counted = count_cast(view, largest_mxfp4_exponent(view));
    EXPECT_EQ(counted.blocks, done.blocks);
    EXPECT_EQ(counted.recoded, done.recoded);
    EXPECT_EQ(counted.inexact, done.inexact);
    EXPECT_EQ(counted.recoded, pair != 0x00);
    EXPECT_EQ(counted.inexact, pair == 0x11);
  }
}

}  // namespace
}  // namespace fourfold
