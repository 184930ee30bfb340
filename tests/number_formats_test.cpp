// Codecs over every bit pattern. The numpy oracle repeats this against ml_dtypes.
#include "fourfold/number_formats.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace fourfold {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Usable at compile time.
static_assert(decode_e2m1(7) == 6.0f && decode_e2m1(0xF) == -6.0f && encode_e2m1(2.5f) == 4);
static_assert(decode_e4m3(0x7E) == 448.0f && encode_e4m3(1.0f) == kE4m3One);
static_assert(decode_e8m0(127) == 1.0f && encode_bf16(1.0f).bits == 0x3F80);

TEST(E2m1, HasTheFifteenValuesAndMinusZero) {
  const float values[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  for (uint8_t code = 0; code < 8; ++code) {
    EXPECT_EQ(decode_e2m1(code), values[code]);
    EXPECT_EQ(decode_e2m1(static_cast<uint8_t>(code | 8)), -values[code]);
  }
  EXPECT_TRUE(std::signbit(decode_e2m1(8)));
}

TEST(E2m1, EncodesItsOwnValuesExactly) {
  for (uint8_t code = 0; code < 16; ++code) EXPECT_EQ(encode_e2m1(decode_e2m1(code)), code);
}

TEST(E2m1, RoundsTiesToEven) {
  const struct {
    float value;
    uint8_t code;
  } ties[] = {{0.25f, 0}, {0.75f, 2}, {1.25f, 2}, {1.75f, 4}, {2.5f, 4}, {3.5f, 6}, {5.0f, 6}};
  for (const auto& tie : ties) {
    EXPECT_EQ(encode_e2m1(tie.value), tie.code) << tie.value;
    EXPECT_EQ(encode_e2m1(-tie.value), tie.code | 8) << -tie.value;
  }
}

TEST(E2m1, RoundsToTheNearestOnBothSidesOfEveryTie) {
  for (uint8_t code = 0; code < 7; ++code) {
    const float tie = (decode_e2m1(code) + decode_e2m1(static_cast<uint8_t>(code + 1))) / 2;
    EXPECT_EQ(encode_e2m1(std::nextafter(tie, 0.0f)), code);
    EXPECT_EQ(encode_e2m1(std::nextafter(tie, 9.0f)), code + 1);
  }
}

TEST(E2m1, SaturatesAndHasNoNan) {
  EXPECT_EQ(encode_e2m1(1e30f), 7);
  EXPECT_EQ(encode_e2m1(-kInfinity), 15);
  EXPECT_EQ(encode_e2m1(kNan), kE2m1NanCode);
  EXPECT_EQ(encode_e2m1(-kNan), kE2m1NanCode);
}

TEST(E2m1, KeepsTheSignOfZero) {
  EXPECT_EQ(encode_e2m1(-0.0f), 8);
  EXPECT_EQ(encode_e2m1(-1e-30f), 8);
  EXPECT_EQ(encode_e2m1(1e-30f), 0);
}

TEST(E4m3, EncodesItsOwnValuesExactly) {
  for (int code = 0; code < 256; ++code) {
    const auto byte = static_cast<uint8_t>(code);
    if ((code & 0x7F) == 0x7F) {
      EXPECT_TRUE(std::isnan(decode_e4m3(byte)));
    } else {
      EXPECT_EQ(encode_e4m3(decode_e4m3(byte)), byte);
    }
  }
}

TEST(E4m3, RoundsTiesToEvenBetweenAllNeighbours) {
  for (uint8_t code = 0; code < kE4m3MaxCode; ++code) {
    const float low = decode_e4m3(code), high = decode_e4m3(static_cast<uint8_t>(code + 1)),
                tie = (low + high) / 2;
    EXPECT_EQ(encode_e4m3(tie), code % 2 == 0 ? code : code + 1);
    EXPECT_EQ(encode_e4m3(std::nextafter(tie, 0.0f)), code);
    EXPECT_EQ(encode_e4m3(std::nextafter(tie, 500.0f)), code + 1);
  }
}

TEST(E4m3, SaturatesAndKeepsNan) {
  EXPECT_EQ(encode_e4m3(449.0f), kE4m3MaxCode);
  EXPECT_EQ(encode_e4m3(1e38f), kE4m3MaxCode);
  EXPECT_EQ(encode_e4m3(-kInfinity), 0xFE);
  EXPECT_EQ(encode_e4m3(kNan), kE4m3NanCode);
}

TEST(E4m3, ReachesDownToItsSmallestSubnormal) {
  EXPECT_EQ(decode_e4m3(kE4m3SmallestCode), 0x1p-9f);
  EXPECT_EQ(encode_e4m3(0x1p-10f), 0);  // a tie, to even
  EXPECT_EQ(encode_e4m3(std::nextafter(0x1p-10f, 1.0f)), kE4m3SmallestCode);
}

// Constants against their bits, and NaN with the bits that every build writes.
TEST(NumberFormats, HaveTheBitsThatTheStandardsGive) {
  EXPECT_EQ(kE2m1NanCode, 7);
  EXPECT_EQ(kE4m3NanCode, 0x7F);
  EXPECT_EQ(kE8m0NanCode, 0xFF);
  EXPECT_EQ(Bf16{}.bits, 0);
  EXPECT_EQ(float_bits(decode_e4m3(0x7F)), 0x7FC00000u);
  EXPECT_EQ(float_bits(decode_e4m3(0xFF)), 0xFFC00000u);
  EXPECT_EQ(float_bits(decode_e8m0(0xFF)), 0x7FC00000u);
}

TEST(E8m0, IsAPowerOfTwoOrNan) {
  for (int code = 0; code < 255; ++code)
    EXPECT_EQ(decode_e8m0(static_cast<uint8_t>(code)), std::ldexp(1.0f, code - 127));
  EXPECT_TRUE(std::isnan(decode_e8m0(kE8m0NanCode)));
}

TEST(Bf16, RoundTripsEveryPattern) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const Bf16 value{static_cast<uint16_t>(bits)};
    const float wide = static_cast<float>(value);
    if (std::isnan(wide)) {
      EXPECT_TRUE(std::isnan(static_cast<float>(encode_bf16(wide))));
    } else {
      EXPECT_EQ(encode_bf16(wide), value);
    }
  }
}

TEST(Bf16, RoundsToEvenAndOverflowsToInfinity) {
  EXPECT_EQ(encode_bf16(float_from_bits(0x3F808000)).bits, 0x3F80);  // tie, even below
  EXPECT_EQ(encode_bf16(float_from_bits(0x3F818000)).bits, 0x3F82);  // tie, even above
  EXPECT_EQ(static_cast<float>(encode_bf16(3.4e38f)), kInfinity);
}

TEST(Bf16, QuietsANanAndKeepsItsUpperBits) {
  EXPECT_EQ(encode_bf16(float_from_bits(0x7F800001)).bits, 0x7FC0);
  EXPECT_EQ(encode_bf16(float_from_bits(0xFFA10000)).bits, 0xFFE1);
}

TEST(F16, DecodesEveryPattern) {
  for (int bits = 0; bits < 65536; ++bits) {
    const int exponent = (bits >> 10) & 31, mantissa = bits & 0x3FF;
    const float found = decode_f16(static_cast<uint16_t>(bits));
    EXPECT_EQ(std::signbit(found), bits >= 32768);
    if (exponent == 31) {
      EXPECT_EQ(float_bits(found) & 0x7FFFFFFFu, 0x7F800000u | static_cast<uint32_t>(mantissa) << 13);
    } else {
      EXPECT_EQ(std::abs(found), exponent == 0
                                     ? std::ldexp(static_cast<float>(mantissa), -24)
                                     : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25));
    }
  }
}

TEST(F16, DecodesTheCorners) {
  EXPECT_EQ(decode_f16(0x3C00), 1.0f);
  EXPECT_EQ(decode_f16(0x7BFF), 65504.0f);
  EXPECT_EQ(decode_f16(0x0001), 0x1p-24f);
  EXPECT_EQ(decode_f16(0x8400), -0x1p-14f);
  EXPECT_EQ(decode_f16(0xFC00), -kInfinity);
  EXPECT_TRUE(std::isnan(decode_f16(0x7E00)));
}

// The fact that the design rests on: an NVFP4 dot product is a bf16 dot product of decoded operands.
TEST(Nvfp4, EveryProductOfCodeAndScaleIsExactInBf16) {
  for (int code = 0; code < 16; ++code) {
    for (int scale = 0; scale < 256; ++scale) {
      if ((scale & 0x7F) == 0x7F) continue;
      const float product =
          decode_e2m1(static_cast<uint8_t>(code)) * decode_e4m3(static_cast<uint8_t>(scale));
      EXPECT_EQ(static_cast<float>(encode_bf16(product)), product);
    }
  }
}

TEST(PowerOfTwo, CoversSubnormals) {
  for (int exponent = -149; exponent <= 127; ++exponent)
    EXPECT_EQ(power_of_two(exponent), std::ldexp(1.0f, exponent));
}

}  // namespace
}  // namespace fourfold
