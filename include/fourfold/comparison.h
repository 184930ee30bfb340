// How two tensors differ: cosine, norm ratio, relative L2, and where it is worst.
#pragma once

#include <cstdint>
#include <span>

#include "fourfold/export.h"
#include "fourfold/tensor.h"

namespace FOURFOLD_EXPORT fourfold {

/// Sums from which the metrics follow; sums of parts add up to the sums of the whole. float64.
struct ErrorSums {
  double reference_squared = 0.0;
  double candidate_squared = 0.0;
  double product = 0.0;
  double difference_squared = 0.0;

  void add(double reference, double candidate);
  /// Values of the same index; Error where there are not as many of both. Sums of every eighth value are kept
  /// apart and added up at the end, so that additions need not wait for each other: the last bits may differ
  /// from those of one value after the other.
  void add(std::span<const float> references, std::span<const float> candidates);
  ErrorSums& operator+=(const ErrorSums& other);

  /// 1 when both are zero, 0 when one is; NaN when something is not finite.
  double cosine() const;
  /// |candidate| / |reference|; 1 when both are zero. Cosine is blind to a lost scalar; this is not.
  double norm_ratio() const;
  /// |candidate - reference| / |reference|; 0 when both are zero.
  double relative_l2() const;
};

/// Metrics of a stage over a whole batch.
struct Comparison {
  double cosine = 1.0;
  double norm_ratio = 1.0;
  double rel_l2 = 0.0;
  int64_t worst_row = -1;  ///< row with the largest relative L2; -1 for an empty tensor
  double worst_row_rel_l2 = 0.0;
  int64_t worst_group = -1;  ///< the same over groups of rows
  double worst_group_rel_l2 = 0.0;
};

/// Compares [rows, cols] row by row. `group_offsets` (may be empty) names groups of rows for `worst_group`.
/// A NaN or an infinity on either side makes a row the worst one. Throws Error when shapes differ.
Comparison compare(MatrixView<const Bf16> reference, MatrixView<const Bf16> candidate,
                   std::span<const int32_t> group_offsets = {});
Comparison compare(MatrixView<const float> reference, MatrixView<const float> candidate,
                   std::span<const int32_t> group_offsets = {});

/// Keeps the worst of numbered parts; non-finite is worse than any number.
struct WorstPart {
  int64_t index = -1;
  double rel_l2 = 0.0;

  void offer(int64_t part, double part_rel_l2);
};

}  // namespace fourfold
