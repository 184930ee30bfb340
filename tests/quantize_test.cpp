// The quantizer's sequence on hand-worked blocks; the numpy oracle covers the breadth.
#include "fourfold/quantize.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "fourfold/error.h"
#include "fourfold/scale_layout.h"
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
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t size = 1 + i / 100;
    x[i] = std::sin(static_cast<float>(i)) * static_cast<float>(size);
  }
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

// With g = 4: block 0 has scale 1 and loses 5.25 - 6 and 5.25 - 6 to rounding, whose scale is 0.75 / 6; block
// 1 twice that; block 2 is exact, so that a residual of zeros stores no scale.
TEST(QuantizeNvfp4x2, QuantizesWhatEveryBlockLost) {
  constexpr float kGlobal = 4.0f;
  std::vector<float> x(48, 0.0f);
  x[0] = 6, x[1] = 5.25f, x[15] = -5.25f;
  x[16] = 10.5f, x[17] = 12, x[31] = 10.5f;
  x[32] = 6;
  for (float& value : x) value *= kGlobal;
  std::array<uint8_t, 24> codes, residual_codes;
  std::array<uint8_t, 3> scales, residual_scales;
  quantize_row_nvfp4x2(x, kGlobal, codes.data(), scales.data(), residual_codes.data(),
                       residual_scales.data());
  EXPECT_EQ(scales, (std::array<uint8_t, 3>{0x38, 0x40, 0x38}));           // 1, 2, 1
  EXPECT_EQ(residual_scales, (std::array<uint8_t, 3>{0x20, 0x28, 0x00}));  // 1/8, 1/4, 0
  std::array<uint8_t, 24> expected{}, expected_residual{};
  expected[0] = 0x77, expected[7] = 0xF0;
  expected[8] = 0x77, expected[15] = 0x70;
  expected[16] = 0x07;
  expected_residual[0] = 0xF0, expected_residual[7] = 0x70;
  expected_residual[8] = 0x0F, expected_residual[15] = 0xF0;
  EXPECT_EQ(codes, expected);
  EXPECT_EQ(residual_codes, expected_residual);
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

/// A matrix of MXFP4 whose blocks all have scale 2^0 and codes 0, but for what is changed.
struct Mxfp4Matrix {
  int64_t rows, blocks;  ///< blocks a row
  std::vector<uint8_t> codes = std::vector<uint8_t>(static_cast<size_t>(rows * blocks * 16));
  std::vector<uint8_t> scales = std::vector<uint8_t>(static_cast<size_t>(rows * blocks), 127);

  void set_code(int64_t row, int64_t col, int code) {
    uint8_t& pair = codes[static_cast<size_t>(row * blocks * 16 + col / 2)];
    pair = static_cast<uint8_t>(col % 2 == 0 ? (pair & 0xF0) | code : (pair & 0x0F) | (code << 4));
  }
  BlockScaledView view() const {
    return {QuantFormat::kMxfp4, rows,   blocks * 32, {codes.data(), rows, blocks * 16},
            scales.data(),       blocks, {},          {}};
  }
};

// What counts is whether a block holds a nonzero code, whichever and wherever: one that does decides the
// largest exponent, and, 18 octaves below another, is recoded.
TEST(CastMxfp4, FindsANonzeroCodeWhereverItStands) {
  for (int position = 0; position < 32; ++position) {
    for (int code = 0; code < 16; ++code) {
      const bool nonzero = (code & 7) != 0;
      Mxfp4Matrix matrix{2, 2};
      matrix.scales = {127, 127, 127, 127 - 18};
      matrix.set_code(1, 32 + position, code);
      EXPECT_EQ(largest_mxfp4_exponent(matrix.view()), nonzero ? -18 : kNoExponent)
          << position << " " << code;
      matrix.set_code(0, 0, 1);
      CastReport done;
      cast_mxfp4_to_nvfp4(matrix.view(), &done);
      EXPECT_EQ(done.recoded, nonzero) << position << " " << code;
      EXPECT_EQ(count_cast(matrix.view(), 0).recoded, nonzero) << position << " " << code;
    }
  }
}

// Magnitudes 0, 0.5, 1, 1.5, 2, 3, 4 and 6 divided by 2, 4, 8, 16 and 32, as codes; ties to even.
TEST(CastMxfp4, RoundsEveryCodeOfABlockThatIsTooSmall) {
  constexpr std::array<std::array<uint8_t, 8>, 5> kShifted = {{{0, 0, 1, 2, 2, 3, 4, 5},
                                                               {0, 0, 0, 1, 1, 2, 2, 3},
                                                               {0, 0, 0, 0, 0, 1, 1, 2},
                                                               {0, 0, 0, 0, 0, 0, 0, 1},
                                                               {0, 0, 0, 0, 0, 0, 0, 0}}};
  for (const int shift : {1, 2, 3, 4, 5, 100}) {
    const std::array<uint8_t, 8>& shifted = kShifted[static_cast<size_t>(std::min(shift, 5) - 1)];
    Mxfp4Matrix matrix{2, 2};
    matrix.set_code(0, 5, 7);
    matrix.scales[3] = static_cast<uint8_t>(127 - 17 - shift);
    Mxfp4Matrix expected = matrix;
    for (int i = 0; i < 32; ++i) {
      const int code = (i * 5 + i / 16) % 16;  // each code at an even and at an odd position
      matrix.set_code(1, 32 + i, code);
      expected.set_code(1, 32 + i, shifted[static_cast<size_t>(code & 7)] | (code & 8));
    }
    CastReport report;
    const BlockScaledMatrix nvfp4 = cast_mxfp4_to_nvfp4(matrix.view(), &report);
    EXPECT_EQ(nvfp4.codes, expected.codes) << shift;
    EXPECT_EQ(nvfp4.scales, (std::vector<uint8_t>{0x78, 0x78, 0x78, 0x78, 0x78, 0x78, 0x01, 0x01})) << shift;
    EXPECT_EQ(report.recoded, 1);
    EXPECT_EQ(report.inexact, 1);
    EXPECT_EQ(count_cast(matrix.view(), 0).inexact, 1);
  }
}

// One code in a block of zeros, wherever it stands, is what makes the block inexact: 1 / 2 is a number of
// e2m1, 0.5 / 2 is none.
TEST(CastMxfp4, CountsAsInexactWhatChangesAValueWhereverItStands) {
  for (int position = 0; position < 32; ++position) {
    for (const int code : {2, 10, 1, 9}) {
      Mxfp4Matrix matrix{1, 2};
      matrix.set_code(0, 0, 1);
      matrix.set_code(0, 32 + position, code);
      matrix.scales[1] = 127 - 18;
      const bool inexact = code % 2 == 1;
      CastReport done;
      cast_mxfp4_to_nvfp4(matrix.view(), &done);
      EXPECT_EQ(done.inexact, inexact) << position << " " << code;
      EXPECT_EQ(count_cast(matrix.view(), 0).inexact, inexact) << position << " " << code;
    }
  }
}

// ---- what hangs on a single bit ----

TEST(BlockQuantizer, TakesEveryBitOfAMagnitude) {
  const float odd = float_from_bits(0x3F800001), even = 1.0f;
  EXPECT_EQ(max_magnitude(even, -odd), odd);
  EXPECT_EQ(max_magnitude(odd, even), odd);
  EXPECT_TRUE(is_finite(std::numeric_limits<float>::max()));
  EXPECT_FALSE(is_finite(-std::numeric_limits<float>::infinity()));
  EXPECT_FALSE(is_finite(float_from_bits(0x7F800001)));  // a signalling NaN: its lowest bit alone
  EXPECT_FALSE(is_finite(std::numeric_limits<float>::quiet_NaN()));
}

// amax / 6 = 1.0625 and 1.1875 lie between two numbers of e4m3, the even ones of which are 1 and 1.25.
TEST(BlockQuantizer, RoundsAScaleThatIsATieToEven) {
  EXPECT_EQ(nvfp4_block_scale(6.375f, 1.0f, false), 0x38);
  EXPECT_EQ(nvfp4_block_scale(7.125f, 1.0f, false), 0x3A);
}

TEST(BlockQuantizer, KeepsTheScaleOfZerosAndOfTheSmallest) {
  EXPECT_EQ(nvfp4_block_scale(0.0f, 1.0f, true), 0x38);
  EXPECT_EQ(nvfp4_block_scale(1e-10f, 1.0f, true), 0x01);
  EXPECT_EQ(nvfp4_block_scale(1e-10f, 1.0f, false), 0x00);
  EXPECT_EQ(nvfp4_reciprocal(0, 1.0f), 0.0f);
  EXPECT_EQ(nvfp4_reciprocal(0x40, 0.5f), 1.0f);
}

TEST(DynamicScale, IsAtLeastTwoToTheMinusHundred) {
  EXPECT_EQ(dynamic_scale(0x1p-99f, 1.0f), 0x1p-99f);
  EXPECT_EQ(dynamic_scale(0x1p-101f, 1.0f), 0x1p-100f);
}

/// `x` over and over, quantized with g = 1 by `rule`: scale and first code.
std::pair<int, int> choice(std::initializer_list<float> x, ScaleRule rule) {
  std::array<float, 16> block;
  for (size_t i = 0; i < block.size(); ++i) block[i] = x.begin()[std::min(i, x.size() - 1)];
  std::array<uint8_t, 8> codes{};
  uint8_t scale = 0;
  quantize_weight_row_nvfp4(block, 1.0f, rule, codes.data(), &scale);
  return {scale, codes[0] & 15};
}

// amax / 4 is 1.0625 and 1.1875, ties again; 15 of 16 values are exact by 1 and 1.25, and by no scale beside
// them.
TEST(ScaleRules, RoundTheScaleOfFourThatIsATieToEven) {
  EXPECT_EQ(choice({4.25f, 3.0f}, ScaleRule::kFourOverSix), std::pair(0x38, 6));
  EXPECT_EQ(choice({4.75f, 3.75f}, ScaleRule::kFourOverSix), std::pair(0x3A, 6));
}

// In units of 2^-9, where e4m3 counts in ones: 16.5, 11 and 5.5 are exact by 11 alone, eight codes above
// round(16.5 / 6) = 3; 11 and 5.5 start from round(11 / 6) = 2, from where 11 is nine codes away.
TEST(ScaleRules, SearchAnOctaveAndNoFarther) {
  constexpr float kUnit = 0x1p-9f;
  EXPECT_EQ(choice({16.5f * kUnit, 11 * kUnit, 5.5f * kUnit}, ScaleRule::kMse), std::pair(11, 3));
  EXPECT_NE(choice({11 * kUnit, 5.5f * kUnit}, ScaleRule::kMse).first, 11);
}

// Errors of tiny values count, too: 4 and 3 in turn, times 2^-30.
TEST(ScaleRules, CompareErrorsOfAnySize) {
  std::array<float, 16> x;
  for (size_t i = 0; i < x.size(); ++i) x[i] = (i % 2 == 0 ? 4.0f : 3.0f) * 0x1p-30f;
  for (const ScaleRule rule : {ScaleRule::kFourOverSix, ScaleRule::kMse}) {
    std::array<uint8_t, 8> codes{};
    uint8_t scale = 0;
    quantize_weight_row_nvfp4(x, 0x1p-30f, rule, codes.data(), &scale);
    EXPECT_EQ(scale, 0x38) << to_string(rule);
    EXPECT_EQ(codes[0], 0x56) << to_string(rule);
  }
}

// A row of blocks is its blocks one by one, and nothing is written behind it.
TEST(ScaleRules, TreatEveryBlockOfARowAlone) {
  std::array<float, 48> x;
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t size = 1 + i / 16;
    x[i] = std::sin(static_cast<float>(i)) * static_cast<float>(size);
  }
  for (const ScaleRule rule : {ScaleRule::kAmax, ScaleRule::kFourOverSix, ScaleRule::kMse}) {
    std::array<uint8_t, 32> codes, expected;
    codes.fill(0xAA), expected.fill(0xAA);
    std::array<uint8_t, 4> scales, expected_scales;
    scales.fill(0xAA), expected_scales.fill(0xAA);
    quantize_weight_row_nvfp4(x, 0.01f, rule, codes.data(), scales.data());
    for (size_t block = 0; block < 3; ++block) {
      std::array<uint8_t, 16> room;  // of one block's codes and more
      quantize_weight_row_nvfp4(std::span(x).subspan(16 * block, 16), 0.01f, rule, room.data(),
                                &expected_scales[block]);
      std::copy_n(room.begin(), 8, expected.begin() + static_cast<int64_t>(8 * block));
    }
    EXPECT_EQ(codes, expected) << to_string(rule);
    EXPECT_EQ(scales, expected_scales) << to_string(rule);
  }
}

TEST(ScaleRules, HaveTheirNames) {
  for (const ScaleRule rule : {ScaleRule::kAmax, ScaleRule::kFourOverSix, ScaleRule::kMse}) {
    EXPECT_EQ(parse_scale_rule(to_string(rule)), rule);
  }
  EXPECT_EQ(parse_scale_rule("max"), std::nullopt);
  EXPECT_EQ(parse_scale_rule(""), std::nullopt);
}

// ---- MXFP4 ----

struct Mxfp4Block {
  std::array<uint8_t, 16> codes{};
  uint8_t scale = 0;
};

Mxfp4Block quantize_mxfp4_block(std::initializer_list<float> x) {
  std::array<float, 32> values{};
  std::copy(x.begin(), x.end(), values.begin());
  Mxfp4Block block;
  quantize_row_mxfp4(values, block.codes.data(), &block.scale);
  return block;
}

TEST(QuantizeMxfp4, TakesTheExponentTwoBelowTheLargest) {
  const Mxfp4Block block = quantize_mxfp4_block({7.9f, -4.0f, 0.5f});
  EXPECT_EQ(block.scale, 127);
  EXPECT_EQ(block.codes[0], 0xE7);
  EXPECT_EQ(block.codes[1], 0x01);
  EXPECT_EQ(quantize_mxfp4_block({8.0f}).scale, 128);
}

TEST(QuantizeMxfp4, HasScalesAtBothEndsOfItsRange) {
  EXPECT_EQ(quantize_mxfp4_block({0.0f}).scale, 0);
  EXPECT_EQ(quantize_mxfp4_block({0x1p-140f}).scale, 0);
  EXPECT_EQ(quantize_mxfp4_block({0x1p-140f}).codes[0], 0);
  EXPECT_EQ(quantize_mxfp4_block({std::numeric_limits<float>::max()}).scale, 252);
  const Mxfp4Block bad = quantize_mxfp4_block({1.0f, std::numeric_limits<float>::infinity()});
  EXPECT_EQ(bad.scale, 0xFF);
  for (const uint8_t pair : bad.codes) EXPECT_EQ(pair, 0x77);
}

TEST(QuantizeMxfp4, QuantizesWholeMatricesRowByRow) {
  std::vector<float> x(2 * 64, 0.0f);
  x[0] = 4.0f;
  x[32] = 8.0f;
  x[64 + 33] = 16.0f;
  const BlockScaledMatrix matrix = quantize_mxfp4({x.data(), 2, 64});
  EXPECT_EQ(matrix.scales, (std::vector<uint8_t>{127, 128, 0, 129}));
  EXPECT_EQ(dequantize(matrix.view()), x);
  EXPECT_THROW(quantize_mxfp4({x.data(), 1, 48}), Error);
}

TEST(CastMxfp4, TakesLargestExponentsOfTheWholeRangeAndNoOther) {
  const std::vector<uint8_t> codes(16, 0x11);
  for (const auto& [scale, kmax] : {std::pair<uint8_t, int>{0, -127}, {254, 127}}) {
    const BlockScaledView view{QuantFormat::kMxfp4, 1, 32, {codes.data(), 1, 16}, &scale, 1, {}, {}};
    EXPECT_EQ(largest_mxfp4_exponent(view), kmax);
    EXPECT_EQ(cast_mxfp4_to_nvfp4(view, kmax, nullptr).global.value, power_of_two(kmax - 8));
  }
  const uint8_t scale = 0;
  const BlockScaledView view{QuantFormat::kMxfp4, 1, 32, {codes.data(), 1, 16}, &scale, 1, {}, {}};
  EXPECT_THROW(cast_mxfp4_to_nvfp4(view, 128, nullptr), Error);
  EXPECT_THROW(cast_mxfp4_to_nvfp4(view, -128, nullptr), Error);
  const std::vector<uint8_t> zeros(16, 0);  // which no exponent is too small for
  const BlockScaledView empty{QuantFormat::kMxfp4, 1, 32, {zeros.data(), 1, 16}, &scale, 1, {}, {}};
  EXPECT_THROW(cast_mxfp4_to_nvfp4(empty, -128, nullptr), Error);
}

TEST(CastMxfp4, OfZerosKeepsTheirScalesWithinE4m3) {
  const std::vector<uint8_t> codes(32, 0x80), scales = {127, 254};
  const BlockScaledView view{QuantFormat::kMxfp4, 1, 64, {codes.data(), 1, 32}, scales.data(), 2, {}, {}};
  EXPECT_EQ(largest_mxfp4_exponent(view), kNoExponent);
  const BlockScaledMatrix nvfp4 = cast_mxfp4_to_nvfp4(view);
  EXPECT_EQ(nvfp4.global.value, 1.0f);
  EXPECT_EQ(nvfp4.codes, codes);
  EXPECT_EQ(nvfp4.scales, (std::vector<uint8_t>{0x38, 0x38, 0x78, 0x78}));  // 1 and 2^8
}

// ---- FP8 and views ----

TEST(QuantizeFp8, GivesATileItsScale) {
  // 3 x 5 in tiles of 2: the tile at (1, 2), cut short, holds one value.
  std::vector<float> x(15, 0.0f);
  x[0] = 448.0f, x[6] = -224.0f, x[14] = 3.0f;
  for (const TileScaleType type : {TileScaleType::kF32, TileScaleType::kE8m0}) {
    const Fp8Matrix matrix = quantize_fp8_tiles({x.data(), 3, 5}, type, 2);
    const Fp8View view = matrix.view();
    ASSERT_EQ(view.tiles_per_row(), 3);
    EXPECT_EQ(matrix.scales.size(), type == TileScaleType::kF32 ? 24u : 6u);
    EXPECT_EQ(view.scale(0, 0), 1.0f);
    EXPECT_EQ(view.scale(1, 4), 1.0f);  // a tile of zeros
    // 3 / 448 is between 2^-8 and 2^-7, to which e8m0 rounds up.
    EXPECT_EQ(view.scale(2, 4), type == TileScaleType::kF32 ? 3.0f / 448.0f : 0x1p-7f);
    EXPECT_EQ(matrix.codes[14], type == TileScaleType::kF32 ? 0x7E : encode_e4m3(384.0f));
    EXPECT_EQ(dequantize(view)[6], -224.0f);
    EXPECT_EQ(dequantize(view)[0], 448.0f);
  }
  EXPECT_EQ(quantize_fp8_tiles({x.data(), 3, 5}, TileScaleType::kF32).tile, 128);
  EXPECT_EQ(quantize_fp8_tiles({x.data(), 3, 4}, TileScaleType::kF32, 2).view().tiles_per_row(), 2);
}

TEST(QuantizeFp8, ShowsNanAndInfinityInATilesScale) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    const std::vector<float> x = {1.0f, bad, 1.0f, 448.0f};
    const Fp8Matrix e8m0 = quantize_fp8_tiles({x.data(), 1, 4}, TileScaleType::kE8m0, 2);
    EXPECT_EQ(e8m0.scales, (std::vector<std::byte>{std::byte{0xFF}, std::byte{127}}));
    const std::vector<float> values = dequantize(e8m0.view());
    EXPECT_TRUE(std::isnan(values[0]) && std::isnan(values[1]));
    EXPECT_EQ(values[3], 448.0f);
    const Fp8Matrix f32 = quantize_fp8_tiles({x.data(), 1, 4}, TileScaleType::kF32, 2);
    EXPECT_FALSE(std::isfinite(f32.view().scale(0, 0)));
    EXPECT_TRUE(std::isnan(dequantize(f32.view())[1]));
  }
}

// Scale 1, by which 1.0625 and 1.1875 are ties: a reciprocal that is not 1 tips one of them.
TEST(QuantizeFp8, RoundsTiesOfARowToEven) {
  const std::vector<float> x = {448.0f, 1.0625f, 1.1875f};
  std::vector<uint8_t> codes(3);
  EXPECT_EQ(quantize_row_fp8(x, codes.data()), 1.0f);
  EXPECT_EQ(codes, (std::vector<uint8_t>{0x7E, 0x38, 0x3A}));
}

TEST(QuantizeFp8, GivesARowItsScale) {
  const std::vector<float> x = {448.0f, -1.0f, 0.0f, 224.0f};
  std::vector<uint8_t> codes(4);
  EXPECT_EQ(quantize_row_fp8(x, codes.data()), 1.0f);
  EXPECT_EQ(codes, (std::vector<uint8_t>{0x7E, 0xB8, 0x00, 0x76}));
}

TEST(Views, AreEmptyAndOfScaleOneByDefault) {
  const BlockScaledView blocks;
  EXPECT_EQ(blocks.rows, 0);
  EXPECT_EQ(blocks.cols, 0);
  EXPECT_EQ(blocks.scale_stride, 0);
  EXPECT_EQ(blocks.global.multiplier(), 1.0f);
  const Fp8View fp8;
  EXPECT_EQ(fp8.rows, 0);
  EXPECT_EQ(fp8.cols, 0);
  EXPECT_EQ(fp8.tile_rows, 128);
  EXPECT_EQ(fp8.tile_cols, 128);
  EXPECT_EQ(BlockScaledMatrix{}.rows + BlockScaledMatrix{}.cols, 0);
  const Fp8Matrix matrix;
  EXPECT_EQ(matrix.rows, 0);
  EXPECT_EQ(matrix.cols, 0);
  EXPECT_EQ(matrix.tile, 128);
}

TEST(QuantFormat, SaysWhichHasAGlobalScale) {
  EXPECT_TRUE(traits_of(QuantFormat::kNvfp4).has_global_scale);
  EXPECT_FALSE(traits_of(QuantFormat::kMxfp4).has_global_scale);
}

TEST(Views, ApplyAMultiplierOrADivisor) {
  EXPECT_EQ((GlobalScale{4.0f, GlobalScaleKind::kMultiplier}.apply(3.0f)), 12.0f);
  EXPECT_EQ((GlobalScale{4.0f, GlobalScaleKind::kDivisor}.apply(3.0f)), 0.75f);
  EXPECT_EQ((GlobalScale{4.0f, GlobalScaleKind::kDivisor}.multiplier()), 0.25f);
  EXPECT_EQ(global_multiplier(DenseView{}), 1.0f);
}

TEST(Buffer, IsAlignedAndAsLargeAsWasAsked) {
  for (const size_t bytes : {0u, 1u, 63u, 64u, 65u, 1000u}) {
    const Buffer buffer(bytes);
    EXPECT_EQ(buffer.bytes(), bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % 64, 0u);
    std::fill_n(buffer.data(), bytes, std::byte{0xFF});
  }
}

TEST(Views, DecodeDenseRowsOfEveryType) {
  const std::array<uint16_t, 4> halves = {0x3F80, 0x4000, 0x4040, 0xC000};
  const DenseView bf16{ElementType::kBf16, reinterpret_cast<const std::byte*>(halves.data()), 2, 2, 4, {}};
  EXPECT_EQ(dequantize(bf16), (std::vector<float>{1.0f, 2.0f, 3.0f, -2.0f}));
  const DenseView f16{ElementType::kF16, reinterpret_cast<const std::byte*>(halves.data()), 2, 2, 4, {}};
  EXPECT_EQ(dequantize(f16), (std::vector<float>{1.875f, 2.0f, 2.125f, -2.0f}));
  const std::array<float, 4> floats = {1.0f, -2.0f, 0.1f, 5e-42f};
  const DenseView f32{ElementType::kF32, reinterpret_cast<const std::byte*>(floats.data()), 2, 2, 8, {}};
  EXPECT_EQ(dequantize(f32), std::vector<float>(floats.begin(), floats.end()));
}

/// Decodes every byte of codes beside every scale.
void expect_code_times_scale(QuantFormat format, float (*decode_scale)(uint8_t)) {
  const int block = traits_of(format).block_size;
  std::vector<uint8_t> codes, scales;
  for (int scale = 0; scale < 256; ++scale) {
    for (int byte = 0; byte < 256; ++byte) {
      if (2 * byte % block == 0) scales.push_back(static_cast<uint8_t>(scale));
      codes.push_back(static_cast<uint8_t>(byte));
    }
  }
  const auto cols = static_cast<int64_t>(2 * codes.size());
  const BlockScaledView view{
      format, 1, cols, {codes.data(), 1, cols / 2}, scales.data(), cols / block, ScaleLayout::kRowMajor, {}};
  std::vector<float> found(static_cast<size_t>(cols));
  decode_row(view, 0, found.data());
  for (size_t i = 0; i < found.size(); ++i) {
    const uint8_t byte = codes[i / 2], scale = scales[i / static_cast<size_t>(block)];
    const auto code = static_cast<uint8_t>(i % 2 == 0 ? byte & 15 : byte >> 4);
    const float expected = decode_e2m1(code) * decode_scale(scale);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(found[i])) << "code " << int{code} << ", scale " << int{scale};
    } else {
      ASSERT_EQ(float_bits(found[i]), float_bits(expected))
          << "code " << int{code} << ", scale " << int{scale};
    }
  }
}

TEST(Views, DecodeEveryCodeBesideEveryScale) {
  expect_code_times_scale(QuantFormat::kNvfp4, decode_e4m3);
  expect_code_times_scale(QuantFormat::kMxfp4, decode_e8m0);
}

TEST(Views, ReadSwizzledScalesLikeRowMajorOnes) {
  std::vector<float> x(130 * 80);
  for (size_t i = 0; i < x.size(); ++i)
    x[i] = static_cast<float>(1 + i % 37) * std::exp2(static_cast<float>(i / 16 % 9));
  const BlockScaledMatrix matrix = quantize_nvfp4({x.data(), 130, 80}, 1.0f);
  BlockScaledView view = matrix.view();
  const std::vector<float> expected = dequantize(view);
  const std::vector<uint8_t> swizzled = swizzle_scales({matrix.scales.data(), 130, 5});
  view.scales = swizzled.data();
  view.scale_layout = ScaleLayout::kSwizzled128x4;
  EXPECT_EQ(dequantize(view), expected);
}

}  // namespace
}  // namespace fourfold
