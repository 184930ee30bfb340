// Statistics of stored weights against hand-worked bytes, the rules that judge them at their limits, and what
// an inspection derives: degrees of parallelism, memory, self-tests.
#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "checkpoint/weight_rules.h"
#include "fourfold/error.h"
#include "fourfold/parallel_degrees.h"
#include "fourfold/scale_layout.h"
#include "fourfold/weight_statistics.h"
#include "planted_faults.h"
#include "random_layer.h"
#include "sanitized.h"
#include "tools/doctor.h"
#include "tools/memory_estimate.h"

namespace fourfold {
namespace {

MatrixView<const uint8_t> matrix(const std::vector<uint8_t>& bytes, int64_t rows) {
  return {bytes.data(), rows, static_cast<int64_t>(bytes.size()) / rows};
}

std::vector<uint8_t> random_bytes(size_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<uint8_t> bytes(count);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  return bytes;
}

BlockScaledView view_of(QuantFormat format, const std::vector<uint8_t>& codes,
                        const std::vector<uint8_t>& scales, int64_t rows) {
  const int64_t cols = static_cast<int64_t>(codes.size()) * 2 / rows;
  return {format,
          rows,
          cols,
          matrix(codes, rows),
          scales.data(),
          static_cast<int64_t>(scales.size()) / rows,
          ScaleLayout::kRowMajor,
          {}};
}

// ---- scales ----

TEST(ScaleCounts, TellE4m3BytesApart) {
  // 1, 448, NaN, -NaN, -448, -0, +0, largest subnormal, smallest normal, smallest subnormal.
  const std::vector<uint8_t> bytes = {0x38, 0x7E, 0x7F, 0xFF, 0xFE, 0x80, 0x00, 0x07, 0x08, 0x01};
  const ScaleCounts counts = count_scales(ScaleType::kE4m3, matrix(bytes, 2));
  EXPECT_EQ(counts.total(), 10);
  EXPECT_EQ(counts.nan(), 2);
  EXPECT_EQ(counts.negative(), 2);
  EXPECT_EQ(counts.zero(), 1);
  EXPECT_EQ(counts.subnormal(), 2);
  EXPECT_EQ(counts.saturated(), 1);
  // Of those from +0 without NaN: 0, 2^-9, 7 x 2^-9, 2^-6, 1, 448.
  EXPECT_EQ(counts.quantile(0.0), 0.0f);
  EXPECT_EQ(counts.quantile(0.5), 7 * 0x1p-9f);
  EXPECT_EQ(counts.quantile(0.51), 0x1p-6f);
  EXPECT_EQ(counts.quantile(1.0), 448.0f);
}

TEST(ScaleCounts, TellE8m0BytesApart) {
  const std::vector<uint8_t> bytes = {0x00, 0x7F, 0x80, 0xFE, 0xFF};
  const ScaleCounts counts = count_scales(ScaleType::kE8m0, matrix(bytes, 1));
  EXPECT_EQ(counts.nan(), 1);
  EXPECT_EQ(counts.negative(), 0);
  EXPECT_EQ(counts.zero(), 0);
  EXPECT_EQ(counts.subnormal(), 1);
  EXPECT_EQ(counts.saturated(), 0);
  EXPECT_EQ(counts.quantile(0.0), 0x1p-127f);
  EXPECT_EQ(counts.quantile(0.5), 1.0f);
  EXPECT_EQ(counts.quantile(1.0), 0x1p127f);
}

TEST(ScaleCounts, ClassesOfEveryByteAddUp) {
  std::vector<uint8_t> all(256);
  std::iota(all.begin(), all.end(), uint8_t{0});
  const ScaleCounts counts = count_scales(ScaleType::kE4m3, matrix(all, 4));
  EXPECT_EQ(counts.by_byte, count_scales(ScaleType::kE4m3, matrix(all, 1)).by_byte);
  EXPECT_EQ(counts.nan(), 2);
  EXPECT_EQ(counts.negative(), 127);
  EXPECT_EQ(counts.subnormal(), 7);
  for (const int64_t count : counts.by_byte) EXPECT_EQ(count, 1);
}

TEST(ScaleCounts, LeaveOutWhatLiesBetweenStridedRows) {
  const std::vector<uint8_t> bytes = {1, 2, 0xFF, 3, 4, 0xFF};
  const ScaleCounts counts = count_scales(ScaleType::kE4m3, {bytes.data(), 2, 2, 3});
  EXPECT_EQ(counts.total(), 4);
  EXPECT_EQ(counts.nan(), 0);
}

TEST(ScaleCounts, LeaveOutThePaddingOfAMatrix) {
  constexpr int64_t kRows = 130, kBlocks = 5, kStride = 7;
  std::vector<uint8_t> strided(kRows * kStride, kE4m3NanCode), packed(kRows * kBlocks);
  for (size_t i = 0; i < packed.size(); ++i) {
    packed[i] = static_cast<uint8_t>(i % 100);
    strided[i / kBlocks * kStride + i % kBlocks] = packed[i];
  }
  std::vector<uint8_t> swizzled = swizzle_scales({packed.data(), kRows, kBlocks});
  std::vector<bool> is_scale(swizzled.size());
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t block = 0; block < kBlocks; ++block) {
      is_scale[static_cast<size_t>(swizzled_scale_offset(row, block, kBlocks))] = true;
    }
  }
  for (size_t i = 0; i < swizzled.size(); ++i) {
    if (!is_scale[i]) swizzled[i] = kE4m3NanCode;
  }
  BlockScaledView view;
  view.rows = kRows;
  view.cols = 16 * kBlocks;
  view.scales = strided.data();
  view.scale_stride = kStride;
  std::array<int64_t, 256> expected{};
  for (const uint8_t scale : packed) ++expected[scale];
  EXPECT_EQ(count_scales(view).by_byte, expected);
  view.scales = swizzled.data();
  view.scale_layout = ScaleLayout::kSwizzled128x4;
  EXPECT_EQ(count_scales(view).by_byte, expected);
}

TEST(ScaleCounts, HaveNoQuantilesOfNothing) {
  EXPECT_EQ(ScaleCounts{}.quantile(0.5), std::nullopt);
  const std::vector<uint8_t> bad = {0x7F, 0x81};
  EXPECT_EQ(count_scales(ScaleType::kE4m3, matrix(bad, 1)).quantile(1.0), std::nullopt);
}

TEST(FindScale, GivesTheFirstRowAndColumn) {
  const std::vector<uint8_t> bytes = {0, 0, 0, 0, 0x81, 0xFF, 0, 0x7F};
  EXPECT_EQ(find_scale(ScaleType::kE4m3, matrix(bytes, 2), is_nan_scale), std::pair(int64_t{1}, int64_t{1}));
  EXPECT_EQ(find_scale(ScaleType::kE4m3, matrix(bytes, 2), is_negative_scale),
            std::pair(int64_t{1}, int64_t{0}));
  EXPECT_EQ(find_scale(ScaleType::kE8m0, matrix(bytes, 2), is_negative_scale), std::nullopt);
}

// ---- codes ----

TEST(CodeCounts, CountNibblesAndBlocks) {
  // Four blocks of NVFP4: all +0 and -0; a 6 in the last high nibble; 0.5 and -0.5; zeros under a zero scale.
  std::vector<uint8_t> codes(32, 0x00);
  codes[3] = 0x88;
  codes[15] = 0x70;
  codes[16] = 0x91;
  const std::vector<uint8_t> scales = {0x38, 0x38, 0x80, 0x00};
  const CodeCounts counts = count_codes(view_of(QuantFormat::kNvfp4, codes, scales, 2));
  EXPECT_EQ(counts.total(), 64);
  EXPECT_EQ(counts.by_code[0x8], 2);
  EXPECT_EQ(counts.by_code[0x7], 1);
  EXPECT_EQ(counts.by_code[0x1], 1);
  EXPECT_EQ(counts.by_code[0x9], 1);
  EXPECT_EQ(counts.by_code[0x0], 59);
  EXPECT_EQ(counts.blocks, 4);
  EXPECT_EQ(counts.zero_blocks, 2);
  EXPECT_EQ(counts.lost_blocks, 1) << "-0 is a zero scale, too; a block of zeros loses nothing";
}

TEST(CodeCounts, BlocksOfMxfp4Have32) {
  std::vector<uint8_t> codes(32, 0x00);
  codes[15] = 0x10;  // the last code of the first block
  const std::vector<uint8_t> scales = {0x00, 0x7F};
  const CodeCounts counts = count_codes(view_of(QuantFormat::kMxfp4, codes, scales, 1));
  EXPECT_EQ(counts.blocks, 2);
  EXPECT_EQ(counts.zero_blocks, 1);
  EXPECT_EQ(counts.lost_blocks, 0) << "e8m0 has no zero";
}

TEST(CodeCounts, AreTheSameOfTransposedMatrices) {
  constexpr int64_t kOut = 5, kIn = 48;
  std::vector<uint8_t> codes = random_bytes(kOut * kIn / 2, 1), scales = random_bytes(kOut * kIn / 16, 2);
  std::fill_n(codes.begin() + 2 * kIn / 2 + 8, 8, uint8_t{0x80});  // a zero block
  scales[4 * kIn / 16 + 1] = 0;                                    // a lost one
  std::vector<uint8_t> turned_codes, turned_scales;
  for (int64_t byte = 0; byte < kIn / 2; ++byte) {
    for (int64_t row = 0; row < kOut; ++row)
      turned_codes.push_back(codes[static_cast<size_t>(row * kIn / 2 + byte)]);
  }
  for (int64_t block = 0; block < kIn / 16; ++block) {
    for (int64_t row = 0; row < kOut; ++row)
      turned_scales.push_back(scales[static_cast<size_t>(row * kIn / 16 + block)]);
  }
  const CodeCounts plain = count_codes(view_of(QuantFormat::kNvfp4, codes, scales, kOut));
  const CodeCounts turned =
      count_transposed_codes(matrix(turned_codes, kIn / 2), matrix(turned_scales, kIn / 16));
  EXPECT_EQ(turned.by_code, plain.by_code);
  EXPECT_EQ(turned.blocks, plain.blocks);
  EXPECT_EQ(turned.zero_blocks, plain.zero_blocks);
  EXPECT_EQ(turned.lost_blocks, plain.lost_blocks);
  EXPECT_GE(plain.zero_blocks, 1);
  EXPECT_GE(plain.lost_blocks, 1);
}

TEST(CodeCounts, SamplesTakeTheFirstOfSoManyRuns) {
  constexpr int64_t kRowBytes = 32 << 10;
  ASSERT_EQ(RowSample::run_of(kRowBytes), 2);
  std::vector<uint8_t> codes;
  for (uint8_t row = 0; row < 9; ++row)
    codes.insert(codes.end(), kRowBytes, static_cast<uint8_t>(row * 0x11));
  const std::vector<uint8_t> scales(9 * kRowBytes / 8, 0x38);
  const CodeCounts counts = count_codes(view_of(QuantFormat::kNvfp4, codes, scales, 9), {2});
  for (const int code : {0, 1, 4, 5, 8})
    EXPECT_EQ(counts.by_code[static_cast<size_t>(code)], 2 * kRowBytes) << code;
  EXPECT_EQ(counts.total(), 5 * 2 * kRowBytes);
}

TEST(ValueCounts, TellNumbersFromOthersInEveryType) {
  const float values[] = {0.0f,
                          -0.0f,
                          -3.0f,
                          2.0f,
                          std::numeric_limits<float>::infinity(),
                          std::numeric_limits<float>::quiet_NaN()};
  Bf16 bf16[6];
  for (int i = 0; i < 6; ++i) bf16[i] = encode_bf16(values[i]);
  const uint16_t f16[] = {0x0000, 0x8000, 0xC200, 0x4000, 0x7C00, 0x7E00};
  const auto count = [](ElementType type, const void* data, int64_t size) {
    return count_values(DenseView{type, static_cast<const std::byte*>(data), 2, 3, 3 * size, {}});
  };
  for (const ValueCounts& counts : {count(ElementType::kF32, values, 4), count(ElementType::kBf16, bf16, 2),
                                    count(ElementType::kF16, f16, 2)}) {
    EXPECT_EQ(counts.values, 6);
    EXPECT_EQ(counts.zeros, 2);
    EXPECT_EQ(counts.non_finite, 2);
    EXPECT_EQ(counts.largest, 3.0f);
  }
}

TEST(ValueCounts, KnowFp8sNan) {
  const std::vector<uint8_t> codes = {0x00, 0x80, 0x7E, 0x7F, 0xFF, 0x38};
  Fp8View view;
  view.rows = 2;
  view.cols = 3;
  view.codes = matrix(codes, 2);
  const ValueCounts counts = count_values(view);
  EXPECT_EQ(counts.values, 6);
  EXPECT_EQ(counts.zeros, 2);
  EXPECT_EQ(counts.non_finite, 2);
  EXPECT_EQ(counts.largest, 448.0f);
}

// ---- rules ----

TEST(Rules, TakeALargeGlobalScaleForAReciprocal) {
  const float amax = 2.0f, sound = amax / kNvfp4Range;
  EXPECT_FALSE(looks_reciprocal_global(sound, 448.0f));
  EXPECT_TRUE(looks_reciprocal_global(1.0f / sound, 448.0f));
  EXPECT_FALSE(looks_reciprocal_global(100.0f / kNvfp4Range, 448.0f)) << "large weights are not enough";
  EXPECT_FALSE(looks_reciprocal_global(1e-6f, 448.0f));
  EXPECT_TRUE(looks_reciprocal_global(27.0f, 448.0f));
  EXPECT_FALSE(looks_reciprocal_global(26.0f, 448.0f)) << "its reciprocal is of weights above 100";
}

TEST(Rules, TakeAnInputScaleForAReciprocalWhereItStandsOut) {
  const float median = 6.0f / kNvfp4Range;
  EXPECT_FALSE(looks_reciprocal_input(median, median, false));
  EXPECT_TRUE(looks_reciprocal_input(1.0f / median, median, false));
  EXPECT_TRUE(looks_reciprocal_input(8.0f, 8.0f, false)) << "a whole layer of them";
  EXPECT_FALSE(looks_reciprocal_input(8.0f, 8.0f, true)) << "intermediates may be that large";
  EXPECT_TRUE(looks_reciprocal_input(64.0f, 64.0f, true));
  EXPECT_TRUE(looks_reciprocal_input(20.0f, 0.05f, true));
  EXPECT_FALSE(looks_reciprocal_input(2.0f, 0.002f, true)) << "an outlier that no reciprocal explains";
}

// ---- degrees ----

TEST(Degrees, OfGptOssCutBlocksFrom8) {
  const CutDegrees nvfp4 = tensor_parallel_degrees(2880, 16);
  const auto has = [](const std::vector<int64_t>& list, int64_t degree) {
    return std::find(list.begin(), list.end(), degree) != list.end();
  };
  EXPECT_TRUE(has(nvfp4.clean, 2) && has(nvfp4.clean, 4) && has(nvfp4.clean, 9));
  EXPECT_TRUE(has(nvfp4.cuts_block, 8)) << "360 values are 22.5 blocks";
  EXPECT_TRUE(nvfp4.uneven.empty()) << "64 x 45 = 2880";
  EXPECT_TRUE(has(nvfp4.padded, 4)) << "720 is no multiple of 64";
  EXPECT_FALSE(has(nvfp4.padded, 3)) << "960 is";
  EXPECT_TRUE(has(tensor_parallel_degrees(2880, 32).cuts_block, 4)) << "720 values are 22.5 blocks of 32";
}

TEST(Degrees, OfPowersOfTwo) {
  const CutDegrees cut = tensor_parallel_degrees(2048, 128);
  EXPECT_EQ(cut.clean, (std::vector<int64_t>{2, 4, 8, 16}));
  EXPECT_EQ(cut.cuts_block, (std::vector<int64_t>{32, 64}));
  EXPECT_TRUE(cut.padded.empty() && cut.uneven.empty());
}

TEST(Degrees, OfExperts) {
  const CutDegrees cut = expert_parallel_degrees(12);
  EXPECT_EQ(cut.clean, (std::vector<int64_t>{2, 3, 4, 6, 12}));
  EXPECT_EQ(cut.uneven, (std::vector<int64_t>{8}));
  EXPECT_TRUE(expert_parallel_degrees(1).clean.empty());
}

// ---- memory ----

/// The layer of random_layer.h: 6 experts, H 192, I 112.
TEST(Memory, IsWhatTheLayoutsTake) {
  const RandomLayer layer({}, 1);
  const std::vector<MemoryEstimate> estimates = estimate_memory(layer.weights, 6);
  ASSERT_EQ(estimates.size(), 4u);
  const int64_t values = 6 * 3 * 192 * 112;
  EXPECT_EQ(estimates[3].backend, "reference");
  EXPECT_EQ(estimates[3].bytes, values * 9 / 16);
  // Gate and up: 7 pairs of 2 panels of 16 rows, 3 chunks of 64 k. Down: 6 pairs, 2 chunks (I padded to 128).
  EXPECT_EQ(estimates[2].backend, "cpu");
  EXPECT_EQ(estimates[2].bytes, 6 * (7 * 3 + 6 * 2) * 2 * 576);
  // Units of 64 rows x 64 k, 2304 bytes: 224 rows are 4, 192 are 3.
  EXPECT_EQ(estimates[1].backend, "sm90");
  EXPECT_EQ(estimates[1].bytes, 6 * (4 * 3 + 3 * 2) * 2304);
  // Gate and up each 112 rows of 192 k, scales for 128 rows; down 192 rows, k padded to 128, scales for 256
  // rows.
  EXPECT_EQ(estimates[0].backend, "blackwell");
  EXPECT_EQ(estimates[0].bytes, 6 * (2 * (112 * 96 + 128 * 12) + 192 * 64 + 256 * 8));
  EXPECT_EQ(estimate_memory(layer.weights, 12)[2].bytes, 2 * *estimates[2].bytes);
}

// ---- the doctor ----

TEST(Doctor, FindsEveryPlantedFault) {
  EXPECT_TRUE(test_backend(*make_faulty_backend(Fault::kNone), "sound", ActivationFormat::kNvfp4).is_fine);
  for (size_t i = 0; i < std::size(kPlantedFaults); ++i) {
    if (!runs_here(i)) continue;
    const Fault fault = kPlantedFaults[i];
    const SelfTest test = test_backend(*make_faulty_backend(fault), name_of(fault), ActivationFormat::kNvfp4);
    EXPECT_FALSE(test.is_fine) << name_of(fault);
    EXPECT_FALSE(test.trouble.empty()) << name_of(fault);
  }
}

TEST(Doctor, TestsEveryInstructionSetThatRuns) {
  const std::vector<SelfTest> tests = run_self_tests([](std::string_view) {});
  ASSERT_GE(tests.size(), 2u) << "portable code at least";
  for (const SelfTest& test : tests) EXPECT_TRUE(test.is_fine) << test.backend << ": " << test.trouble;
}

}  // namespace
}  // namespace fourfold
