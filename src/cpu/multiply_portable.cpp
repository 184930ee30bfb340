// Kernels in plain C++, for CPUs that no other kernel is for.
#include <cstring>

#include "cpu/kernels.h"
#include "fourfold/number_formats.h"

namespace fourfold::cpu::portable {
namespace {

/// A block of a panel as 2 x value: weights [int_position(k)][row].
struct DecodedBlock {
  int16_t weights[kBlockDepth][kPanelRows];
  float scales[kPanelRows];  // x kScaleUnit
};

constexpr int16_t doubled_e2m1(uint32_t code) {
  return static_cast<int16_t>(2.0f * decode_e2m1(static_cast<uint8_t>(code)));
}

void decode_block(const uint8_t* panel_chunk, int block, DecodedBlock& out) {
  static constexpr int kCodes = 16;
  static constexpr auto kDoubled = [] {
    struct Table {
      int16_t values[kCodes];
    } table{};
    for (uint32_t code = 0; code < kCodes; ++code) table.values[code] = doubled_e2m1(code);
    return table;
  }();
  for (int row = 0; row < kPanelRows; ++row) {
    for (int half = 0; half < 2; ++half) {
      uint32_t word = 0;
      std::memcpy(&word, panel_chunk + word_offset(row, block * kBlockDepth + half * 8), sizeof(word));
      for (int k = 0; k < 8; ++k) {
        out.weights[int_position(half * 8 + k)][row] = kDoubled.values[code_in_word(word, k)];
      }
    }
    out.scales[row] = decode_e4m3(panel_chunk[scale_offset(row, block)]) * kScaleUnit;
  }
}

void add_block(const DecodedBlock& weights, const IntBlock& activations, float* sums) {
  int32_t integers[kPanelRows] = {};
  for (int i = 0; i < kBlockDepth; ++i) {
    const int32_t activation = activations.codes[i];
    for (int row = 0; row < kPanelRows; ++row) integers[row] += activation * weights.weights[i][row];
  }
  for (int row = 0; row < kPanelRows; ++row) {
    // Both products are exact (12 + 4 + 4 bits): the only rounding is the sum's, as with fused operations.
    sums[row] += static_cast<float>(integers[row]) * weights.scales[row] * activations.scale;
  }
}

}  // namespace

void multiply_ints(const uint8_t* pair, int64_t chunks, const IntBlock* rows, int64_t row_count,
                   std::byte* /*scratch*/, float* sums) {
  std::memset(sums, 0, static_cast<size_t>(row_count) * kPairRows * sizeof(float));
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int block = 0; block < kBlocksPerChunk; ++block) {
      for (int panel = 0; panel < 2; ++panel) {
        DecodedBlock decoded;
        decode_block(pair + chunk * kPairChunkBytes + panel * kPanelChunkBytes, block, decoded);
        for (int64_t row = 0; row < row_count; ++row) {
          const int64_t index = (row * chunks + chunk) * kBlocksPerChunk + block;
          add_block(decoded, rows[index], sums + row * kPairRows + panel * kPanelRows);
        }
      }
    }
  }
}

void decode_floats(const uint8_t* pair, int64_t chunks, float* weights) {
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int panel = 0; panel < 2; ++panel) {
      const uint8_t* const codes = pair + chunk * kPairChunkBytes + panel * kPanelChunkBytes;
      float* const out = weights + chunk * kChunkDepth * kPairRows + panel * kPanelRows;
      for (int row = 0; row < kPanelRows; ++row) {
        for (int k = 0; k < kChunkDepth; ++k) {
          uint32_t word = 0;
          std::memcpy(&word, codes + word_offset(row, k), sizeof(word));
          const float scale = decode_e4m3(codes[scale_offset(row, k / kBlockDepth)]);
          out[k * kPairRows + row] = decode_e2m1(static_cast<uint8_t>(code_in_word(word, k % 8))) * scale;
        }
      }
    }
  }
}

void multiply_floats(const float* weights, int64_t depth, const float* rows, int64_t row_stride,
                     int64_t row_count, float* sums) {
  for (int64_t row = 0; row < row_count; ++row) {
    float accumulators[kPairRows];
    std::memcpy(accumulators, sums + row * kPairRows, sizeof(accumulators));
    for (int64_t k = 0; k < depth; ++k) {
      const float activation = rows[row * row_stride + k];
      for (int column = 0; column < kPairRows; ++column) {
        accumulators[column] += activation * weights[k * kPairRows + column];
      }
    }
    std::memcpy(sums + row * kPairRows, accumulators, sizeof(accumulators));
  }
}

}  // namespace fourfold::cpu::portable
