#include "fourfold/weight_statistics.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace fourfold {
namespace {

constexpr uint8_t kE4m3Sign = 0x80, kE4m3FirstNormal = 0x08;

/// Counts bytes. Four tables take turns: neighbours are often equal, and one counter would wait for itself.
class ByteCounter {
 public:
  void add(const uint8_t* bytes, int64_t count) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
      for (int table = 0; table < 4; ++table) ++tables_[table][bytes[i + table]];
    }
    for (; i < count; ++i) ++tables_[0][bytes[i]];
  }

  std::array<int64_t, 256> sums() const {
    std::array<int64_t, 256> sums{};
    for (const auto& table : tables_) {
      for (size_t byte = 0; byte < sums.size(); ++byte) sums[byte] += table[byte];
    }
    return sums;
  }

 private:
  std::array<std::array<int64_t, 256>, 4> tables_ = {};
};

/// Whether `bytes` hold only the codes +0 and -0. `count` is 8 or 16.
bool all_zero_codes(const uint8_t* bytes, int count) {
  uint64_t magnitudes = 0;
  for (int i = 0; i < count; i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes + i, sizeof(word));
    magnitudes |= word;
  }
  return (magnitudes & 0x7777777777777777u) == 0;
}

std::array<int64_t, 16> codes_of_bytes(const std::array<int64_t, 256>& by_byte) {
  std::array<int64_t, 16> by_code{};
  for (size_t byte = 0; byte < by_byte.size(); ++byte) {
    by_code[byte & 15] += by_byte[byte];
    by_code[byte >> 4] += by_byte[byte];
  }
  return by_code;
}

template <class Body>
void for_sampled_rows(int64_t rows, int64_t row_bytes, RowSample sample, const Body& body) {
  const int64_t run = RowSample::run_of(row_bytes);
  for (int64_t first = 0; first < rows; first += run * std::max<int64_t>(1, sample.one_in)) {
    for (int64_t row = first; row < std::min(first + run, rows); ++row) body(row);
  }
}

void add_value(ValueCounts& counts, float value) {
  ++counts.values;
  counts.zeros += value == 0.0f;
  if (std::isfinite(value)) {
    counts.largest = std::max(counts.largest, std::abs(value));
  } else {
    ++counts.non_finite;
  }
}

template <class Element, class Decode>
ValueCounts count_elements(const DenseView& matrix, RowSample sample, const Decode& decode) {
  ValueCounts counts;
  for_sampled_rows(matrix.rows, matrix.row_stride_bytes, sample, [&](int64_t row) {
    const std::byte* at = matrix.data + row * matrix.row_stride_bytes;
    for (int64_t col = 0; col < matrix.cols; ++col, at += sizeof(Element)) {
      Element element{};
      std::memcpy(&element, at, sizeof(element));
      add_value(counts, decode(element));
    }
  });
  return counts;
}

}  // namespace

void ScaleCounts::add(const ScaleCounts& other) {
  type = other.type;
  for (size_t byte = 0; byte < by_byte.size(); ++byte) by_byte[byte] += other.by_byte[byte];
}

int64_t ScaleCounts::total() const {
  return std::accumulate(by_byte.begin(), by_byte.end(), int64_t{0});
}

int64_t ScaleCounts::nan() const {
  return type == ScaleType::kE8m0 ? by_byte[kE8m0NanCode]
                                  : by_byte[kE4m3NanCode] + by_byte[kE4m3NanCode | kE4m3Sign];
}

int64_t ScaleCounts::negative() const {
  if (type == ScaleType::kE8m0) return 0;
  return std::accumulate(by_byte.begin() + kE4m3Sign, by_byte.end() - 1, int64_t{0});
}

int64_t ScaleCounts::zero() const {
  return type == ScaleType::kE8m0 ? 0 : by_byte[0];
}

int64_t ScaleCounts::subnormal() const {
  if (type == ScaleType::kE8m0) return by_byte[0];
  return std::accumulate(by_byte.begin() + 1, by_byte.begin() + kE4m3FirstNormal, int64_t{0});
}

int64_t ScaleCounts::saturated() const {
  return type == ScaleType::kE8m0 ? 0 : by_byte[kE4m3MaxCode];
}

std::optional<float> ScaleCounts::quantile(double part) const {
  // From +0 on, the bytes of both formats ascend with their values.
  const size_t last = type == ScaleType::kE8m0 ? kE8m0NanCode - 1u : kE4m3MaxCode;
  const auto end = by_byte.begin() + static_cast<int64_t>(last) + 1;
  const auto total = static_cast<double>(std::accumulate(by_byte.begin(), end, int64_t{0}));
  double below = 0.0;
  for (size_t byte = 0; byte <= last; ++byte) {
    below += static_cast<double>(by_byte[byte]);
    if (by_byte[byte] == 0 || below < part * total) continue;
    return type == ScaleType::kE8m0 ? decode_e8m0(static_cast<uint8_t>(byte))
                                    : decode_e4m3(static_cast<uint8_t>(byte));
  }
  return std::nullopt;
}

void CodeCounts::add(const CodeCounts& other) {
  for (size_t code = 0; code < by_code.size(); ++code) by_code[code] += other.by_code[code];
  blocks += other.blocks;
  zero_blocks += other.zero_blocks;
  lost_blocks += other.lost_blocks;
}

int64_t CodeCounts::total() const {
  return std::accumulate(by_code.begin(), by_code.end(), int64_t{0});
}

void ValueCounts::add(const ValueCounts& other) {
  values += other.values;
  zeros += other.zeros;
  non_finite += other.non_finite;
  largest = std::max(largest, other.largest);
}

ScaleCounts count_scales(ScaleType type, MatrixView<const uint8_t> scales) {
  ByteCounter counter;
  for (int64_t row = 0; row < scales.rows; ++row) counter.add(scales.row(row), scales.cols);
  return {type, counter.sums()};
}

ScaleCounts count_scales(const BlockScaledView& matrix) {
  const ScaleType type = traits_of(matrix.format).scale_type;
  const int64_t blocks = matrix.blocks_per_row();
  if (matrix.scale_layout == ScaleLayout::kRowMajor) {
    return count_scales(type,
                        MatrixView<const uint8_t>(matrix.scales, matrix.rows, blocks, matrix.scale_stride));
  }
  ScaleCounts counts{type, {}};
  for (int64_t row = 0; row < matrix.rows; ++row) {
    for (int64_t block = 0; block < blocks; ++block) ++counts.by_byte[matrix.scale_code(row, block)];
  }
  return counts;
}

bool is_nan_scale(ScaleType type, uint8_t byte) {
  return type == ScaleType::kE8m0 ? byte == kE8m0NanCode : (byte & 0x7Fu) == kE4m3NanCode;
}

bool is_negative_scale(ScaleType type, uint8_t byte) {
  return type == ScaleType::kE4m3 && byte >= kE4m3Sign && !is_nan_scale(type, byte);
}

std::optional<std::pair<int64_t, int64_t>> find_scale(ScaleType type, MatrixView<const uint8_t> scales,
                                                      bool (*is)(ScaleType, uint8_t)) {
  for (int64_t row = 0; row < scales.rows; ++row) {
    for (int64_t col = 0; col < scales.cols; ++col) {
      if (is(type, scales(row, col))) return std::pair(row, col);
    }
  }
  return std::nullopt;
}

int64_t RowSample::run_of(int64_t row_bytes) {
  constexpr int64_t kRunBytes = 64 << 10;
  return std::max<int64_t>(1, kRunBytes / std::max<int64_t>(1, row_bytes));
}

CodeCounts count_codes(const BlockScaledView& matrix, RowSample sample) {
  CodeCounts counts;
  ByteCounter counter;
  const QuantFormatTraits traits = traits_of(matrix.format);
  const int block_bytes = traits.block_size / 2;
  const int64_t blocks = matrix.blocks_per_row();
  for_sampled_rows(matrix.rows, matrix.cols / 2, sample, [&](int64_t row) {
    const uint8_t* codes = matrix.codes.row(row);
    const uint8_t* scales = matrix.scales + row * matrix.scale_stride;
    counter.add(codes, blocks * block_bytes);
    counts.blocks += blocks;
    for (int64_t block = 0; block < blocks; ++block) {
      const bool zero = all_zero_codes(codes + block * block_bytes, block_bytes);
      counts.zero_blocks += zero;
      counts.lost_blocks += !zero && traits.scale_type == ScaleType::kE4m3 && (scales[block] & 0x7F) == 0;
    }
  });
  counts.by_code = codes_of_bytes(counter.sums());
  return counts;
}

CodeCounts count_transposed_codes(MatrixView<const uint8_t> codes, MatrixView<const uint8_t> scales,
                                  RowSample sample) {
  constexpr int64_t kBlockBytes = 8;  // 16 codes along K, two a byte
  CodeCounts counts;
  ByteCounter counter;
  const int64_t block_rows = codes.rows / kBlockBytes;
  for_sampled_rows(block_rows, kBlockBytes * codes.cols, sample, [&](int64_t block) {
    for (int64_t k = 0; k < kBlockBytes; ++k) counter.add(codes.row(block * kBlockBytes + k), codes.cols);
    counts.blocks += codes.cols;
    for (int64_t col = 0; col < codes.cols; ++col) {
      uint8_t magnitudes = 0;
      for (int64_t k = 0; k < kBlockBytes; ++k) {
        magnitudes = static_cast<uint8_t>(magnitudes | codes(block * kBlockBytes + k, col));
      }
      const bool zero = (magnitudes & 0x77) == 0;
      counts.zero_blocks += zero;
      counts.lost_blocks += !zero && (scales(block, col) & 0x7F) == 0;
    }
  });
  counts.by_code = codes_of_bytes(counter.sums());
  return counts;
}

ValueCounts count_values(const DenseView& matrix, RowSample sample) {
  switch (matrix.type) {
    case ElementType::kBf16:
      return count_elements<Bf16>(matrix, sample, [](Bf16 value) { return static_cast<float>(value); });
    case ElementType::kF16:
      return count_elements<uint16_t>(matrix, sample, decode_f16);
    case ElementType::kF32:
      return count_elements<float>(matrix, sample, [](float value) { return value; });
  }
  return {};
}

ValueCounts count_values(const Fp8View& matrix, RowSample sample) {
  ByteCounter counter;
  for_sampled_rows(matrix.rows, matrix.cols, sample,
                   [&](int64_t row) { counter.add(matrix.codes.row(row), matrix.cols); });
  ValueCounts counts;
  const std::array<int64_t, 256> by_byte = counter.sums();
  for (size_t byte = 0; byte < by_byte.size(); ++byte) {
    if (by_byte[byte] == 0) continue;
    ValueCounts one;
    add_value(one, decode_e4m3(static_cast<uint8_t>(byte)));
    counts.values += by_byte[byte];
    counts.zeros += one.zeros * by_byte[byte];
    counts.non_finite += one.non_finite * by_byte[byte];
    counts.largest = std::max(counts.largest, one.largest);
  }
  return counts;
}

}  // namespace fourfold
