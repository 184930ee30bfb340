// Groups of rows and what a grouped GEMM has to know of each, built on the device from group offsets alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "blackwell/grouped_gemm.h"
#include "cuda/stacked_rows.h"

namespace fourfold::blackwell {

/// One grouped GEMM of a layer: the rows of an expert times each of its matrices.
///
/// Gate and up are two groups that read the same rows, so that each has an alpha of its own: folding their
/// global scales into one would round block scales, and an alpha by column would need an epilogue visitor
/// that CUTLASS does not have for all of these kernels.
struct StackedGemm {
  int32_t halves = 1;    ///< matrices of an expert; group = expert * halves + half
  int64_t n = 0, k = 0;  ///< of one matrix; multiples of 8 and 32
  const uint8_t *a_codes = nullptr, *a_scales = nullptr;  ///< stacked rows (cuda/stacked_rows.h)
  /// Of the first matrix; those of an expert follow one another, the next expert's begin `b_expert_bytes`
  /// behind.
  const uint8_t *b_codes = nullptr, *b_scales = nullptr;
  int64_t b_expert_bytes = 0;
  void* d = nullptr;  ///< [terms * M, halves * n]: a half is n columns
  int64_t d_row_bytes = 0;
  int32_t d_element_bytes = 0;
  /// alpha = scales[expert] * globals[group], rounded to float32. `scales` null: output that no alpha
  /// multiplies.
  const float *scales = nullptr, *globals = nullptr;
};

/// Bytes of the arrays of so many groups, and the arrays in them. `bytes` starts at a multiple of 256.
size_t group_arrays_bytes(int64_t groups);
GroupArrays carve_group_arrays(std::span<std::byte> bytes, int64_t groups);

struct BuildGroups {
  std::span<const int32_t> group_offsets;  ///< [E+1], E at most kMostExperts of cuda/permute.h
  int64_t max_rows = 0;                    ///< upper bound of M
  int32_t terms = 1;                       ///< of a row: 2 for nvfp4x2
  StackedGemm gemms[2];                    ///< those with n = 0 are left out
  GroupArrays arrays[2];                   ///< written; E * halves groups
  cuda::RowPlace* places = nullptr;        ///< [max_rows], written up to M
};

/// Enqueues one kernel.
void build_groups(const BuildGroups& args, void* stream);

/// Bytes of swizzled scales behind which nothing of so many rows [rows, depth] lies: every expert's last tile
/// may hold one row.
int64_t most_scale_bytes(int64_t rows, int32_t terms, int64_t experts, int64_t depth);

}  // namespace fourfold::blackwell
