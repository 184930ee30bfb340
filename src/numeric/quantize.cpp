// The quantizers of fourfold/quantize.h as plain loops.
#include "fourfold/quantize.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <span>

#include "base/fail.h"
#include "numeric/block_quantizer.h"

namespace fourfold {
namespace {

constexpr int kMxfp4Block = 32;
constexpr int kMxfp4BlockBytes = kMxfp4Block / 2;

/// Codes of one block.
using Mxfp4Codes = std::span<const uint8_t, kMxfp4BlockBytes>;

template <class T>
float absolute_maximum_of(MatrixView<const T> values) {
  float amax = 0.0f;
  for (int64_t row = 0; row < values.rows; ++row) {
    for (int64_t col = 0; col < values.cols; ++col) {
      amax = max_magnitude(amax, static_cast<float>(values(row, col)));
    }
  }
  return amax;
}

void require_blocks(int64_t cols, QuantFormat format) {
  const QuantFormatTraits traits = traits_of(format);
  if (cols % traits.block_size != 0) {
    reject(fmt::format("{} matrix", traits.name), fmt::format("K to be a multiple of {}", traits.block_size),
           cols);
  }
}

BlockScaledMatrix empty_matrix(QuantFormat format, int64_t rows, int64_t cols) {
  require_blocks(cols, format);
  BlockScaledMatrix matrix{format, rows, cols, {}, {}, {}};
  matrix.codes.resize(static_cast<size_t>(rows * cols / 2));
  matrix.scales.resize(static_cast<size_t>(rows * (cols / traits_of(format).block_size)));
  return matrix;
}

void require_mxfp4(const BlockScaledView& matrix) {
  if (matrix.format != QuantFormat::kMxfp4)
    reject("cast to NVFP4", "an MXFP4 tensor", traits_of(matrix.format).name);
}

Mxfp4Codes codes_of(const BlockScaledView& mxfp4, int64_t row, int64_t block) {
  return Mxfp4Codes(mxfp4.codes.row(row) + block * kMxfp4BlockBytes, kMxfp4BlockBytes);
}

bool holds_nonzero_code(Mxfp4Codes codes) {
  return std::any_of(codes.begin(), codes.end(), [](uint8_t pair) { return (pair & 0x77) != 0; });
}

/// Rescales the codes of a block by 2^-shift, rounding; true if some value changed.
bool recode_block(Mxfp4Codes codes, int shift, std::span<uint8_t, kMxfp4BlockBytes> out) {
  // 6 * 2^-5 already rounds to zero: no need for the exact factor beyond that.
  const float factor = power_of_two(-std::min(shift, 30));
  bool changed = false;
  for (size_t i = 0; i < codes.size(); ++i) {
    uint8_t pair = 0;
    for (int half = 0; half < 2; ++half) {
      const float scaled = decode_e2m1(static_cast<uint8_t>(codes[i] >> (4 * half))) * factor;
      const uint8_t code = encode_e2m1(scaled);
      changed |= decode_e2m1(code) != scaled;
      pair = static_cast<uint8_t>(pair | (code << (4 * half)));
    }
    out[i] = pair;
  }
  return changed;
}

uint8_t e8m0_code(float power_of_two) {
  if (!is_finite(power_of_two)) return kE8m0NanCode;
  return static_cast<uint8_t>(std::ilogb(power_of_two) + kE8m0Bias);
}

/// `scale` as it is stored; for e8m0 a power of two in its range, or not finite.
void append_tile_scale(float scale, TileScaleType type, std::vector<std::byte>& scales) {
  if (type == TileScaleType::kE8m0) {
    scales.push_back(std::byte{e8m0_code(scale)});
    return;
  }
  std::array<std::byte, sizeof(float)> bytes;
  std::memcpy(bytes.data(), &scale, sizeof(scale));
  scales.insert(scales.end(), bytes.begin(), bytes.end());
}

}  // namespace

float absolute_maximum(MatrixView<const float> values) {
  return absolute_maximum_of(values);
}
float absolute_maximum(MatrixView<const Bf16> values) {
  return absolute_maximum_of(values);
}

BlockScaledView BlockScaledMatrix::view() const {
  const int64_t blocks = cols / traits_of(format).block_size;
  return {format, rows, cols, {codes.data(), rows, cols / 2}, scales.data(), blocks, ScaleLayout::kRowMajor,
          global};
}

void quantize_row_nvfp4(std::span<const float> x, float global, ScaleFloor floor, uint8_t* codes,
                        uint8_t* scales) {
  for (size_t block = 0; block < x.size() / kNvfp4Block; ++block) {
    scales[block] = quantize_nvfp4_block(x.data() + block * kNvfp4Block, global,
                                         floor == ScaleFloor::kModelOpt, codes + block * kNvfp4Block / 2);
  }
}

void quantize_row_nvfp4x2(std::span<const float> x, float global, uint8_t* codes, uint8_t* scales,
                          uint8_t* residual_codes, uint8_t* residual_scales) {
  quantize_row_nvfp4(x, global, ScaleFloor::kNone, codes, scales);
  for (size_t block = 0; block < x.size() / kNvfp4Block; ++block) {
    std::array<float, kNvfp4Block> residual;
    const float scale = decode_e4m3(scales[block]);
    for (size_t i = 0; i < kNvfp4Block; ++i) {
      const size_t k = block * kNvfp4Block + i;
      const float value = decode_e2m1(static_cast<uint8_t>(codes[k / 2] >> (4 * (k % 2)))) * scale;
      residual[i] = x[k] - value * global;
    }
    residual_scales[block] =
        quantize_nvfp4_block(residual.data(), global, false, residual_codes + block * kNvfp4Block / 2);
  }
}

void quantize_row_mxfp4(std::span<const float> x, uint8_t* codes, uint8_t* scales) {
  for (size_t block = 0; block < x.size() / kMxfp4Block; ++block) {
    const float* values = x.data() + block * kMxfp4Block;
    float amax = 0.0f;
    for (int i = 0; i < kMxfp4Block; ++i) amax = max_magnitude(amax, values[i]);
    uint8_t* block_codes = codes + block * kMxfp4BlockBytes;
    if (!is_finite(amax)) {
      scales[block] = kE8m0NanCode;
      std::fill_n(block_codes, kMxfp4BlockBytes, static_cast<uint8_t>(kE2m1NanCode * 0x11));
      continue;
    }
    const int exponent = amax == 0.0f ? -127 : std::max(std::ilogb(amax) - 2, -127);
    scales[block] = static_cast<uint8_t>(exponent + kE8m0Bias);
    for (int i = 0; i < kMxfp4Block; i += 2) {
      // ldexp in double: exact for every float and exponent.
      const auto encode = [&](float v) {
        return encode_e2m1(static_cast<float>(std::ldexp(double{v}, -exponent)));
      };
      block_codes[i / 2] = static_cast<uint8_t>(encode(values[i]) | (encode(values[i + 1]) << 4));
    }
  }
}

float quantize_row_fp8(std::span<const float> x, uint8_t* codes) {
  const float amax = absolute_maximum({x.data(), 1, static_cast<int64_t>(x.size())});
  const float scale = dynamic_scale(amax, kE4m3Max);
  const float reciprocal = 1.0f / scale;
  for (size_t i = 0; i < x.size(); ++i) codes[i] = encode_e4m3(x[i] * reciprocal);
  return scale;
}

BlockScaledMatrix quantize_nvfp4(MatrixView<const float> x, float global, ScaleFloor floor) {
  BlockScaledMatrix matrix = empty_matrix(QuantFormat::kNvfp4, x.rows, x.cols);
  matrix.global.value = global;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < x.rows; ++row) {
    quantize_row_nvfp4({x.row(row), static_cast<size_t>(x.cols)}, global, floor,
                       matrix.codes.data() + row * x.cols / 2,
                       matrix.scales.data() + row * (x.cols / kNvfp4Block));
  }
  return matrix;
}

BlockScaledMatrix quantize_mxfp4(MatrixView<const float> x) {
  BlockScaledMatrix matrix = empty_matrix(QuantFormat::kMxfp4, x.rows, x.cols);
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < x.rows; ++row) {
    quantize_row_mxfp4({x.row(row), static_cast<size_t>(x.cols)}, matrix.codes.data() + row * x.cols / 2,
                       matrix.scales.data() + row * (x.cols / kMxfp4Block));
  }
  return matrix;
}

Fp8View Fp8Matrix::view() const {
  return {rows, cols, {codes.data(), rows, cols}, scales.data(), scale_type, tile, tile};
}

Fp8Matrix quantize_fp8_tiles(MatrixView<const float> x, TileScaleType scale_type, int64_t tile) {
  Fp8Matrix matrix{x.rows, x.cols, scale_type, tile, {}, {}};
  matrix.codes.resize(static_cast<size_t>(x.rows * x.cols));
  for (int64_t row = 0; row < x.rows; row += tile) {
    for (int64_t col = 0; col < x.cols; col += tile) {
      const int64_t rows = std::min(tile, x.rows - row), cols = std::min(tile, x.cols - col);
      float scale = dynamic_scale(absolute_maximum(x.rows_from(row, rows).cols_from(col, cols)), kE4m3Max);
      if (scale_type == TileScaleType::kE8m0) scale = std::exp2(std::ceil(std::log2(scale)));
      append_tile_scale(scale, scale_type, matrix.scales);
      for (int64_t r = row; r < row + rows; ++r) {
        for (int64_t c = col; c < col + cols; ++c) {
          matrix.codes[static_cast<size_t>(r * x.cols + c)] = encode_e4m3(x(r, c) / scale);
        }
      }
    }
  }
  return matrix;
}

CastReport& CastReport::operator+=(const CastReport& other) {
  blocks += other.blocks;
  recoded += other.recoded;
  inexact += other.inexact;
  return *this;
}

int largest_mxfp4_exponent(const BlockScaledView& mxfp4) {
  require_mxfp4(mxfp4);
  int largest = kNoExponent;
  for (int64_t row = 0; row < mxfp4.rows; ++row) {
    for (int64_t block = 0; block < mxfp4.blocks_per_row(); ++block) {
      const uint8_t code = mxfp4.scale_code(row, block);
      if (code == kE8m0NanCode) {
        reject(fmt::format("MXFP4 scale at row {}, block {}", row, block), "a power of two",
               "0xFF (NaN); the tensor is damaged");
      }
      const int exponent = code - kE8m0Bias;
      if (exponent > largest && holds_nonzero_code(codes_of(mxfp4, row, block))) largest = exponent;
    }
  }
  return largest;
}

BlockScaledMatrix cast_mxfp4_to_nvfp4(const BlockScaledView& mxfp4, CastReport* report) {
  return cast_mxfp4_to_nvfp4(mxfp4, largest_mxfp4_exponent(mxfp4), report);
}

BlockScaledMatrix cast_mxfp4_to_nvfp4(const BlockScaledView& mxfp4, int kmax, CastReport* report) {
  require_mxfp4(mxfp4);
  if (kmax != kNoExponent && (kmax < -127 || kmax > 127)) reject("cast to NVFP4: kmax", "-127 to 127", kmax);
  constexpr int kLargest = 8, kSmallest = -9;  // e4m3 holds the powers of two from 2^-9 to 2^8
  const int global_exponent = kmax == kNoExponent ? 0 : kmax - kLargest;
  BlockScaledMatrix nvfp4 = empty_matrix(QuantFormat::kNvfp4, mxfp4.rows, mxfp4.cols);
  nvfp4.global.value = power_of_two(global_exponent);

  CastReport counts;
  for (int64_t row = 0; row < mxfp4.rows; ++row) {
    uint8_t* out_codes = nvfp4.codes.data() + row * mxfp4.cols / 2;
    uint8_t* out_scales = nvfp4.scales.data() + row * (mxfp4.cols / kNvfp4Block);
    for (int64_t block = 0; block < mxfp4.blocks_per_row(); ++block) {
      const int exponent = mxfp4.scale_code(row, block) - kE8m0Bias - global_exponent;
      const Mxfp4Codes codes = codes_of(mxfp4, row, block);
      const std::span<uint8_t, kMxfp4BlockBytes> block_out(out_codes + block * kMxfp4BlockBytes,
                                                           kMxfp4BlockBytes);
      const bool nonzero = holds_nonzero_code(codes);
      if (exponent > kLargest && nonzero) {
        reject("cast to NVFP4", "kmax to be the largest exponent",
               fmt::format("{} and a larger one in row {}", kmax, row));
      }
      if (exponent < kSmallest && nonzero) {
        ++counts.recoded;
        counts.inexact += recode_block(codes, kSmallest - exponent, block_out);
      } else {
        std::copy(codes.begin(), codes.end(), block_out.begin());
      }
      const uint8_t scale = encode_e4m3(power_of_two(std::clamp(exponent, kSmallest, kLargest)));
      out_scales[2 * block] = out_scales[2 * block + 1] = scale;
      ++counts.blocks;
    }
  }
  if (report) *report += counts;
  return nvfp4;
}

CastReport count_cast(const BlockScaledView& mxfp4, int kmax) {
  require_mxfp4(mxfp4);
  CastReport counts;
  counts.blocks = mxfp4.rows * mxfp4.blocks_per_row();
  if (kmax == kNoExponent) return counts;
  constexpr int kMostExact = 17;  // 2^8 to 2^-9
  std::array<uint8_t, kMxfp4BlockBytes> recoded;
  for (int64_t row = 0; row < mxfp4.rows; ++row) {
    for (int64_t block = 0; block < mxfp4.blocks_per_row(); ++block) {
      const int distance = kmax - (mxfp4.scale_code(row, block) - kE8m0Bias);
      if (distance <= kMostExact) continue;
      const Mxfp4Codes codes = codes_of(mxfp4, row, block);
      if (!holds_nonzero_code(codes)) continue;
      ++counts.recoded;
      counts.inexact += recode_block(codes, distance - kMostExact, recoded);
    }
  }
  return counts;
}

BlockScaledMatrix convert_to_nvfp4(const WeightView& weight, CastReport* report) {
  if (const auto* blocks = std::get_if<BlockScaledView>(&weight)) return cast_mxfp4_to_nvfp4(*blocks, report);
  const std::vector<float> values = dequantize(weight);
  const MatrixView<const float> matrix(values.data(), rows_of(weight), cols_of(weight));
  return quantize_nvfp4(matrix, nvfp4_global_scale(absolute_maximum(matrix)));
}

std::vector<float> dequantize(const WeightView& weight) {
  const int64_t rows = rows_of(weight), cols = cols_of(weight);
  std::vector<float> values(static_cast<size_t>(rows * cols));
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row) dequantize_row(weight, row, values.data() + row * cols);
  return values;
}

}  // namespace fourfold
