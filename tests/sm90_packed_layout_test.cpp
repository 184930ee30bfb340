// The packed layout of Hopper's weights and the order of its work, without a GPU: the index functions and the
// decode are the code that the kernels run.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <set>
#include <vector>

#include "fourfold/number_formats.h"
#include "sm90/gemm_choice.h"
#include "sm90/packed_decode.h"
#include "sm90/packed_layout.h"
#include "sm90/tile_schedule.h"

namespace fourfold::sm90 {
namespace {

/// A unit in the checkpoint's terms.
struct PlainUnit {
  uint8_t codes[kUnitRows][kUnitDepth] = {};
  uint8_t scales[kUnitRows][kUnitDepth / 16] = {};
};

using UnitBytes = std::array<uint8_t, kUnitBytes>;

uint32_t word_at(const UnitBytes& unit, int byte) {
  uint32_t word = 0;
  std::memcpy(&word, unit.data() + byte, 4);
  return word;
}

UnitBytes pack(const PlainUnit& plain) {
  UnitBytes unit{};
  for (int row = 0; row < kUnitRows; ++row) {
    for (int k = 0; k < kUnitDepth; ++k) {
      const PackedScale scale = pack_scale(plain.scales[row][k / 16]);
      const int code = (plain.codes[row][k] & scale.code_and) ^ scale.code_xor;
      for (int bit = 0; bit < 4; ++bit) {
        const BitPosition at = code_bit_position(row, k, bit);
        unit[static_cast<size_t>(at.byte)] |= static_cast<uint8_t>(((code >> bit) & 1) << at.bit);
      }
    }
    for (int step = 0; step < 4; ++step) {
      const ScalePosition at = scale_position(row, step);
      const uint32_t word =
          word_at(unit, at.word_byte) | rotate_left(pack_scale(plain.scales[row][step]).byte, at.bit);
      std::memcpy(unit.data() + at.word_byte, &word, 4);
    }
  }
  return unit;
}

float bf16_half(uint32_t pair, int half) {
  return float_from_bits(half == 0 ? pair << 16 : pair & 0xFFFF0000u);
}

/// What the 128 threads of a warpgroup decode, as weights [row][k] x 2^-7: the layout of operand A of
/// wgmma.m64nNk16 in registers is that of the PTX manual.
std::vector<std::vector<float>> decode(const UnitBytes& unit) {
  std::vector<std::vector<float>> weights(kUnitRows, std::vector<float>(kUnitDepth));
  const DecodeMasks masks;
  for (int thread = 0; thread < 128; ++thread) {
    const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
    for (int step = 0; step < 4; ++step) {
      const int codes = thread * 16 + step / 2 * 8, scales = kUnitCodeBytes + thread / 4 * 8 + step / 2 * 4;
      uint32_t a[4];
      if (step % 2 == 0) {
        decode_step<HostOps, 0>(word_at(unit, codes), word_at(unit, codes + 4), word_at(unit, scales), masks,
                                a);
      } else {
        decode_step<HostOps, 1>(word_at(unit, codes), word_at(unit, codes + 4), word_at(unit, scales), masks,
                                a);
      }
      for (int r = 0; r < 4; ++r) {
        for (int half = 0; half < 2; ++half) {
          const int row = warp * 16 + g + (r % 2) * 8, k = step * 16 + t * 2 + half + (r / 2) * 8;
          weights[static_cast<size_t>(row)][static_cast<size_t>(k)] = bf16_half(a[r], half);
        }
      }
    }
  }
  return weights;
}

TEST(PackedLayout, EveryBitOfAUnitHasOnePlace) {
  std::set<int> places;
  for (int row = 0; row < kUnitRows; ++row) {
    for (int k = 0; k < kUnitDepth; ++k) {
      for (int bit = 0; bit < 4; ++bit) {
        const BitPosition at = code_bit_position(row, k, bit);
        ASSERT_TRUE(at.byte >= 0 && at.byte < kUnitCodeBytes && at.bit >= 0 && at.bit < 8);
        places.insert(at.byte * 8 + at.bit);
      }
    }
    for (int step = 0; step < 4; ++step) {
      const ScalePosition at = scale_position(row, step);
      ASSERT_TRUE(at.word_byte >= kUnitCodeBytes && at.word_byte + 4 <= kUnitBytes && at.word_byte % 4 == 0);
      for (int bit = 0; bit < 8; ++bit) places.insert(at.word_byte * 8 + (at.bit + bit) % 32);
    }
  }
  EXPECT_EQ(places.size(), static_cast<size_t>(kUnitBytes * 8));
}

TEST(PackedLayout, DecodesRandomUnitsExactly) {
  std::mt19937 random(7);
  for (int trial = 0; trial < 20; ++trial) {
    PlainUnit plain;
    for (auto& row : plain.codes)
      for (uint8_t& code : row) code = random() & 15;
    for (auto& row : plain.scales)
      for (uint8_t& scale : row) scale = static_cast<uint8_t>(random() % 0x7F);
    const auto weights = decode(pack(plain));
    for (int row = 0; row < kUnitRows; ++row) {
      for (int k = 0; k < kUnitDepth; ++k) {
        const float expected = decode_e2m1(plain.codes[row][k]) * decode_e4m3(plain.scales[row][k / 16]);
        ASSERT_EQ(kDecodedToValue * weights[static_cast<size_t>(row)][static_cast<size_t>(k)], expected)
            << "row " << row << ", k " << k;
      }
    }
  }
}

TEST(PackedLayout, EveryCodeTimesEveryScaleSurvives) {
  // All 256 scales, negative ones and NaN too: k-step by k-step, every code at 4 of 64 k of a row.
  for (int first = 0; first < 256; first += 4) {
    PlainUnit plain;
    for (int k = 0; k < kUnitDepth; ++k) plain.codes[5][k] = static_cast<uint8_t>(k % 16);
    for (int step = 0; step < 4; ++step) plain.scales[5][step] = static_cast<uint8_t>(first + step);
    const auto weights = decode(pack(plain));
    for (int k = 0; k < kUnitDepth; ++k) {
      const float expected =
          decode_e2m1(static_cast<uint8_t>(k % 16)) * decode_e4m3(static_cast<uint8_t>(first + k / 16));
      const float found = kDecodedToValue * weights[5][static_cast<size_t>(k)];
      if (std::isnan(expected)) {
        ASSERT_TRUE(std::isnan(found)) << "scale " << first + k / 16 << ", code " << k % 16;
      } else {
        ASSERT_EQ(found, expected) << "scale " << first + k / 16 << ", code " << k % 16;
      }
    }
  }
}

TEST(PackedLayout, PaddingIsZeroBytes) {
  const UnitBytes unit = pack(PlainUnit{});
  for (const uint8_t byte : unit) ASSERT_EQ(byte, 0);
  for (const auto& row : decode(unit))
    for (const float weight : row) ASSERT_EQ(weight, 0.0f);
}

TEST(PackedLayout, GateAndUpOfAChannelMeetInOneThread) {
  std::set<std::pair<int64_t, int64_t>> seen;
  for (int64_t row = 0; row < 192; ++row) {
    const SourceRow from = source_row(RowOrder::kGateUpPaired, row);
    seen.insert({from.half, from.channel});
    if (row % 16 < 8) {
      const SourceRow other = source_row(RowOrder::kGateUpPaired, row + 8);
      EXPECT_EQ(from.half, 0);
      EXPECT_EQ(other.half, 1);
      EXPECT_EQ(other.channel, from.channel);
    }
  }
  EXPECT_EQ(seen.size(), 192u);
  EXPECT_TRUE(seen.count({0, 95}) == 1 && seen.count({1, 95}) == 1);
}

TEST(PackedLayout, SizesArePaddedToUnits) {
  const PackedShape gate_up{RowOrder::kGateUpPaired, 2880, 2880};
  EXPECT_EQ(gate_up.row_blocks(), 90);
  EXPECT_EQ(gate_up.depth_units(), 45);
  EXPECT_EQ(gate_up.bytes(), 90 * 45 * 2304);
  const PackedShape odd{RowOrder::kPlain, 80, 16};
  EXPECT_EQ(odd.bytes(), 2 * 1 * 2304);
  EXPECT_EQ(odd.unit_offset(1, 0), 2304);
  // Beyond 2^31 bytes.
  const PackedShape large{RowOrder::kPlain, 65536, 65536};
  EXPECT_EQ(large.unit_offset(1023, 1023), (int64_t{1} << 20) * 2304 - 2304);
}

TEST(TileSchedule, TilesCoverEveryTokenOnce) {
  for (const GemmKernelShape& shape : kGemmKernels) {
    for (int32_t rows = 1; rows < 700; ++rows) {
      constexpr int32_t kRowTiles = 3, kGroupBegin = 11;
      const TokenTiling tiling = tile_tokens(rows, shape.tokens, shape.granule);
      ASSERT_LE(tiling.rows_per_tile, shape.tokens);
      ASSERT_EQ(tiling.rows_per_tile % shape.granule, 0);
      std::vector<int> covered(static_cast<size_t>(rows * kRowTiles));
      for (int32_t item = 0; item < tiling.tiles * kRowTiles; ++item) {
        const WorkTile tile = work_tile(item, 5, kGroupBegin, rows, shape.tokens, shape.granule);
        ASSERT_EQ(tile.expert, 5);
        ASSERT_GT(tile.rows, 0);
        for (int32_t row = 0; row < tile.rows; ++row) {
          const int64_t of_group = tile.first_row - kGroupBegin + row;
          ++covered[static_cast<size_t>(of_group * kRowTiles + tile.row_tile)];
        }
      }
      for (const int times : covered) ASSERT_EQ(times, 1) << rows << " rows, " << shape.name;
    }
  }
}

TEST(GemmChoice, FollowsRowsAnExpertWhereTilesFillTheGpu) {
  struct Expected {
    int64_t tokens;
    GemmKernel gate_up, down;
  };
  using enum GemmKernel;
  const auto expect = [](int64_t hidden, int64_t intermediate, int64_t experts, int64_t top_k,
                         std::initializer_list<Expected> all) {
    for (const Expected& expected : all) {
      const int64_t rows = expected.tokens * top_k;
      EXPECT_EQ(choose_gemm_kernel(rows, experts, 2 * intermediate / 64).kernel, expected.gate_up)
          << hidden << ", T " << expected.tokens;
      EXPECT_EQ(choose_gemm_kernel(rows, experts, hidden / 64).kernel, expected.down)
          << hidden << ", T " << expected.tokens;
    }
  };
  // DeepSeek-V3, Qwen3-30B-A3B: as measured.
  expect(7168, 2048, 256, 8,
         {{1, kNarrow, kNarrow},
          {256, kNarrow, kNarrow},
          {640, kNarrow, kNarrow},
          {672, kMedium, kMedium},
          {1024, kMedium, kMedium},
          {2048, kBroad, kBroad},
          {4096, kWide, kWide}});
  expect(2048, 768, 128, 8,
         {{1, kFew, kFew},
          {4, kNarrow, kNarrow},
          {160, kNarrow, kNarrow},
          {256, kMedium, kMedium},
          {1024, kBroad, kBroad},
          {2048, kWide, kWide}});
  expect(4096, 14336, 8, 2, {{256, kBroad, kBroad}});  // Mixtral: 128 tiles of medium, were rows even
  // DeepSeek-V3's shared expert: 16 and 28 tiles of 256 rows for 132 SMs.
  expect(7168, 2048, 1, 1,
         {{1, kFew, kFew},
          {16, kFew, kFew},
          {32, kFew, kMedium},
          {64, kMedium, kMedium},
          {256, kMedium, kMedium},
          {8192, kWide, kWide}});
  expect(2048, 1024, 8, 2, {{8, kFew, kFew}, {32, kFew, kFew}, {64, kMedium, kMedium}});
}

TEST(GemmPlan, HasEveryExpertInOneLaunch) {
  for (const int64_t experts : {1, 8, 128, 700}) {
    for (const int64_t rows_per_expert : {1, 8, 20, 40, 70, 100, 1000}) {
      for (const int64_t row_blocks : {1, 24, 64}) {
        const GemmPlan plan = plan_gemm(experts * rows_per_expert, experts, row_blocks);
        if (plan.count == 2) {
          // What the launcher and the bits rely on: see plan_gemm().
          ASSERT_NE(plan.main().kernel, GemmKernel::kFew);
          ASSERT_TRUE(plan.main().gathers && shape_of(plan.parts[1].kernel).gathers);
        }
        for (int32_t rows = 1; rows < 1000; ++rows) {
          int launches = 0;
          for (int i = 0; i < plan.count; ++i) {
            const int32_t found = plan.parts[static_cast<size_t>(i)].band.of(rows);
            ASSERT_TRUE(found == 0 || found == rows);
            launches += found == rows ? 1 : 0;
          }
          ASSERT_EQ(launches, 1) << experts << " experts, " << rows << " rows";
        }
      }
    }
  }
}

TEST(GemmPlan, GivesExpertsFarFromTheMeanALaunchWhereTilesAreMany) {
  using enum GemmKernel;
  const auto kernels = [](int64_t rows_per_expert, int64_t experts, int64_t row_blocks) {
    const GemmPlan plan = plan_gemm(rows_per_expert * experts, experts, row_blocks);
    return std::vector<GemmKernel>{plan.main().kernel,
                                   plan.parts[static_cast<size_t>(plan.count - 1)].kernel};
  };
  const auto both = [](GemmKernel main, GemmKernel other) { return std::vector<GemmKernel>{main, other}; };
  // DeepSeek-V3's gate and up: 31 waves.
  EXPECT_EQ(kernels(8, 256, 64), both(kNarrow, kMedium));
  EXPECT_EQ(kernels(32, 256, 64), both(kMedium, kWide));
  EXPECT_EQ(kernels(64, 256, 64), both(kBroad, kWide));
  EXPECT_EQ(kernels(128, 256, 64), both(kWide, kBroad));
  // Qwen3-30B-A3B's: 6.
  EXPECT_EQ(kernels(8, 128, 24), both(kNarrow, kNarrow));
  EXPECT_EQ(kernels(64, 128, 24), both(kBroad, kBroad));
  EXPECT_EQ(kernels(128, 128, 24), both(kWide, kBroad));
  EXPECT_EQ(kernels(4096, 1, 64), both(kWide, kWide));
}

TEST(TileSchedule, TokenTilesOfARowTileFollowEachOther) {
  EXPECT_EQ(work_tile(0, 0, 0, 300, 160, 16).row_tile, 0);
  EXPECT_EQ(work_tile(1, 0, 0, 300, 160, 16).row_tile, 0);
  EXPECT_EQ(work_tile(2, 0, 0, 300, 160, 16).row_tile, 1);
  EXPECT_EQ(work_tile(1, 0, 0, 300, 160, 16).first_row, 160);
  EXPECT_EQ(tile_tokens(0, 160, 16).tiles, 0);
}

}  // namespace
}  // namespace fourfold::sm90
