#include "cpu/panel_matrix.h"

#include <algorithm>
#include <cstring>

namespace fourfold::cpu {
namespace {

/// Rows [first, first + count) of an NVFP4 matrix into one panel of a pair. Returns whether a scale is
/// negative or NaN.
bool pack_nvfp4_panel(const BlockScaledView& matrix, int64_t first, int count, uint8_t* out) {
  const int64_t words = matrix.cols / 8, blocks = matrix.blocks_per_row();
  bool irregular = false;
  for (int row = 0; row < count; ++row) {
    const uint8_t* const codes = matrix.codes.row(first + row);
    for (int64_t word = 0; word < words; ++word) {
      uint32_t value = 0;
      std::memcpy(&value, codes + word * 4, sizeof(value));
      value = pack_word(value);
      const auto k = static_cast<int>(word % (kChunkDepth / 8) * 8);
      std::memcpy(out + word / (kChunkDepth / 8) * kPairChunkBytes + word_offset(row, k), &value,
                  sizeof(value));
    }
    const bool is_row_major = matrix.scale_layout == ScaleLayout::kRowMajor;
    const uint8_t* const scales =
        is_row_major ? matrix.scales + (first + row) * matrix.scale_stride : nullptr;
    for (int64_t block = 0; block < blocks; ++block) {
      const uint8_t scale = is_row_major ? scales[block] : matrix.scale_code(first + row, block);
      irregular |= scale > kE4m3MaxCode;
      out[block / kBlocksPerChunk * kPairChunkBytes +
          scale_offset(row, static_cast<int>(block % kBlocksPerChunk))] = scale;
    }
  }
  return irregular;
}

void pack_dense_panel(const WeightView& matrix, int64_t first, int count, PanelStorage storage,
                      float* scratch, std::byte* out) {
  for (int row = 0; row < count; ++row) {
    decode_row(matrix, first + row, scratch);
    for (int64_t k = 0; k < cols_of(matrix); ++k) {
      const int64_t at = k * kPairRows + row;
      if (storage == PanelStorage::kBf16) {
        reinterpret_cast<Bf16*>(out)[at] = encode_bf16(scratch[k]);
      } else {
        reinterpret_cast<float*>(out)[at] = scratch[k];
      }
    }
  }
}

}  // namespace

PanelStorage storage_for(const WeightView& weight) {
  if (is_stored_as(weight, QuantFormat::kNvfp4)) return PanelStorage::kNvfp4;
  if (const auto* dense = std::get_if<DenseView>(&weight)) {
    return dense->type == ElementType::kBf16 ? PanelStorage::kBf16 : PanelStorage::kFloat;
  }
  // e4m3 times a power of two is exact in bf16, unless it is too small or too large.
  return PanelStorage::kFloat;
}

int PanelSource::rows_of_panel(int64_t pair, int panel) const {
  return static_cast<int>(std::clamp<int64_t>(rows() - first_row(pair, panel), 0, kPanelRows));
}

bool pack_pair(const PanelSource& source, int64_t pair, PanelStorage storage, float* scratch,
               std::byte* out) {
  const int64_t depth = source.depth();
  const bool is_full = depth % kChunkDepth == 0 && source.rows_of_panel(pair, 0) == kPanelRows &&
                       source.rows_of_panel(pair, 1) == kPanelRows;
  if (!is_full) std::memset(out, 0, static_cast<size_t>(panel_pair_bytes(storage, depth)));
  bool irregular = false;
  for (int panel = 0; panel < 2; ++panel) {
    const WeightView& matrix = source.matrix(panel);
    const int64_t first = source.first_row(pair, panel);
    const int count = source.rows_of_panel(pair, panel);
    if (storage == PanelStorage::kNvfp4) {
      irregular |= pack_nvfp4_panel(std::get<BlockScaledView>(matrix), first, count,
                                    reinterpret_cast<uint8_t*>(out) + panel * kPanelChunkBytes);
    } else {
      const int64_t value_bytes = storage == PanelStorage::kBf16 ? 2 : 4;
      pack_dense_panel(matrix, first, count, storage, scratch, out + panel * kPanelRows * value_bytes);
    }
  }
  return irregular;
}

PairColumns columns_of(const PanelMatrix& matrix, int64_t pair) {
  PairColumns columns;
  for (int panel = 0; panel < 2; ++panel) {
    columns.first[panel] = matrix.is_gate_up ? pair * kPanelRows : pair * kPairRows + panel * kPanelRows;
    columns.count[panel] =
        static_cast<int>(std::clamp<int64_t>(matrix.rows - columns.first[panel], 0, kPanelRows));
  }
  return columns;
}

}  // namespace fourfold::cpu
