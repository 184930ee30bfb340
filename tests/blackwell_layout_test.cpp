// What this project says of layouts, held against CuTe, on the host: the 128x4 layout of scales, which lane
// of the sm_120 multiply holds which element, and the emulation of that multiply. None of it needs a GPU.
#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cmath>
#include <random>

#include "cute/tensor.hpp"  // has to come first

#include "blackwell/group_types.cuh"
#include "blackwell_emulated_loads.h"
#include "blackwell_emulated_multiply.h"
#include "cute/atom/mma_traits_sm120.hpp"
#include "cutlass/detail/sm100_blockscaled_layout.hpp"
#include "fourfold/scale_layout.h"

namespace fourfold {
namespace {

using Multiply = cute::SM120::BLOCKSCALED::SM120_16x8x64_TN_VS<cute::float_e2m1_t, cute::float_e2m1_t, float,
                                                               cute::float_ue4m3_t, 16>;
using Traits = cute::MMA_Traits<Multiply>;
constexpr int kLanes = 32, kRows = 16, kColumns = 8, kDepth = 64, kBlocks = kDepth / 16;

/// Offsets of CuTe's layouts of A's, B's and D's scales that are not ours, and what CuTe says of their size.
struct ScaleCheck {
  int64_t checked = 0, different = 0;
};

ScaleCheck check_scales(int m, int n, int k) {
  using Config = cutlass::detail::Sm1xxBlockScaledConfig<16>;
  using Output = cutlass::detail::Sm1xxBlockScaledOutputConfig<16>;
  const auto a = Config::tile_atom_to_shape_SFA(cute::make_shape(m, n, k, 1));
  const auto b = Config::tile_atom_to_shape_SFB(cute::make_shape(m, n, k, 1));
  const auto d = Output::tile_atom_to_shape_SFD(cute::make_shape(m, k, n, 1));  // scales along its columns
  const int64_t k_sf = (k + 15) / 16;
  ScaleCheck check;
  const auto expect = [&](int64_t found, int64_t row, int64_t block) {
    ++check.checked;
    check.different += found != swizzled_scale_offset(row, block, k_sf);
  };
  for (int block = 0; block < k_sf; ++block) {
    const int last = std::min(block * 16 + 15, k - 1);
    for (int row = 0; row < m; ++row) {
      expect(a(row, block * 16, 0), row, block);
      expect(a(row, last, 0), row, block);
      expect(d(row, block * 16, 0), row, block);
    }
    for (int row = 0; row < n; ++row) expect(b(row, block * 16, 0), row, block);
  }
  check.different += cute::cosize(cute::filter_zeros(a)) != swizzled_scale_bytes(m, k_sf);
  check.different += cute::cosize(cute::filter_zeros(b)) != swizzled_scale_bytes(n, k_sf);
  return check;
}

TEST(BlackwellLayout, ScalesLieWhereCuteLooksForThem) {
  const int shapes[][3] = {{128, 128, 64},  {1, 1, 16},      {7, 13, 80},     {129, 257, 144},
                           {33, 200, 1040}, {300, 1, 272},   {130, 192, 16},  {2048, 768, 2048},
                           {1, 4096, 7168}, {255, 127, 112}, {4080, 9, 4160}, {31, 97, 2880},
                           {640, 5, 32}};
  int64_t checked = 0;
  for (const auto& [m, n, k] : shapes) {
    const ScaleCheck check = check_scales(m, n, k);
    EXPECT_EQ(check.different, 0) << m << "x" << n << "x" << k;
    checked += check.checked;
  }
  std::mt19937 random(11);
  for (int trial = 0; trial < 200; ++trial) {
    const int m = 1 + static_cast<int>(random() % 400), n = 1 + static_cast<int>(random() % 400);
    const int k = 16 * (1 + static_cast<int>(random() % 40));
    const ScaleCheck check = check_scales(m, n, k);
    EXPECT_EQ(check.different, 0) << m << "x" << n << "x" << k;
    checked += check.checked;
  }
  EXPECT_GT(checked, 1000000);
}

/// What is written for a group, byte for byte against what the kernels read it as: sm_103's type of scales is
/// its own.
TEST(BlackwellLayout, GroupEntriesHaveTheBytesOfCutes) {
  using blackwell::is_entry;
  using Config = blackwell::ScaleConfig;
  using OfSm103 = blackwell::Sm103ScaleConfig;
  std::mt19937 random(13);
  for (int trial = 0; trial < 1000; ++trial) {
    const int m = trial == 0 ? 0 : static_cast<int>(random() % 3000);
    const int n = 8 * (1 + static_cast<int>(random() % 900)), k = 32 * (1 + static_cast<int>(random() % 500));
    const int64_t stride = int64_t{k} << (random() % 24);
    SCOPED_TRACE(testing::Message() << m << "x" << n << "x" << k);
    EXPECT_TRUE(is_entry(blackwell::GroupShape{m, n, k}, blackwell::ShapeEntry{m, n, k}));
    EXPECT_TRUE(is_entry(blackwell::GroupStride{stride, {}, {}}, blackwell::StrideEntry{stride}));
    const auto shape = cute::make_shape(m, n, k, 1);
    const auto a = blackwell::scale_layout_of(m, k), b = blackwell::scale_layout_of(n, k);
    EXPECT_TRUE(is_entry(Config::tile_atom_to_shape_SFA(shape), a));
    EXPECT_TRUE(is_entry(Config::tile_atom_to_shape_SFB(shape), b));
    EXPECT_TRUE(is_entry(OfSm103::tile_atom_to_shape_SFA(shape), a));
    EXPECT_TRUE(is_entry(OfSm103::tile_atom_to_shape_SFB(shape), b));
    const auto of_sm103 = std::bit_cast<blackwell::Sm103ScaleLayout>(b);
    for (int i = 0; i < 20; ++i) {
      const int row = static_cast<int>(random() % static_cast<unsigned>(n));
      const int block = static_cast<int>(random() % static_cast<unsigned>(k / 16));
      EXPECT_EQ(of_sm103(row, block * 16 + 7, 0), swizzled_scale_offset(row, block, k / 16));
    }
  }
}

/// CuTe numbers the elements of a fragment's matrix with the rows running fastest.
TEST(BlackwellLayout, FragmentsOfTheWarpMultiplyAreCutes) {
  const typename Traits::ALayout a;
  const typename Traits::BLayout b;
  const typename Traits::CLayout c;
  const typename Traits::SFALayout a_scales;
  const typename Traits::SFBLayout b_scales;
  int different = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / 4, quad = lane % 4;
    for (int i = 0; i < 32; ++i) {  // word i / 8
      const int row = group + i / 8 % 2 * 8, k = quad * 8 + i % 8 + i / 16 * 32;
      different += static_cast<int>(a(lane, i)) != row + kRows * k;
    }
    for (int i = 0; i < 16; ++i) {
      const int k = quad * 8 + i % 8 + i / 8 * 32;
      different += static_cast<int>(b(lane, i)) != group + kColumns * k;
    }
    for (int i = 0; i < 4; ++i) {
      different += static_cast<int>(c(lane, i)) != group + i / 2 * 8 + kRows * (quad * 2 + i % 2);
    }
    for (int k = 0; k < kDepth; ++k) {  // lanes 4g and 4g + 1 have rows g and g + 8
      if (quad < 2) different += static_cast<int>(a_scales(lane, k)) != group + quad * 8 + kRows * k;
      if (quad == 0) different += static_cast<int>(b_scales(lane, k)) != group + kColumns * k;
    }
  }
  EXPECT_EQ(different, 0);
}

/// A warp's registers on the host.
struct Registers {
  std::array<std::array<uint32_t, 4>, kLanes> a_words{};
  std::array<std::array<uint32_t, 2>, kLanes> b_words{};
  std::array<uint32_t, kLanes> a_scale_words{}, b_scale_words{};

  uint32_t a(int word, int lane) const {
    return a_words[static_cast<size_t>(lane)][static_cast<size_t>(word)];
  }
  uint32_t b(int word, int lane) const {
    return b_words[static_cast<size_t>(lane)][static_cast<size_t>(word)];
  }
  uint32_t a_scales(int lane) const { return a_scale_words[static_cast<size_t>(lane)]; }
  uint32_t b_scales(int lane) const { return b_scale_words[static_cast<size_t>(lane)]; }
};

struct Operands {
  uint8_t a[kRows][kDepth], b[kColumns][kDepth], a_scales[kRows][kBlocks], b_scales[kColumns][kBlocks];
};

Operands random_operands(std::mt19937& random) {
  Operands x{};
  for (auto& row : x.a)
    for (uint8_t& code : row) code = random() % 16;
  for (auto& row : x.b)
    for (uint8_t& code : row) code = random() % 16;
  for (auto& row : x.a_scales)
    for (uint8_t& code : row) code = static_cast<uint8_t>(random() % 127);
  for (auto& row : x.b_scales)
    for (uint8_t& code : row) code = static_cast<uint8_t>(random() % 127);
  return x;
}

/// Every lane is given what CuTe's layouts say that it holds.
Registers distribute(const Operands& x) {
  const typename Traits::ALayout a;
  const typename Traits::BLayout b;
  const typename Traits::SFALayout a_scales;
  const typename Traits::SFBLayout b_scales;
  Registers registers;
  for (size_t lane = 0; lane < kLanes; ++lane) {
    const int t = static_cast<int>(lane);
    for (size_t i = 0; i < 32; ++i) {
      const int at = a(t, static_cast<int>(i));
      registers.a_words[lane][i / 8] |= uint32_t{x.a[at % kRows][at / kRows]} << (4 * (i % 8));
    }
    for (size_t i = 0; i < 16; ++i) {
      const int at = b(t, static_cast<int>(i));
      registers.b_words[lane][i / 8] |= uint32_t{x.b[at % kColumns][at / kColumns]} << (4 * (i % 8));
    }
    for (int block = 0; block < kBlocks; ++block) {
      const int at_a = a_scales(t, block * 16), at_b = b_scales(t, block * 16);
      registers.a_scale_words[lane] |= uint32_t{x.a_scales[at_a % kRows][at_a / kRows / 16]} << (8 * block);
      registers.b_scale_words[lane] |= uint32_t{x.b_scales[at_b % kColumns][at_b / kColumns / 16]}
                                       << (8 * block);
    }
  }
  return registers;
}

double element(const Operands& x, int row, int column) {
  double sum = 0.0;
  for (int k = 0; k < kDepth; ++k) {
    const double scales =
        double{decode_e4m3(x.a_scales[row][k / 16])} * decode_e4m3(x.b_scales[column][k / 16]);
    sum += double{decode_e2m1(x.a[row][k])} * decode_e2m1(x.b[column][k]) * scales;
  }
  return sum;
}

/// Four additions in float32, of blocks that are exact: each errs by half an ulp of what has been added up by
/// then.
double most_error(const Operands& x, int row, int column) {
  double largest = 0.0;
  for (int k = 0; k < kDepth; ++k) {
    largest += std::abs(double{decode_e2m1(x.a[row][k])} * decode_e2m1(x.b[column][k]) *
                        decode_e4m3(x.a_scales[row][k / 16]) * decode_e4m3(x.b_scales[column][k / 16]));
  }
  return 4 * 0x1p-24 * largest;
}

TEST(BlackwellLayout, EmulatedMultiplyIsTheWarpMultiply) {
  std::mt19937 random(7);
  const typename Traits::CLayout c;
  int wrong = 0;
  for (int trial = 0; trial < 300; ++trial) {
    const Operands operands = random_operands(random);
    const Registers registers = distribute(operands);
    for (int lane = 0; lane < kLanes; ++lane) {
      float sums[4] = {};
      emulation::multiply_lane(lane, registers, sums);
      for (int i = 0; i < 4; ++i) {
        const int at = c(lane, i), row = at % kRows, column = at / kRows;
        wrong += !(std::abs(sums[i] - element(operands, row, column)) <= most_error(operands, row, column));
      }
    }
  }
  EXPECT_EQ(wrong, 0);
}

/// What CuTe makes of the emulation's loads: boxes, coordinates and extents of bytes, the strides as they
/// were.
TEST(BlackwellLayout, EmulationLoadsCodesAsBytes) {
  using cute::_;
  using cute::_0;
  using cute::_1;
  using cute::_128;
  using Code = cutlass::float_e2m1_t;
  using RowStride = cute::Stride<int64_t, _1, _0>;
  // Shared memory of the kernel: rows of 128 codes, 64 bytes, swizzled.
  const auto atom = cute::composition(cute::Swizzle<2, 4, 3>{}, cute::smem_ptr_flag_bits<4>{},
                                      cute::Layout<cute::Shape<cute::_8, _128>, cute::Stride<_128, _1>>{});
  const auto shared = cute::tile_to_shape(atom, cute::Shape<_128, _128>{});
  const auto matrix_of = [](int rows, int depth) {
    return cute::make_tensor(
        static_cast<const Code*>(nullptr),
        cute::make_layout(cute::make_shape(rows, depth, _1{}), RowStride{depth, {}, {}}));
  };
  const auto load = cute::make_tma_copy(cute::SM90_TMA_LOAD{}, matrix_of(128, 128), shared,
                                        cute::Shape<_128, _128>{}, _1{});
  for (const auto& [rows, depth] : {std::pair(1, 32), {300, 320}, {4096, 7168}}) {
    cute::array<uint32_t, 5> extents = {1, 1, 1, 1, 1};
    cute::array<uint64_t, 5> strides = {};
    cute::detail::fill_tma_gmem_shape_stride(load, matrix_of(rows, depth), extents, strides);
    EXPECT_EQ(extents[0], static_cast<uint32_t>(depth / 2));
    EXPECT_EQ(extents[1], static_cast<uint32_t>(rows));
    EXPECT_EQ(strides[1] * 4 / 8, static_cast<uint64_t>(depth / 2)) << "bytes, as the kernel reckons them";
    const auto tiles = cute::local_tile(load.get_tma_tensor(cute::make_shape(rows, depth, 1)),
                                        cute::Shape<_128, _128>{}, cute::make_coord(_, _, 0));
    for (int row_tile = 0; row_tile < (rows + 127) / 128; ++row_tile) {
      for (int depth_tile = 0; depth_tile < (depth + 127) / 128; ++depth_tile) {
        const auto at = tiles(0, 0, row_tile, depth_tile);
        EXPECT_EQ(static_cast<int>(cute::get<0>(at)), depth_tile * 64);
        EXPECT_EQ(static_cast<int>(cute::get<1>(at)), row_tile * 128);
      }
    }
  }
}

TEST(BlackwellLayout, CodesMeanWhatCutlassSays) {
  for (uint8_t code = 0; code < 16; ++code) {
    EXPECT_EQ(decode_e2m1(code), static_cast<float>(cutlass::float_e2m1_t::bitcast(code)));
  }
  for (uint8_t code = 0; code < 0x7F; ++code) {
    EXPECT_EQ(decode_e4m3(code), static_cast<float>(cutlass::float_ue4m3_t::bitcast(code)));
  }
}

}  // namespace
}  // namespace fourfold
