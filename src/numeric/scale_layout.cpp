// Copies between row-major scales and the 128x4 layout. Padding is always written.
#include "fourfold/scale_layout.h"

#include "base/fail.h"

namespace fourfold {
namespace {

/// Writes `scales` at `out`, which holds swizzled_scale_bytes(rows, cols) zeros.
void swizzle_into(MatrixView<const uint8_t> scales, uint8_t* out) {
  for (int64_t row = 0; row < scales.rows; ++row) {
    for (int64_t col = 0; col < scales.cols; ++col) {
      out[swizzled_scale_offset(row, col, scales.cols)] = scales(row, col);
    }
  }
}

int64_t rows_per_expert(MatrixView<const uint8_t> scales, int64_t experts) {
  if (experts <= 0 || scales.rows % experts != 0) {
    reject("stacked expert scales", fmt::format("rows to be a multiple of {} experts", experts), scales.rows);
  }
  return scales.rows / experts;
}

}  // namespace

void validate_group_offsets(std::span<const int32_t> group_offsets, int64_t rows) {
  if (group_offsets.empty() || group_offsets.front() != 0 || group_offsets.back() != rows) {
    reject("group offsets", fmt::format("them to run from 0 to {} rows", rows),
           group_offsets.empty() ? "none"
                                 : fmt::format("{} to {}", group_offsets.front(), group_offsets.back()));
  }
  for (size_t group = 0; group + 1 < group_offsets.size(); ++group) {
    if (group_offsets[group + 1] < group_offsets[group]) {
      reject("group offsets", "ascending numbers", fmt::format("a step down after group {}", group));
    }
  }
}

std::vector<int64_t> padded_group_rows(std::span<const int32_t> group_offsets) {
  std::vector<int64_t> first_row(group_offsets.size(), 0);
  for (size_t group = 0; group + 1 < group_offsets.size(); ++group) {
    first_row[group + 1] =
        first_row[group] + round_up(group_offsets[group + 1] - group_offsets[group], kScaleTileRows);
  }
  return first_row;
}

std::vector<uint8_t> swizzle_scales(MatrixView<const uint8_t> scales) {
  std::vector<uint8_t> swizzled(static_cast<size_t>(swizzled_scale_bytes(scales.rows, scales.cols)), 0);
  swizzle_into(scales, swizzled.data());
  return swizzled;
}

std::vector<uint8_t> unswizzle_scales(std::span<const uint8_t> swizzled, int64_t rows, int64_t k_sf) {
  if (static_cast<int64_t>(swizzled.size()) != swizzled_scale_bytes(rows, k_sf)) {
    reject("swizzled scales of " + shape_text(rows, k_sf),
           fmt::format("{} bytes (rows padded to 128, columns to 4)", swizzled_scale_bytes(rows, k_sf)),
           swizzled.size());
  }
  std::vector<uint8_t> scales(static_cast<size_t>(rows * k_sf));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < k_sf; ++col) {
      scales[static_cast<size_t>(row * k_sf + col)] =
          swizzled[static_cast<size_t>(swizzled_scale_offset(row, col, k_sf))];
    }
  }
  return scales;
}

std::vector<uint8_t> swizzle_scale_groups(MatrixView<const uint8_t> scales,
                                          std::span<const int32_t> group_offsets) {
  validate_group_offsets(group_offsets, scales.rows);
  const std::vector<int64_t> first_row = padded_group_rows(group_offsets);
  const int64_t padded_cols = round_up(scales.cols, kScaleTileCols);
  std::vector<uint8_t> swizzled(static_cast<size_t>(first_row.back() * padded_cols), 0);
  for (size_t group = 0; group + 1 < group_offsets.size(); ++group) {
    const int64_t rows = group_offsets[group + 1] - group_offsets[group];
    swizzle_into(scales.rows_from(group_offsets[group], rows),
                 swizzled.data() + first_row[group] * padded_cols);
  }
  return swizzled;
}

std::vector<uint8_t> swizzle_expert_scales(MatrixView<const uint8_t> scales, int64_t experts) {
  const int64_t rows = rows_per_expert(scales, experts);
  const int64_t bytes = swizzled_scale_bytes(rows, scales.cols);
  std::vector<uint8_t> swizzled(static_cast<size_t>(experts * bytes), 0);
  for (int64_t expert = 0; expert < experts; ++expert) {
    swizzle_into(scales.rows_from(expert * rows, rows), swizzled.data() + expert * bytes);
  }
  return swizzled;
}

std::vector<uint8_t> swizzle_expert_scales_from_transposed(MatrixView<const uint8_t> scales,
                                                           int64_t experts) {
  const int64_t k_sf = rows_per_expert(scales, experts), rows = scales.cols;
  const int64_t bytes = swizzled_scale_bytes(rows, k_sf);
  std::vector<uint8_t> swizzled(static_cast<size_t>(experts * bytes), 0);
  for (int64_t expert = 0; expert < experts; ++expert) {
    for (int64_t col = 0; col < k_sf; ++col) {
      for (int64_t row = 0; row < rows; ++row) {
        swizzled[static_cast<size_t>(expert * bytes + swizzled_scale_offset(row, col, k_sf))] =
            scales(expert * k_sf + col, row);
      }
    }
  }
  return swizzled;
}

}  // namespace fourfold
