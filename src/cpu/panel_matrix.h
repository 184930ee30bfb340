// Weights cut into pairs of panels, and what a pair is made from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "cpu/panel_layout.h"
#include "fourfold/block_scaled.h"

namespace fourfold::cpu {

/// Values of a pair are NVFP4 (panel_layout.h), or [depth][32] in bf16 or float32.
enum class PanelStorage : uint8_t { kNvfp4, kBf16, kFloat };

/// What holds `weight` exactly.
PanelStorage storage_for(const WeightView& weight);

constexpr int64_t panel_pair_bytes(PanelStorage storage, int64_t depth) {
  const int64_t values = chunks_of(depth) * kChunkDepth * kPairRows;
  return storage == PanelStorage::kNvfp4 ? pair_bytes(depth)
                                         : values * (storage == PanelStorage::kBf16 ? 2 : 4);
}

/// The matrices behind a pair's panels: gate and up, of which a pair takes the same 16 rows; or one matrix,
/// of which it takes 32. Columns are K.
struct PanelSource {
  const WeightView* first = nullptr;
  const WeightView* second = nullptr;  ///< null: one matrix

  int64_t rows() const { return rows_of(*first); }
  int64_t depth() const { return cols_of(*first); }
  int64_t pairs() const {
    const int64_t rows_a_pair = second != nullptr ? kPanelRows : kPairRows;
    return (rows() + rows_a_pair - 1) / rows_a_pair;
  }
  const WeightView& matrix(int panel) const { return panel == 1 && second != nullptr ? *second : *first; }
  /// First row of a pair's panel.
  int64_t first_row(int64_t pair, int panel) const {
    return second != nullptr ? pair * kPanelRows : pair * kPairRows + panel * kPanelRows;
  }
  /// How many of the panel's 16 rows there are.
  int rows_of_panel(int64_t pair, int panel) const;
};

/// Writes one pair; rows and k beyond the matrix become zeros. For NVFP4: whether a scale is negative or NaN,
/// which the kernels do not take (irregular_multiply.h). `storage` is storage_for both matrices, or kFloat.
/// `scratch` [depth] is for the other formats.
bool pack_pair(const PanelSource& source, int64_t pair, PanelStorage storage, float* scratch, std::byte* out);

/// A packed matrix, not owned.
struct PanelMatrix {
  PanelStorage storage = PanelStorage::kNvfp4;
  int64_t rows = 0;  ///< columns of the product; of one half where gate and up are paired
  int64_t depth = 0;
  int64_t pairs = 0;
  bool is_gate_up = false;
  int64_t first_pair = 0;              ///< of those that lie at `data`
  const std::byte* data = nullptr;     ///< pairs, panel_pair_bytes apart
  const uint8_t* irregular = nullptr;  ///< [pairs]: not 0 where pack_pair said so

  int64_t chunks() const { return chunks_of(depth); }
  const std::byte* pair(int64_t index) const {
    return data + (index - first_pair) * panel_pair_bytes(storage, depth);
  }
  bool is_irregular(int64_t index) const {
    return irregular != nullptr && irregular[index - first_pair] != 0;
  }
};

/// Columns of a pair that exist, by panel, and the first of them.
struct PairColumns {
  int64_t first[2] = {};
  int count[2] = {};
};
PairColumns columns_of(const PanelMatrix& matrix, int64_t pair);

}  // namespace fourfold::cpu
