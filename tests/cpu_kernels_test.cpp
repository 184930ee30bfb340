// The kernels of the backend "cpu" alone: the packed layout, every multiplication against plain sums, staging
// bit for bit.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <random>

#include "cpu/panel_matrix.h"
#include "cpu/staged_rows.h"
#include "cpu_support.h"
#include "fourfold/quantize.h"
#include "fourfold/reference.h"
#include "fourfold/scale_layout.h"

namespace fourfold::cpu {
namespace {

constexpr uint64_t kSeed = 20;

/// A vector whose data is 64-byte aligned.
template <class T>
class Aligned {
 public:
  explicit Aligned(int64_t count) : buffer_(static_cast<size_t>(count) * sizeof(T)) {
    std::memset(buffer_.data(), 0, buffer_.bytes());
  }
  T* data() const { return reinterpret_cast<T*>(buffer_.data()); }
  T& operator[](int64_t i) const { return data()[i]; }

 private:
  Buffer buffer_;
};

// ---- layout ----

TEST(PanelLayout, WordsHoldEveryCodeOnce) {
  for (int k = 0; k < 8; ++k) EXPECT_EQ(k_of_nibble(nibble_of(k)), k);
  for (uint32_t codes : {0x76543210u, 0xFEDCBA98u, 0x0F0F0F0Fu, 0x13579BDFu}) {
    const uint32_t word = pack_word(codes);
    for (int k = 0; k < 8; ++k) EXPECT_EQ(code_in_word(word, k), codes >> (4 * k) & 15u);
  }
}

TEST(PanelLayout, CodesAndScalesFillAChunkWithoutOverlap) {
  std::array<int, kPanelChunkBytes> uses = {};
  for (int row = 0; row < kPanelRows; ++row) {
    for (int k = 0; k < kChunkDepth; k += 8) {
      for (int byte = 0; byte < 4; ++byte) ++uses[static_cast<size_t>(int64_t{word_offset(row, k)} + byte)];
    }
    for (int block = 0; block < kBlocksPerChunk; ++block)
      ++uses[static_cast<size_t>(scale_offset(row, block))];
  }
  EXPECT_TRUE(std::all_of(uses.begin(), uses.end(), [](int count) { return count == 1; }));
}

TEST(PanelLayout, BytesOfActivationsMeetTheCodesOfAWord) {
  std::array<int, kBlockDepth> uses = {};
  for (int k = 0; k < kBlockDepth; ++k) ++uses[static_cast<size_t>(int_position(k))];
  EXPECT_TRUE(std::all_of(uses.begin(), uses.end(), [](int count) { return count == 1; }));
  for (int k = 0; k < 8; ++k) {
    // Low nibbles of the four bytes are the first word of four activations, high nibbles the second.
    EXPECT_EQ(int_position(k), nibble_of(k) % 2 * 4 + nibble_of(k) / 2);
  }
}

// ---- random operands ----

/// A random NVFP4 matrix [rows, cols] whose scales are finite and not negative.
BlockScaledMatrix random_matrix(int64_t rows, int64_t cols, std::mt19937& random) {
  BlockScaledMatrix matrix{QuantFormat::kNvfp4, rows, cols, {}, {}, {}};
  matrix.codes.resize(static_cast<size_t>(rows * cols / 2));
  matrix.scales.resize(static_cast<size_t>(rows * cols / kBlockDepth));
  for (uint8_t& pair : matrix.codes) pair = static_cast<uint8_t>(random());
  for (uint8_t& scale : matrix.scales) scale = static_cast<uint8_t>(random() % 0x7F);
  return matrix;
}

Aligned<uint8_t> pack(const BlockScaledMatrix& matrix) {
  const WeightView view = matrix.view();
  Aligned<uint8_t> packed(pair_bytes(matrix.cols));
  EXPECT_FALSE(pack_pair({&view, nullptr}, 0, PanelStorage::kNvfp4, nullptr,
                         reinterpret_cast<std::byte*>(packed.data())));
  return packed;
}

std::vector<float> decode(const BlockScaledMatrix& matrix) {
  std::vector<float> values(static_cast<size_t>(matrix.rows * matrix.cols));
  for (int64_t row = 0; row < matrix.rows; ++row) {
    decode_row(matrix.view(), row, values.data() + row * matrix.cols);
  }
  return values;
}

/// Operand of `rows` staged rows.
struct Operand {
  RowGroup group;
  Aligned<std::byte> bytes;
  std::vector<float> row_factors;

  Operand(const RowFunctions& functions, const StagedActivations& staged, ActivationFormat format,
          OperandForm form, int64_t rows, int64_t depth)
      : bytes(operand_bytes(form, format, rows, depth)), row_factors(static_cast<size_t>(rows)) {
    std::memset(bytes.data(), 0xFB, static_cast<size_t>(operand_bytes(form, format, rows, depth)));
    group.rows = rows;
    group.form = form;
    const RowStager stager(functions, format, depth);
    const Aligned<std::byte> scratch(stager.scratch_bytes());
    for (int64_t row = 0; row < rows; ++row) {
      stager.expand(row_of(staged, row), group, row, bytes.data(), nullptr,
                    row_factors[static_cast<size_t>(row)], scratch.data());
    }
  }
};

StagedActivations staged_as(BlockScaledMatrix& matrix) {
  StagedActivations staged;
  staged.codes = {matrix.codes.data(), matrix.rows, matrix.cols / 2};
  staged.scales = {matrix.scales.data(), matrix.rows, matrix.cols / kBlockDepth};
  return staged;
}

class CpuKernels : public ForEveryIsa {};
INSTANTIATE_TEST_SUITE_P(Isa, CpuKernels, testing::ValuesIn(kernel_cases()), name_of_case);

/// The kernel sets with tiles.
class CpuTiles : public ForEveryIsa {};
std::vector<KernelCase> tile_cases() {
  std::vector<KernelCase> cases = kernel_cases();
  std::erase_if(cases, [](const KernelCase& entry) { return entry.kernels->multiply_tiles == nullptr; });
  return cases;
}
INSTANTIATE_TEST_SUITE_P(Isa, CpuTiles, testing::ValuesIn(tile_cases()), name_of_case);

constexpr int64_t kDepths[] = {16, 64, 80, 512, 1040, 2048};
constexpr int64_t kRowCounts[] = {1, 2, 3, 4, 5, 7, 12, 13, 33, 64, 77, 100};

// The integer path is exact before float32 accumulation: block by block the sum of products is an integer,
// and its product with both scales has at most 20 significant bits. So the emulation, which adds exact block
// sums in order, gives the same bits on every instruction set.
TEST_P(CpuKernels, IntegerSumsEqualTheEmulationBitForBit) {
  std::mt19937 random(kSeed);
  for (const int64_t depth : kDepths) {
    for (const int64_t rows : kRowCounts) {
      const BlockScaledMatrix weights = random_matrix(kPairRows, depth, random);
      BlockScaledMatrix activations = random_matrix(rows, depth, random);
      const Operand operand(functions(), staged_as(activations), ActivationFormat::kNvfp4, OperandForm::kInts,
                            rows, depth);
      const Aligned<uint8_t> packed = pack(weights);
      const Aligned<std::byte> scratch(kKernelScratchBytes);
      const Aligned<float> sums(rows * kPairRows);
      kernels().multiply_ints(packed.data(), chunks_of(depth),
                              reinterpret_cast<const IntBlock*>(operand.bytes.data()), rows, scratch.data(),
                              sums.data());
      const std::vector<float> w = decode(weights), a = decode(activations);
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t column = 0; column < kPairRows; ++column) {
          float expected = 0.0f;
          for (int64_t block = 0; block < depth / kBlockDepth; ++block) {
            double exact = 0.0;
            for (int64_t k = block * kBlockDepth; k < (block + 1) * kBlockDepth; ++k) {
              exact += double{w[static_cast<size_t>(column * depth + k)]} *
                       double{a[static_cast<size_t>(row * depth + k)]};
            }
            ASSERT_EQ(static_cast<double>(static_cast<float>(exact)), exact);
            expected += static_cast<float>(exact);
          }
          ASSERT_EQ(sums[row * kPairRows + column], expected)
              << "depth " << depth << ", " << rows << " rows, at " << row << ", " << column;
        }
      }
    }
  }
}

/// Calls check(matrix) with matrices of one chunk that hold every code with every scale between them.
template <class Check>
void for_every_code_and_scale(const Check& check) {
  // 16 rows x 4 blocks of a panel hold 64 scales at a time; every block holds all codes.
  BlockScaledMatrix matrix{QuantFormat::kNvfp4, kPairRows, kChunkDepth, {}, {}, {}};
  for (int64_t i = 0; i < kPairRows * kChunkDepth / 2; ++i) {
    matrix.codes.push_back(static_cast<uint8_t>((2 * i % 16) | (2 * i + 1) % 16 << 4));
  }
  for (int first = 0; first <= kE4m3MaxCode; ++first) {
    matrix.scales.clear();
    for (int64_t i = 0; i < kPairRows * kBlocksPerChunk; ++i) {
      matrix.scales.push_back(static_cast<uint8_t>((first + i) % (kE4m3MaxCode + 1)));
    }
    check(matrix);
  }
}

TEST_P(CpuKernels, DecodeEveryCodeTimesEveryScaleExactly) {
  for_every_code_and_scale([&](const BlockScaledMatrix& matrix) {
    const Aligned<float> decoded(kChunkDepth * kPairRows);
    kernels().decode_floats(pack(matrix).data(), 1, decoded.data());
    const std::vector<float> expected = decode(matrix);
    for (int64_t row = 0; row < kPairRows; ++row) {
      for (int64_t k = 0; k < kChunkDepth; ++k) {
        ASSERT_EQ(decoded[k * kPairRows + row], expected[static_cast<size_t>(row * kChunkDepth + k)]);
      }
    }
  });
}

/// What float32 sums of `depth` products in any order can be off: each of them rounds, and so do `depth - 1`
/// additions: depth * 2^-24 * sum of magnitudes, to first order.
void expect_close(const float* sums, const std::vector<float>& w, const std::vector<float>& a, int64_t rows,
                  int64_t depth, double factor) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < kPairRows; ++column) {
      double exact = 0.0, magnitude = 0.0;
      for (int64_t k = 0; k < depth; ++k) {
        const double product = double{w[static_cast<size_t>(column * depth + k)]} *
                               double{a[static_cast<size_t>(row * depth + k)]};
        exact += product;
        magnitude += std::abs(product);
      }
      const double bound = static_cast<double>(depth) * 0x1p-24 * magnitude;
      ASSERT_NEAR(factor * sums[row * kPairRows + column], exact, bound)
          << "depth " << depth << ", " << rows << " rows, at " << row << ", " << column;
    }
  }
}

TEST_P(CpuKernels, FloatSumsAreWithinTheirRoundings) {
  std::mt19937 random(kSeed + 1);
  std::normal_distribution<float> normal;
  for (const int64_t depth : kDepths) {
    for (const int64_t rows : kRowCounts) {
      const BlockScaledMatrix weights = random_matrix(kPairRows, depth, random);
      std::vector<float> a;
      for (int64_t i = 0; i < rows * depth; ++i) a.push_back(normal(random));
      const int64_t stride = chunks_of(depth) * kChunkDepth;
      const Aligned<float> operand(rows * stride);
      for (int64_t row = 0; row < rows; ++row) {
        std::copy_n(a.begin() + row * depth, depth, operand.data() + row * stride);
      }
      const Aligned<std::byte> scratch(kKernelScratchBytes);
      const Aligned<float> sums(rows * kPairRows);
      multiply_pair_floats(kernels(), pack(weights).data(), chunks_of(depth), operand.data(), rows,
                           scratch.data(), sums.data());
      expect_close(sums.data(), decode(weights), a, rows, depth, 1.0);
    }
  }
}

TEST_P(CpuKernels, FloatSumsOfFewRowsHaveTheBitsOfMany) {
  if (kernels().isa == Isa::kAvx2 || kernels().isa == Isa::kPortable) {
    ASSERT_EQ(kernels().multiply_few_floats, nullptr);
    GTEST_SKIP() << "only avx512 and what builds on it have a kernel for few rows of floats";
  }
  ASSERT_NE(kernels().multiply_few_floats, nullptr);
  std::mt19937 random(kSeed + 41);
  std::normal_distribution<float> normal;
  Kernels general = kernels();
  general.multiply_few_floats = nullptr;
  for (const int64_t depth : kDepths) {
    for (int64_t rows = 0; rows <= kFewFloatRows; ++rows) {
      const auto packed = pack(random_matrix(kPairRows, depth, random));
      const int64_t chunks = chunks_of(depth);
      const Aligned<float> operand(std::max<int64_t>(rows, 1) * chunks * kChunkDepth);
      for (int64_t i = 0; i < rows * chunks * kChunkDepth; ++i) operand.data()[i] = normal(random);
      const Aligned<std::byte> scratch(kKernelScratchBytes);
      std::vector<float> sums[2];
      for (const bool is_general : {false, true}) {
        const Aligned<float> out((kFewFloatRows + 1) * kPairRows);
        std::fill_n(out.data(), (kFewFloatRows + 1) * kPairRows, 7.0f);  // what is behind stays
        multiply_pair_floats(is_general ? general : kernels(), packed.data(), chunks, operand.data(), rows,
                             scratch.data(), out.data());
        sums[is_general].assign(out.data(), out.data() + (kFewFloatRows + 1) * kPairRows);
      }
      ASSERT_EQ(sums[0], sums[1]) << "depth " << depth << ", " << rows << " rows";
    }
  }
}

/// The kernel sets with bf16 products.
class CpuBf16Products : public ForEveryIsa {};
std::vector<KernelCase> bf16_product_cases() {
  std::vector<KernelCase> cases = kernel_cases();
  std::erase_if(cases, [](const KernelCase& entry) { return entry.kernels->multiply_bf16 == nullptr; });
  return cases;
}
INSTANTIATE_TEST_SUITE_P(Isa, CpuBf16Products, testing::ValuesIn(bf16_product_cases()), name_of_case);

/// bf16 rows, with a magnitude of their own each, one of subnormals.
std::vector<Bf16> random_rows(int64_t rows, int64_t depth, std::mt19937& random) {
  std::normal_distribution<float> normal;
  constexpr int kExponents[] = {0, 40, -40, 122, -110, 15, -126};
  std::vector<Bf16> values;
  for (int64_t row = 0; row < rows; ++row) {
    const float scale = power_of_two(kExponents[row % std::ssize(kExponents)]);
    for (int64_t k = 0; k < depth; ++k) values.push_back(encode_bf16(normal(random) * scale / 8.0f));
  }
  return values;
}

/// Calls multiply(packed weights, chunks, operand, rows, scratch, sums) for rows of bf16 in `form` and
/// compares its sums with exact ones.
template <class Multiply>
void expect_bf16_sums(const RowFunctions& functions, OperandForm form, const Multiply& multiply) {
  std::mt19937 random(kSeed + 2);
  for (const int64_t depth : kDepths) {
    for (const int64_t rows : kRowCounts) {
      const BlockScaledMatrix weights = random_matrix(kPairRows, depth, random);
      std::vector<Bf16> values = random_rows(rows, depth, random);
      StagedActivations staged;
      staged.values = {values.data(), rows, depth};
      const Operand operand(functions, staged, ActivationFormat::kBf16, form, rows, depth);
      const Aligned<std::byte> scratch(kKernelScratchBytes);
      const Aligned<float> sums((rows + kTileRows) * kPairRows);
      multiply(pack(weights).data(), chunks_of(depth), operand.bytes.data(), rows, scratch.data(),
               sums.data());
      const std::vector<float> w = decode(weights);
      for (int64_t row = 0; row < rows; ++row) {
        std::vector<float> a;
        for (int64_t k = 0; k < depth; ++k)
          a.push_back(static_cast<float>(values[static_cast<size_t>(row * depth + k)]));
        expect_close(sums.data() + row * kPairRows, w, a, 1, depth,
                     double{operand.row_factors[static_cast<size_t>(row)]});
      }
    }
  }
}

/// One chunk's weights come back, exactly, from rows that have a 1 at one k each.
template <class Multiply>
void expect_exact_weights(const RowFunctions& functions, OperandForm form, const Multiply& multiply) {
  std::vector<Bf16> ones(static_cast<size_t>(kChunkDepth * kChunkDepth), encode_bf16(0.0f));
  for (int64_t k = 0; k < kChunkDepth; ++k)
    ones[static_cast<size_t>(k * kChunkDepth + k)] = encode_bf16(1.0f);
  StagedActivations staged;
  staged.values = {ones.data(), kChunkDepth, kChunkDepth};
  const Operand operand(functions, staged, ActivationFormat::kBf16, form, kChunkDepth, kChunkDepth);
  const Aligned<std::byte> scratch(kKernelScratchBytes);
  const Aligned<float> sums(kChunkDepth * kPairRows);
  for_every_code_and_scale([&](const BlockScaledMatrix& matrix) {
    multiply(pack(matrix).data(), 1, operand.bytes.data(), kChunkDepth, scratch.data(), sums.data());
    const std::vector<float> expected = decode(matrix);
    for (int64_t row = 0; row < kPairRows; ++row) {
      for (int64_t k = 0; k < kChunkDepth; ++k) {
        ASSERT_EQ(sums[k * kPairRows + row], expected[static_cast<size_t>(row * kChunkDepth + k)]);
      }
    }
  });
}

/// multiply_tiles and multiply_bf16 as those two take them, for bf16.
auto multiply_with_tiles(const Kernels& kernels) {
  return [&](const uint8_t* pair, int64_t chunks, const std::byte* operand, int64_t rows, std::byte* scratch,
             float* sums) {
    DecodedAhead ahead;
    kernels.multiply_tiles(pair, {}, chunks, operand, (rows + kTileRows - 1) / kTileRows, 1, scratch, ahead,
                           sums);
  };
}
auto multiply_with_bf16_products(const Kernels& kernels) {
  return [&](const uint8_t* pair, int64_t chunks, const std::byte* operand, int64_t rows, std::byte* scratch,
             float* sums) {
    kernels.multiply_bf16(pair, chunks, reinterpret_cast<const Bf16*>(operand), rows, scratch, sums);
  };
}

TEST_P(CpuTiles, OfBf16AreWithinTheirRoundings) {
  if (kernels().begin_tiles != nullptr) kernels().begin_tiles();
  expect_bf16_sums(functions(), OperandForm::kTiles, multiply_with_tiles(kernels()));
  expect_exact_weights(functions(), OperandForm::kTiles, multiply_with_tiles(kernels()));
  if (kernels().end_tiles != nullptr) kernels().end_tiles();
}

TEST_P(CpuBf16Products, SumsOfBf16AreWithinTheirRoundings) {
  expect_bf16_sums(functions(), OperandForm::kBf16Rows, multiply_with_bf16_products(kernels()));
  expect_exact_weights(functions(), OperandForm::kBf16Rows, multiply_with_bf16_products(kernels()));
}

TEST_P(CpuBf16Products, ARowHasTheSameBitsAloneAndAmongOthers) {
  std::mt19937 random(kSeed + 42);
  for (const int64_t depth : kDepths) {
    const auto packed = pack(random_matrix(kPairRows, depth, random));
    const int64_t chunks = chunks_of(depth), stride = chunks * kChunkDepth;
    const Aligned<std::byte> scratch(kKernelScratchBytes);
    for (int64_t rows = 0; rows <= 30; ++rows) {
      const std::vector<Bf16> x = random_rows(std::max<int64_t>(rows, 1), stride, random);
      const Aligned<float> sums((rows + 1) * kPairRows), alone(kPairRows);
      std::fill_n(sums.data(), (rows + 1) * kPairRows, 7.0f);  // what is behind stays
      kernels().multiply_bf16(packed.data(), chunks, x.data(), rows, scratch.data(), sums.data());
      for (int64_t row = 0; row < rows; ++row) {
        kernels().multiply_bf16(packed.data(), chunks, x.data() + row * stride, 1, scratch.data(),
                                alone.data());
        ASSERT_EQ(std::memcmp(alone.data(), sums.data() + row * kPairRows, kPairRows * sizeof(float)), 0)
            << "depth " << depth << ", " << rows << " rows, at " << row;
      }
      ASSERT_TRUE(std::all_of(sums.data() + rows * kPairRows, sums.data() + (rows + 1) * kPairRows,
                              [](float value) { return value == 7.0f; }));
    }
  }
}

TEST_P(CpuTiles, AddBothTermsOfNvfp4x2) {
  std::mt19937 random(kSeed + 3);
  if (kernels().begin_tiles != nullptr) kernels().begin_tiles();
  for (const int64_t rows : {5, 16, 33, 128}) {
    const int64_t depth = 336;
    const BlockScaledMatrix weights = random_matrix(kPairRows, depth, random);
    BlockScaledMatrix first = random_matrix(rows, depth, random), second = random_matrix(rows, depth, random);
    StagedActivations staged = staged_as(first);
    staged.residual_codes = staged_as(second).codes;
    staged.residual_scales = staged_as(second).scales;
    const Operand operand(functions(), staged, ActivationFormat::kNvfp4x2, OperandForm::kTiles, rows, depth);
    const Aligned<std::byte> scratch(kKernelScratchBytes);
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    const Aligned<float> sums(tiles * kTileRows * kPairRows);
    DecodedAhead ahead;
    kernels().multiply_tiles(pack(weights).data(), {}, chunks_of(depth), operand.bytes.data(), tiles, 2,
                             scratch.data(), ahead, sums.data());
    // Both terms as one operand of twice the depth.
    const std::vector<float> w = decode(weights), a = decode(first), b = decode(second);
    std::vector<float> w2, a2;
    for (int64_t row = 0; row < kPairRows; ++row) {
      for (int copy = 0; copy < 2; ++copy) {
        w2.insert(w2.end(), w.begin() + row * depth, w.begin() + (row + 1) * depth);
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      a2.insert(a2.end(), a.begin() + row * depth, a.begin() + (row + 1) * depth);
      a2.insert(a2.end(), b.begin() + row * depth, b.begin() + (row + 1) * depth);
    }
    expect_close(sums.data(), w2, a2, rows, 2 * depth, 1.0);
  }
  if (kernels().end_tiles != nullptr) kernels().end_tiles();
}

TEST_P(CpuTiles, OfPairsDecodedAheadHaveTheSameBits) {
  std::mt19937 random(kSeed + 43);
  if (kernels().begin_tiles != nullptr) kernels().begin_tiles();
  for (const int64_t depth : kDepths) {
    const int64_t chunks = chunks_of(depth), count = 4;
    const Aligned<uint8_t> pairs(count * pair_bytes(depth));
    for (int64_t i = 0; i < count; ++i) {
      const auto packed = pack(random_matrix(kPairRows, depth, random));
      std::copy_n(packed.data(), pair_bytes(depth), pairs.data() + i * pair_bytes(depth));
    }
    for (const int64_t rows : {1, 17, 33, 49, 65, 100, 128}) {
      const int64_t tiles = (rows + kTileRows - 1) / kTileRows, sums_of_pair = tiles * kTileRows * kPairRows;
      std::vector<Bf16> values = random_rows(rows, depth, random);
      StagedActivations staged;
      staged.values = {values.data(), rows, depth};
      const Operand operand(functions(), staged, ActivationFormat::kBf16, OperandForm::kTiles, rows, depth);
      const Aligned<std::byte> scratch(kKernelScratchBytes);
      const Aligned<float> alone(sums_of_pair), sums(sums_of_pair);
      DecodedAhead ahead;
      // Among them pairs for which another pair was decoded ahead, or none.
      for (const auto& [pair, next] : {std::pair{0, 1}, {1, 3}, {2, 3}, {3, 3}, {3, -1}, {0, 2}, {2, -1}}) {
        const auto at = [&](int64_t i) { return i < 0 ? nullptr : pairs.data() + i * pair_bytes(depth); };
        kernels().multiply_tiles(at(pair), {at(next), operand.bytes.data(), rows * 16}, chunks,
                                 operand.bytes.data(), tiles, 1, scratch.data(), ahead, sums.data());
        DecodedAhead none;
        const Aligned<std::byte> scratch_of_its_own(kKernelScratchBytes);
        kernels().multiply_tiles(at(pair), {}, chunks, operand.bytes.data(), tiles, 1,
                                 scratch_of_its_own.data(), none, alone.data());
        ASSERT_EQ(std::memcmp(sums.data(), alone.data(), static_cast<size_t>(sums_of_pair) * sizeof(float)),
                  0)
            << "depth " << depth << ", " << rows << " rows, pair " << pair;
      }
    }
  }
  if (kernels().end_tiles != nullptr) kernels().end_tiles();
}

// ---- staging ----

/// Values that a quantizer may trip over.
float awkward_value(std::mt19937& random) {
  switch (random() % 8) {
    case 0:
      return float_from_bits(static_cast<uint32_t>(random()));  // anything, NaN and infinities too
    case 1:
      return 0.0f;
    case 2:
      return -0.0f;
    case 3: {  // ties of e2m1, times a power of two
      constexpr float kTies[] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f, 6.0f};
      return kTies[random() % 8] * power_of_two(static_cast<int>(random() % 12) - 6) *
             (random() % 2 ? 1.0f : -1.0f);
    }
    case 4:
      return float_from_bits(static_cast<uint32_t>(random() % 0x00800000u));  // subnormal
    default:
      return std::normal_distribution<float>(0.0f, 3.0f)(random);
  }
}

std::vector<float> awkward_row(int64_t cols, std::mt19937& random, bool is_finite) {
  std::vector<float> x;
  while (static_cast<int64_t>(x.size()) < cols) {
    const float value = static_cast<float>(encode_bf16(awkward_value(random)));
    if (!is_finite || std::isfinite(value)) x.push_back(value);
  }
  return x;
}

/// Scratch and row of a stager.
struct StagedOne {
  std::vector<Bf16> values;
  std::vector<uint8_t> codes, scales, residual_codes, residual_scales;
  std::vector<float> row_scales = {1.0f};

  explicit StagedOne(int64_t cols)
      : values(static_cast<size_t>(cols)),
        codes(static_cast<size_t>(cols)),
        scales(static_cast<size_t>(cols / 16)),
        residual_codes(static_cast<size_t>(cols)),
        residual_scales(static_cast<size_t>(cols / 16)) {}

  StagedActivations views(ActivationFormat format, int64_t cols) {
    StagedActivations staged;
    const int64_t code_bytes = format == ActivationFormat::kFp8 ? cols : cols / 2;
    if (format == ActivationFormat::kBf16) staged.values = {values.data(), 1, cols};
    staged.codes = {codes.data(), 1, code_bytes};
    staged.scales = {scales.data(), 1, cols / 16};
    staged.residual_codes = {residual_codes.data(), 1, cols / 2};
    staged.residual_scales = {residual_scales.data(), 1, cols / 16};
    staged.row_scales = row_scales;
    return staged;
  }
};

TEST_P(CpuKernels, StageLikeTheReferenceBitForBit) {
  std::mt19937 random(kSeed + 4);
  for (int trial = 0; trial < 400; ++trial) {
    const int64_t cols = 16 * (1 + static_cast<int64_t>(random() % 40));
    const std::vector<float> x = awkward_row(cols, random, trial % 2 == 0);
    std::vector<Bf16> rows;
    for (const float value : x) rows.push_back(encode_bf16(value));
    const float amax = absolute_maximum(MatrixView<const Bf16>(rows.data(), 1, cols));
    for (const auto format : {ActivationFormat::kNvfp4, ActivationFormat::kNvfp4x2, ActivationFormat::kFp8,
                              ActivationFormat::kBf16}) {
      StagedOne expected(cols), found(cols);
      expected.row_scales[0] = found.row_scales[0] = trial % 3 == 0 ? 0.01f : nvfp4_global_scale(amax);
      reference::stage(format, {rows.data(), 1, cols}, expected.views(format, cols));
      const RowStager stager(functions(), format, cols);
      const Aligned<std::byte> scratch(stager.scratch_bytes());
      functions().widen(rows.data(), cols, stager.values(scratch.data()));
      stager.quantize(0, found.views(format, cols), scratch.data());
      ASSERT_EQ(found.codes, expected.codes) << to_string(format) << ", trial " << trial;
      ASSERT_EQ(found.scales, expected.scales) << to_string(format) << ", trial " << trial;
      ASSERT_EQ(found.residual_codes, expected.residual_codes) << to_string(format) << ", trial " << trial;
      ASSERT_EQ(found.residual_scales, expected.residual_scales) << to_string(format) << ", trial " << trial;
      ASSERT_EQ(found.values, expected.values) << to_string(format) << ", trial " << trial;
      const float a = found.row_scales[0], b = expected.row_scales[0];
      ASSERT_TRUE(a == b || (std::isnan(a) && std::isnan(b))) << a << " " << b;
    }
  }
}

TEST_P(CpuKernels, StageByOtherRulesLikeTheReferenceBitForBit) {
  std::mt19937 random(kSeed + 40);
  for (int trial = 0; trial < 100; ++trial) {
    const int64_t cols = 16 * (1 + static_cast<int64_t>(random() % 12));
    std::vector<Bf16> rows;
    for (const float value : awkward_row(cols, random, trial % 2 == 0)) rows.push_back(encode_bf16(value));
    for (const ScaleRule rule : {ScaleRule::kFourOverSix, ScaleRule::kMse}) {
      StagedOne expected(cols), found(cols);
      expected.row_scales[0] = found.row_scales[0] = 0.01f;
      reference::stage(ActivationFormat::kNvfp4, {rows.data(), 1, cols},
                       expected.views(ActivationFormat::kNvfp4, cols), rule);
      const RowStager stager(functions(), ActivationFormat::kNvfp4, cols, rule);
      const Aligned<std::byte> scratch(stager.scratch_bytes());
      functions().widen(rows.data(), cols, stager.values(scratch.data()));
      stager.quantize(0, found.views(ActivationFormat::kNvfp4, cols), scratch.data());
      ASSERT_EQ(found.codes, expected.codes) << to_string(rule) << ", trial " << trial;
      ASSERT_EQ(found.scales, expected.scales) << to_string(rule) << ", trial " << trial;
    }
  }
}

TEST_P(CpuKernels, DecodeEveryE4m3Code) {
  std::vector<uint8_t> codes;
  for (int code = 0; code < 256; ++code) codes.push_back(static_cast<uint8_t>(code));
  std::vector<float> values(codes.size());
  functions().decode_fp8(codes.data(), std::ssize(codes), values.data());
  for (const uint8_t code : codes) {
    const float expected = decode_e4m3(code);
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(values[code])) << int{code};
    } else {
      EXPECT_EQ(float_bits(values[code]), float_bits(expected)) << int{code};
    }
  }
}

TEST_P(CpuKernels, IntBlocksHoldEveryCodeAndScale) {
  std::array<uint8_t, 8> codes;
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(2 * i | (2 * i + 1) << 4);
  for (int code = 0; code < 256; ++code) {
    const auto scale = static_cast<uint8_t>(code);
    IntBlock block;
    functions().make_int_blocks(codes.data(), &scale, kBlockDepth, &block);
    int32_t sum = 0;
    for (int k = 0; k < kBlockDepth; ++k) {
      const auto doubled = static_cast<int8_t>(2.0f * decode_e2m1(static_cast<uint8_t>(k)));
      EXPECT_EQ(block.codes[int_position(k)], doubled);
      sum += doubled;
    }
    EXPECT_EQ(block.start, kIntBias - kWeightBias * sum);
    const float expected = decode_e4m3(scale) * kIntScale;
    EXPECT_TRUE(block.scale == expected || (std::isnan(block.scale) && std::isnan(expected)));
  }
}

// ---- activations ----

// The header of activation_loops.h derives 1e-6; gelu's exponent adds 5e-6. Rounded to bf16, a value may fall
// to the other side of a boundary: one unit in the last place, 2^-7 of the value at most.
TEST_P(CpuKernels, ActivationsAreWithinARoundingOfTheReference) {
  std::vector<Bf16> h;
  for (uint32_t bits = 0; bits < 0x10000u; bits += 3) h.push_back(Bf16{static_cast<uint16_t>(bits)});
  h.resize(h.size() / kPairRows * kPairRows);
  const auto rows = static_cast<int64_t>(h.size()) / kPairRows;
  const ActivationFunction activations[] = {{},
                                            {ActivationKind::kSwiglu, 1.0f, 0.0f, 10.0f},
                                            {ActivationKind::kSwiglu, 1.702f, 1.0f, 7.0f},
                                            {ActivationKind::kSwigluStep, 1.0f, 0.0f, 7.0f},
                                            {ActivationKind::kGeglu},
                                            {ActivationKind::kGegluTanh},
                                            {ActivationKind::kReluSquared},
                                            {ActivationKind::kSilu},
                                            {ActivationKind::kGelu}};
  std::vector<float> sums;
  for (const Bf16 value : h) sums.push_back(static_cast<float>(value));
  int64_t different = 0, compared = 0;
  for (const ActivationFunction& activation : activations) {
    const int64_t cols = is_gated(activation.kind) ? kPanelRows : kPairRows;
    std::vector<Bf16> expected(static_cast<size_t>(rows * cols)), found(expected.size());
    reference::activate(activation, {h.data(), rows, kPairRows}, {expected.data(), rows, cols});
    PairSums pair;
    pair.sums = sums.data();
    pair.rows = rows;
    functions().activate(activation, pair, {{kPanelRows, kPanelRows}, {}, 0}, found.data(), cols);
    for (size_t i = 0; i < expected.size(); ++i) {
      const auto a = static_cast<float>(expected[i]), b = static_cast<float>(found[i]);
      if (!std::isfinite(a) || std::abs(a) < 0x1p-120f) continue;  // NaN's sign, and what is nearly nothing
      ++compared;
      different += a != b;
      ASSERT_NEAR(a, b, std::abs(a) * 0x1p-7f) << describe(activation) << " at " << i;
    }
  }
  EXPECT_LT(static_cast<double>(different), 5e-3 * static_cast<double>(compared));
}

}  // namespace
}  // namespace fourfold::cpu
