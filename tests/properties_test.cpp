// What holds for every input, on many generated ones: layouts are bijections, quantizers give back their own
// values, casts keep values, permutations are undone by their inverses.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <vector>

#include "fourfold/error.h"
#include "fourfold/quantize.h"
#include "fourfold/routing.h"
#include "fourfold/scale_layout.h"
#include "generated_cases.h"
#include "numeric/block_quantizer.h"

namespace fourfold {
namespace {

// ---- scale layouts ----

std::vector<uint8_t> nonzero_bytes(Draw& draw, int64_t count) {
  std::vector<uint8_t> bytes(static_cast<size_t>(count));
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(draw.integer(1, 255));  // 0 is the padding's
  return bytes;
}

TEST(ScaleLayoutProperties, OffsetsAreABijectionOntoWholeTiles) {
  for_generated_cases(60, [](Draw& draw) {
    const int64_t rows = draw.integer(1, 5) * kScaleTileRows, k_sf = draw.integer(1, 9) * kScaleTileCols;
    std::vector<int> hits(static_cast<size_t>(swizzled_scale_bytes(rows, k_sf)));
    ASSERT_EQ(static_cast<int64_t>(hits.size()), rows * k_sf);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t col = 0; col < k_sf; ++col) {
        ++hits.at(static_cast<size_t>(swizzled_scale_offset(row, col, k_sf)));
      }
    }
    EXPECT_TRUE(std::all_of(hits.begin(), hits.end(), [](int count) { return count == 1; }));
  });
}

TEST(ScaleLayoutProperties, SwizzlingIsUndoneAndPadsWithZeros) {
  for_generated_cases(200, [](Draw& draw) {
    const int64_t rows = draw.integer(1, 400), k_sf = draw.integer(1, 40);
    const std::vector<uint8_t> scales = nonzero_bytes(draw, rows * k_sf);
    const std::vector<uint8_t> swizzled = swizzle_scales({scales.data(), rows, k_sf});
    EXPECT_EQ(unswizzle_scales(swizzled, rows, k_sf), scales);
    EXPECT_EQ(std::count(swizzled.begin(), swizzled.end(), 0),
              swizzled_scale_bytes(rows, k_sf) - rows * k_sf);
  });
}

TEST(ScaleLayoutProperties, GroupsAreSwizzledAloneWhateverTheirNeighbours) {
  for_generated_cases(100, [](Draw& draw) {
    const std::vector<int32_t> offsets = draw.group_offsets(draw.integer(1, 9), 200);
    const int64_t rows = offsets.back(), k_sf = draw.integer(1, 20);
    const std::vector<uint8_t> scales = nonzero_bytes(draw, rows * k_sf);
    const std::vector<uint8_t> swizzled = swizzle_scale_groups({scales.data(), rows, k_sf}, offsets);
    const std::vector<int64_t> first_rows = padded_group_rows(offsets);
    const int64_t padded_cols = round_up(k_sf, kScaleTileCols);
    ASSERT_EQ(static_cast<int64_t>(swizzled.size()), first_rows.back() * padded_cols);
    std::vector<uint8_t> back;
    for (size_t group = 0; group + 1 < offsets.size(); ++group) {
      ASSERT_EQ(first_rows[group] % kScaleTileRows, 0);
      const std::span<const uint8_t> part(
          swizzled.data() + first_rows[group] * padded_cols,
          static_cast<size_t>((first_rows[group + 1] - first_rows[group]) * padded_cols));
      const auto own = unswizzle_scales(part, offsets[group + 1] - offsets[group], k_sf);
      back.insert(back.end(), own.begin(), own.end());
    }
    EXPECT_EQ(back, scales);
  });
}

TEST(ScaleLayoutProperties, ExpertsAreSwizzledAloneFromEitherOrientation) {
  for_generated_cases(60, [](Draw& draw) {
    const int64_t experts = draw.integer(1, 5), rows = draw.integer(1, 300), k_sf = draw.integer(1, 20);
    const std::vector<uint8_t> scales = nonzero_bytes(draw, experts * rows * k_sf);
    std::vector<uint8_t> transposed(scales.size());
    for (int64_t i = 0; i < experts * rows * k_sf; ++i) {
      const int64_t expert = i / (rows * k_sf), row = i / k_sf % rows, col = i % k_sf;
      transposed[static_cast<size_t>((expert * k_sf + col) * rows + row)] = scales[static_cast<size_t>(i)];
    }
    const auto swizzled = swizzle_expert_scales({scales.data(), experts * rows, k_sf}, experts);
    EXPECT_EQ(swizzle_expert_scales_from_transposed({transposed.data(), experts * k_sf, rows}, experts),
              swizzled);
    const int64_t bytes = swizzled_scale_bytes(rows, k_sf);
    ASSERT_EQ(static_cast<int64_t>(swizzled.size()), experts * bytes);
    std::vector<uint8_t> back;
    for (int64_t expert = 0; expert < experts; ++expert) {
      const auto own = unswizzle_scales(
          std::span(swizzled).subspan(static_cast<size_t>(expert * bytes), static_cast<size_t>(bytes)), rows,
          k_sf);
      back.insert(back.end(), own.begin(), own.end());
    }
    EXPECT_EQ(back, scales);
  });
}

// ---- quantizers ----

/// All 16 codes in some order, two a byte, low nibble first.
std::array<uint8_t, 8> every_code(Draw& draw) {
  const std::vector<int64_t> order = draw.order(16);
  std::array<uint8_t, 8> codes{};
  for (size_t i = 0; i < 16; ++i)
    codes[i / 2] = static_cast<uint8_t>(codes[i / 2] | order[i] << (4 * (i % 2)));
  return codes;
}

/// A positive number with a mantissa and an exponent of [low, high].
float scale_between(Draw& draw, int low, int high) {
  return std::ldexp(draw.real(1.0f, 2.0f), static_cast<int>(draw.integer(low, high)));
}

/// On one thread: blocks are small.
std::vector<float> values_of(const BlockScaledView& row) {
  std::vector<float> values(static_cast<size_t>(row.cols));
  dequantize_row(row, 0, values.data());
  return values;
}

constexpr ScaleRule kRules[] = {ScaleRule::kAmax, ScaleRule::kFourOverSix, ScaleRule::kMse};

// A block with a 6 has amax = 6 s g within two roundings, and s is farther from a tie of e4m3 than that. The
// reciprocal brings each value back to its code within three roundings; ties of e2m1 are farther away.
TEST(QuantizeProperties, EveryCodeAndScaleComesBack) {
  for_generated_cases(40, [](Draw& draw) {
    const float global = scale_between(draw, -100, 110);
    for (uint8_t scale = kE4m3SmallestCode; scale <= kE4m3MaxCode; ++scale) {
      const std::array<uint8_t, 8> codes = every_code(draw);
      const BlockScaledView block{QuantFormat::kNvfp4, 1, 16, {codes.data(), 1, 8}, &scale, 1, {},
                                  {global, {}}};
      const std::vector<float> values = values_of(block);
      for (const ScaleFloor floor : {ScaleFloor::kNone, ScaleFloor::kModelOpt}) {
        std::array<uint8_t, 8> again{};
        uint8_t scale_again = 0;
        quantize_row_nvfp4(values, global, floor, again.data(), &scale_again);
        ASSERT_EQ(scale_again, scale) << "global " << global;
        ASSERT_EQ(again, codes) << "scale " << int{scale} << ", global " << global;
      }
      for (const ScaleRule rule : kRules) {
        std::array<uint8_t, 8> again{};
        uint8_t scale_again = 0;
        quantize_weight_row_nvfp4(values, global, rule, again.data(), &scale_again);
        ASSERT_EQ(scale_again, scale) << to_string(rule);
        ASSERT_EQ(again, codes) << to_string(rule) << ", scale " << int{scale};
      }
    }
  });
}

// Scales below 3 x 2^-9 are excepted: there rounding moves a scale by up to a half, and a block's largest
// code may be 3 or 4 (docs/formats.md, section 8).
TEST(QuantizeProperties, WhatTheQuantizerWroteComesBack) {
  for_generated_cases(300, [](Draw& draw) {
    const int64_t blocks = 8;
    std::vector<float> x(static_cast<size_t>(blocks) * 16);
    for (int64_t block = 0; block < blocks; ++block) {
      const float sigma = scale_between(draw, -6, 4);
      for (size_t i = 0; i < 16; ++i) x[static_cast<size_t>(block) * 16 + i] = draw.normal(sigma);
    }
    const MatrixView<const float> row(x.data(), 1, blocks * 16);
    const float global = draw.chance(0.5) ? nvfp4_global_scale(absolute_maximum(row))
                                          : scale_between(draw, -14, -4);  // static: may saturate
    const BlockScaledMatrix once = quantize_nvfp4(row, global);
    const std::vector<float> values = values_of(once.view());
    const BlockScaledMatrix twice = quantize_nvfp4({values.data(), 1, row.cols}, global);
    for (size_t block = 0; block < once.scales.size(); ++block) {
      if (once.scales[block] < 3) continue;
      EXPECT_EQ(twice.scales[block], once.scales[block]);
      for (size_t i = 8 * block; i < 8 * block + 8; ++i) EXPECT_EQ(twice.codes[i], once.codes[i]);
    }
  });
}

// 1.6 x 2^-9 rounds to a scale of 2 x 2^-9, by which 9.6 units become 4.8, code 4; those 8 units ask for a
// scale of 1.33 x 2^-9, which is 1 x 2^-9, and saturate at 6.
TEST(QuantizeProperties, TheSmallestScalesDoNotComeBack) {
  std::array<float, 16> x{};
  x[0] = 9.6f * 0x1p-9f;
  const BlockScaledMatrix once = quantize_nvfp4({x.data(), 1, 16}, 1.0f);
  EXPECT_EQ(once.scales[0], 2);
  EXPECT_EQ(once.codes[0], 6);
  const std::vector<float> values = values_of(once.view());
  const BlockScaledMatrix twice = quantize_nvfp4({values.data(), 1, 16}, 1.0f);
  EXPECT_EQ(twice.scales[0], 1);
  EXPECT_EQ(twice.codes[0], 7);
}

TEST(QuantizeProperties, EveryMxfp4CodeAndScaleComesBack) {
  for_generated_cases(20, [](Draw& draw) {
    for (int scale_code = 0; scale_code <= 252; ++scale_code) {  // 6 x 2^126 is beyond float32
      const auto scale = static_cast<uint8_t>(scale_code);
      std::array<uint8_t, 16> codes{};
      for (int half = 0; half < 2; ++half) std::ranges::copy(every_code(draw), codes.begin() + 8 * half);
      const BlockScaledView block{QuantFormat::kMxfp4, 1, 32, {codes.data(), 1, 16}, &scale, 1, {}, {}};
      std::array<uint8_t, 16> again{};
      uint8_t scale_again = 0;
      quantize_row_mxfp4(values_of(block), again.data(), &scale_again);
      ASSERT_EQ(scale_again, scale);
      ASSERT_EQ(again, codes) << scale_code;
    }
  });
}

// The row's scale is amax / 448 of values that were rounded once: it may move by an ulp, codes may not.
TEST(QuantizeProperties, EveryFp8CodeComesBack) {
  for_generated_cases(100, [](Draw& draw) {
    const float scale = scale_between(draw, -90, 100);
    std::vector<uint8_t> codes;
    for (int code = 0; code < 256; ++code) {
      if ((code & 0x7F) != 0x7F) codes.push_back(static_cast<uint8_t>(code));
    }
    std::vector<float> values;
    for (const uint8_t code : codes) values.push_back(decode_e4m3(code) * scale);
    std::vector<uint8_t> again(codes.size());
    const float scale_again = quantize_row_fp8(values, again.data());
    EXPECT_EQ(again, codes);
    EXPECT_NEAR(scale_again, scale, scale * 0x1p-23f);
  });
}

double squared_error(std::span<const float> x, float global, ScaleRule rule) {
  std::vector<uint8_t> codes(x.size() / 2), scales(x.size() / 16);
  quantize_weight_row_nvfp4(x, global, rule, codes.data(), scales.data());
  const auto cols = static_cast<int64_t>(x.size());
  const BlockScaledView view{QuantFormat::kNvfp4, 1,         cols, {codes.data(), 1, cols / 2},
                             scales.data(),       cols / 16, {},   {global, {}}};
  const std::vector<float> values = values_of(view);
  double sum = 0.0;
  for (size_t i = 0; i < x.size(); ++i) {
    sum += (double{x[i]} - double{values[i]}) * (double{x[i]} - double{values[i]});
  }
  return sum;
}

// A block's candidates of one rule are among those of the next: 4/6's second scale is half an octave up.
TEST(QuantizeProperties, EveryScaleRuleLeavesNoMoreErrorThanTheOneBefore) {
  for_generated_cases(400, [](Draw& draw) {
    std::array<float, 16> x;
    const float sigma = scale_between(draw, -12, 6);
    for (float& value : x) value = draw.normal(sigma) * (draw.chance(0.05) ? 8.0f : 1.0f);
    const float global = scale_between(draw, -12, -2);
    const double amax = squared_error(x, global, ScaleRule::kAmax);
    const double four_over_six = squared_error(x, global, ScaleRule::kFourOverSix);
    const double mse = squared_error(x, global, ScaleRule::kMse);
    EXPECT_LE(four_over_six, amax);
    EXPECT_LE(mse, four_over_six);
  });
}

// ---- the cast of MXFP4 ----

TEST(CastProperties, KeepsEveryValueOfBlocksWithinSeventeenOctaves) {
  for_generated_cases(200, [](Draw& draw) {
    const int64_t rows = draw.integer(1, 5), blocks = draw.integer(1, 6);
    const int64_t largest = draw.integer(20, 250), spread = draw.integer(0, 24);
    std::vector<uint8_t> codes(static_cast<size_t>(rows * blocks * 16));
    std::vector<uint8_t> scales(static_cast<size_t>(rows * blocks));
    for (uint8_t& code : codes) code = draw.byte();
    for (uint8_t& scale : scales)
      scale = static_cast<uint8_t>(std::max<int64_t>(0, largest - draw.integer(0, spread)));
    const BlockScaledView mxfp4{QuantFormat::kMxfp4, rows,   blocks * 32, {codes.data(), rows, blocks * 16},
                                scales.data(),       blocks, {},          {}};
    CastReport report;
    const BlockScaledMatrix nvfp4 = cast_mxfp4_to_nvfp4(mxfp4, &report);
    const std::vector<float> before = dequantize(mxfp4), after = dequantize(nvfp4.view());
    const int kmax = largest_mxfp4_exponent(mxfp4);
    CastReport expected;
    for (int64_t block = 0; block < rows * blocks; ++block) {
      const auto first = static_cast<size_t>(block) * 32;
      const bool near = kmax - (scales[static_cast<size_t>(block)] - kE8m0Bias) <= 17;
      const bool zero = std::all_of(codes.begin() + static_cast<int64_t>(first / 2),
                                    codes.begin() + static_cast<int64_t>(first / 2) + 16,
                                    [](uint8_t pair) { return (pair & 0x77) == 0; });
      const bool same = std::equal(before.begin() + static_cast<int64_t>(first),
                                   before.begin() + static_cast<int64_t>(first) + 32,
                                   after.begin() + static_cast<int64_t>(first));
      EXPECT_TRUE(same || !(near || zero)) << "block " << block;
      ++expected.blocks;
      expected.recoded += !near && !zero;
      expected.inexact += !same;
    }
    const CastReport counted = count_cast(mxfp4, kmax);
    for (const CastReport& found : {report, counted}) {
      EXPECT_EQ(found.blocks, expected.blocks);
      EXPECT_EQ(found.recoded, expected.recoded);
      EXPECT_EQ(found.inexact, expected.inexact);
    }
  });
}

// ---- permutation ----

struct GeneratedRouting {
  int64_t tokens, top_k, experts;
  std::vector<int64_t> ids;
  std::vector<float> weights;

  explicit GeneratedRouting(Draw& draw)
      : tokens(draw.integer(0, 40)), top_k(draw.integer(1, 6)), experts(draw.integer(1, 12)) {
    const double absent = draw.real(0.0f, 0.5f);
    for (int64_t slot = 0; slot < tokens * top_k; ++slot) {
      ids.push_back(draw.chance(absent) ? kAbsentExpert : draw.integer(0, experts - 1));
      weights.push_back(draw.real(0.0f, 1.0f));
    }
  }
  Routing routing() const {
    return {MatrixView<const int64_t>(ids.data(), tokens, top_k), {weights.data(), tokens, top_k}};
  }
};

TEST(PermutationProperties, RowsAndSlotsAreEachOthersInverse) {
  for_generated_cases(300, [](Draw& draw) {
    const GeneratedRouting given(draw);
    const Permutation permutation = permute_by_expert(given.routing(), given.experts);
    EXPECT_EQ(permutation.status, kStatusOk);
    ASSERT_EQ(static_cast<int64_t>(permutation.group_offsets.size()), given.experts + 1);
    ASSERT_EQ(permutation.row_of_slot.size(), given.ids.size());
    validate_group_offsets(permutation.group_offsets, permutation.rows());
    ASSERT_EQ(permutation.rows(), std::ranges::count_if(given.ids, [](int64_t id) { return id >= 0; }));
    for (size_t slot = 0; slot < given.ids.size(); ++slot) {
      const int32_t row = permutation.row_of_slot[slot];
      if (given.ids[slot] < 0) {
        EXPECT_EQ(row, -1);
        continue;
      }
      EXPECT_EQ(permutation.slot_of_row.at(static_cast<size_t>(row)), static_cast<int32_t>(slot));
      const auto expert = static_cast<size_t>(given.ids[slot]);
      EXPECT_GE(row, permutation.group_offsets[expert]);
      EXPECT_LT(row, permutation.group_offsets[expert + 1]);
    }
    for (size_t expert = 0; expert < static_cast<size_t>(given.experts); ++expert) {
      EXPECT_TRUE(std::is_sorted(permutation.slot_of_row.begin() + permutation.group_offsets[expert],
                                 permutation.slot_of_row.begin() + permutation.group_offsets[expert + 1]));
    }
  });
}

TEST(PermutationProperties, GatheredRowsScatterBack) {
  for_generated_cases(100, [](Draw& draw) {
    const GeneratedRouting given(draw);
    const int64_t hidden = draw.integer(1, 20);
    std::vector<Bf16> x(static_cast<size_t>(given.tokens * hidden));
    for (Bf16& value : x) value = encode_bf16(draw.normal(1.0f));
    const Permutation permutation = permute_by_expert(given.routing(), given.experts);
    std::vector<Bf16> rows(static_cast<size_t>(permutation.rows() * hidden));
    gather_rows({x.data(), given.tokens, hidden}, permutation.slot_of_row, given.top_k,
                {rows.data(), permutation.rows(), hidden});
    for (size_t slot = 0; slot < given.ids.size(); ++slot) {
      if (given.ids[slot] < 0) continue;
      const Bf16* const row = rows.data() + permutation.row_of_slot[slot] * hidden;
      EXPECT_TRUE(
          std::equal(row, row + hidden, x.data() + static_cast<int64_t>(slot) / given.top_k * hidden));
    }
  });
}

// Whether ids are this rank's, or the model's with a table of where experts live.
TEST(PermutationProperties, ATableOfLocalExpertsIsAnotherNameForTheirIds) {
  for_generated_cases(200, [](Draw& draw) {
    const GeneratedRouting given(draw);
    const int64_t first = draw.integer(0, given.experts - 1);
    const int64_t count = draw.integer(1, given.experts - first);
    const std::vector<int32_t> local = local_expert_range(first, count, given.experts);
    Routing by_table = given.routing();
    by_table.local_experts = local;
    std::vector<int64_t> own_ids;
    for (const int64_t id : given.ids) {
      own_ids.push_back(id >= first && id < first + count ? id - first : kAbsentExpert);
    }
    Routing by_id = given.routing();
    by_id.topk_ids = MatrixView<const int64_t>(own_ids.data(), given.tokens, given.top_k);
    const Permutation a = permute_by_expert(by_table, count), b = permute_by_expert(by_id, count);
    EXPECT_EQ(a.group_offsets, b.group_offsets);
    EXPECT_EQ(a.slot_of_row, b.slot_of_row);
    EXPECT_EQ(a.row_of_slot, b.row_of_slot);
    EXPECT_EQ(a.status, kStatusOk);
  });
}

}  // namespace
}  // namespace fourfold
