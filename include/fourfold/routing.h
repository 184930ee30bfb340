// Which token goes to which expert, and the permutation that brings an expert's rows together.
#pragma once

#include <cstdint>
#include <span>
#include <variant>
#include <vector>

#include "fourfold/export.h"
#include "fourfold/tensor.h"

namespace FOURFOLD_EXPORT fourfold {

/// Id of an expert that is not on this rank: the slot contributes nothing.
inline constexpr int64_t kAbsentExpert = -1;

/// The router's decision for T tokens. Ids may be int32 or int64, both [T, K]; weights [T, K].
struct Routing {
  std::variant<MatrixView<const int32_t>, MatrixView<const int64_t>> topk_ids;
  MatrixView<const float> topk_weights;
  /// Where ids are the model's and a rank holds a part of its experts: this rank's number of every expert of
  /// the model, kAbsentExpert for those that live elsewhere. Lies where the backend computes. Empty: ids are
  /// this rank's.
  std::span<const int32_t> local_experts = {};

  int64_t tokens() const { return topk_weights.rows; }
  int64_t top_k() const { return topk_weights.cols; }
  /// As given, before `local_experts`.
  int64_t expert(int64_t token, int64_t k) const;
};

/// `local_experts` of a rank that holds the experts [first, first + count) of `experts`. Throws Error for a
/// range that is not within them.
std::vector<int32_t> local_expert_range(int64_t first, int64_t count, int64_t experts);

/// Bits of the status word that a layer can set. Ids that live on a device are not read back, so a bad one is
/// reported here instead of by an exception.
enum StatusBits : int32_t {
  kStatusOk = 0,
  /// An id other than -1 outside [0, experts), or outside `local_experts`, or mapped to such a number:
  /// counted as -1.
  kStatusExpertOutOfRange = 1,
};

/// Slots sorted by expert. A slot is one (token, k) pair, numbered token * K + k; rows keep slot order within
/// an expert. Slots of absent experts have no row.
struct PermutationView {
  std::span<int32_t> group_offsets;  ///< [E+1]; rows of expert e are [group_offsets[e], group_offsets[e+1])
  std::span<int32_t> slot_of_row;    ///< [T*K]; the first rows() entries are set
  std::span<int32_t> row_of_slot;    ///< [T*K]; -1 where the slot has no row

  int64_t rows() const { return group_offsets.back(); }
};

struct Permutation {
  std::vector<int32_t> group_offsets, slot_of_row, row_of_slot;
  int32_t status = kStatusOk;

  int64_t rows() const { return group_offsets.back(); }
};

/// Fills `out`; returns status bits. Throws Error when T * K does not fit an int32.
int32_t permute_by_expert(const Routing& routing, const PermutationView& out);
/// The same into vectors of its own; slot_of_row is trimmed to rows().
Permutation permute_by_expert(const Routing& routing, int64_t experts);

/// `x` [T, H] -> `rows` [M, H]: row r is the token of slot_of_row[r].
void gather_rows(MatrixView<const Bf16> x, std::span<const int32_t> slot_of_row, int64_t top_k,
                 MatrixView<Bf16> rows);

/// The same, each row multiplied by its routing weight in float32 and rounded to bf16.
void gather_weighted_rows(MatrixView<const Bf16> x, std::span<const int32_t> slot_of_row,
                          MatrixView<const float> topk_weights, MatrixView<Bf16> rows);

}  // namespace fourfold
