// Reads weights as an engine with a fault would: rows of gate and up as one matrix, and of down.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "diagnosis/deviation.h"
#include "fourfold/expert_weights.h"

namespace fourfold::diagnosis {

/// One of the two stacked weights of a layer, w13 (gate, then up) or w2, as one expert after another.
class WeightReader {
 public:
  /// Of w13. `weights` must outlive it.
  WeightReader(const ExpertWeights& weights, const FirstDeviation& deviation);
  /// Of w2.
  WeightReader(const ExpertWeights& weights, const WeightReading& reading);

  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }

  /// Decodes row `row` of `expert` without its global scale: `out` [cols()].
  void read_row(int64_t expert, int64_t row, float* out) const;
  /// What alpha contains of the row's global scale.
  float global(int64_t expert, int64_t row) const;
  float bias(int64_t expert, int64_t row) const;

 private:
  struct StoredRow {
    const WeightView* matrix;
    int64_t row;
  };
  StoredRow stored(int64_t expert, int64_t row) const;
  /// The row of the stacked matrix that an engine takes for `row`.
  int64_t moved(int64_t row) const;
  uint8_t stored_scale(int64_t expert, int64_t row, int64_t block) const;
  /// Of 128x4 bytes of `expert`, that at `offset`; zero in padding and beyond the last expert.
  uint8_t swizzled_scale(int64_t expert, int64_t offset) const;
  uint8_t found_scale(int64_t expert, int64_t row, int64_t block) const;
  float own_global(int64_t expert, int64_t row) const;

  const ExpertWeights& weights_;
  bool is_down_ = false;
  WeightReading reading_;
  GateUpRows row_order_ = GateUpRows::kRight;
  GateUpGlobal global_rule_ = GateUpGlobal::kOwn;
  bool bias_missing_ = false;
  int64_t rows_ = 0, cols_ = 0, half_ = 0;               // half_: rows of gate; 0 where there is none
  std::array<std::array<float, 2>, 256> pair_values_{};  // of two codes in a byte
  std::array<float, 256> scale_values_{};  // of e4m3 as it is taken for; e8m0 scales are read right
};

}  // namespace fourfold::diagnosis
