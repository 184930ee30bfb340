// The 128x4 layout: a bijection onto what is not padding, and padding that is always written.
#include "fourfold/scale_layout.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <set>

#include "fourfold/error.h"

namespace fourfold {
namespace {

std::vector<uint8_t> numbered(int64_t count) {
  std::vector<uint8_t> values(static_cast<size_t>(count));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint8_t>(1 + i % 255);  // never zero
  return values;
}

TEST(ScaleLayout, IsInjectiveAndStaysInside) {
  for (const auto& [rows, cols] :
       {std::pair<int64_t, int64_t>{128, 4}, {1, 1}, {129, 5}, {300, 17}, {31, 64}}) {
    std::set<int64_t> offsets;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t col = 0; col < cols; ++col) offsets.insert(swizzled_scale_offset(row, col, cols));
    }
    EXPECT_EQ(static_cast<int64_t>(offsets.size()), rows * cols);
    EXPECT_GE(*offsets.begin(), 0);
    EXPECT_LT(*offsets.rbegin(), swizzled_scale_bytes(rows, cols));
  }
}

// Worked by hand from the instruction's picture: a tile is 32 rows of 16 bytes; each holds 4 scales of rows
// r, r + 32, r + 64 and r + 96.
TEST(ScaleLayout, MatchesHandWorkedOffsets) {
  EXPECT_EQ(swizzled_scale_offset(0, 0, 4), 0);
  EXPECT_EQ(swizzled_scale_offset(0, 3, 4), 3);
  EXPECT_EQ(swizzled_scale_offset(1, 0, 4), 16);
  EXPECT_EQ(swizzled_scale_offset(32, 0, 4), 4);
  EXPECT_EQ(swizzled_scale_offset(127, 3, 4), 31 * 16 + 12 + 3);
  EXPECT_EQ(swizzled_scale_offset(0, 4, 8), 512);
  EXPECT_EQ(swizzled_scale_offset(128, 0, 5), 1024);  // five scales a row are two tiles
}

TEST(ScaleLayout, RoundTripsAndZeroesPadding) {
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{128, 4}, {1, 1}, {129, 5}, {300, 17}}) {
    const std::vector<uint8_t> scales = numbered(rows * cols);
    const std::vector<uint8_t> swizzled = swizzle_scales({scales.data(), rows, cols});
    EXPECT_EQ(unswizzle_scales(swizzled, rows, cols), scales);
    EXPECT_EQ(std::count(swizzled.begin(), swizzled.end(), 0),
              swizzled_scale_bytes(rows, cols) - rows * cols);
  }
}

TEST(ScaleLayout, SwizzlesEveryGroupOnItsOwn) {
  const std::vector<int32_t> offsets = {0, 5, 5, 134, 140};
  const std::vector<uint8_t> scales = numbered(140 * 6);
  const std::vector<uint8_t> groups = swizzle_scale_groups({scales.data(), 140, 6}, offsets);
  std::vector<uint8_t> expected;
  for (size_t g = 0; g + 1 < offsets.size(); ++g) {
    const MatrixView<const uint8_t> all(scales.data(), 140, 6);
    const auto group = swizzle_scales(all.rows_from(offsets[g], offsets[g + 1] - offsets[g]));
    expected.insert(expected.end(), group.begin(), group.end());
  }
  EXPECT_EQ(groups, expected);
  EXPECT_EQ(padded_group_rows(offsets), (std::vector<int64_t>{0, 128, 128, 384, 512}));
}

TEST(ScaleLayout, ReadsTransposedScalesOnlyByThatName) {
  const int64_t experts = 3, rows = 130, k_sf = 5;
  const std::vector<uint8_t> scales = numbered(experts * rows * k_sf);
  std::vector<uint8_t> transposed(scales.size());
  for (int64_t e = 0; e < experts; ++e) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t col = 0; col < k_sf; ++col) {
        transposed[static_cast<size_t>((e * k_sf + col) * rows + row)] =
            scales[static_cast<size_t>((e * rows + row) * k_sf + col)];
      }
    }
  }
  EXPECT_EQ(swizzle_expert_scales_from_transposed({transposed.data(), experts * k_sf, rows}, experts),
            swizzle_expert_scales({scales.data(), experts * rows, k_sf}, experts));
}

TEST(ScaleLayout, RefusesSizesThatDoNotFit) {
  const std::vector<uint8_t> scales(12);
  const std::vector<int32_t> short_offsets = {0, 2};
  EXPECT_THROW(unswizzle_scales(scales, 3, 4), Error);
  EXPECT_THROW(swizzle_expert_scales({scales.data(), 3, 4}, 2), Error);
  EXPECT_THROW(swizzle_expert_scales({scales.data(), 3, 4}, 0), Error);
  EXPECT_THROW(validate_group_offsets({}, 0), Error);
  EXPECT_THROW(validate_group_offsets(std::vector<int32_t>{1, 3}, 3), Error);
  EXPECT_THROW(swizzle_scale_groups({scales.data(), 3, 4}, short_offsets), Error);
  const std::vector<int32_t> down_again = {0, 1000, 3};
  EXPECT_THROW(swizzle_scale_groups({scales.data(), 3, 4}, down_again), Error);
  const std::vector<int32_t> down_at_once = {0, -1, 3};
  EXPECT_THROW(swizzle_scale_groups({scales.data(), 3, 4}, down_at_once), Error);
}

}  // namespace
}  // namespace fourfold
