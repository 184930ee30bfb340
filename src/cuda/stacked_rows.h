// NVFP4 activations as block-scaled tensor cores read them: codes in rows without gaps, scales in the 128x4
// layout group by group. A row of nvfp4x2 is two rows: the first terms of a group's rows, then the second
// ones, so that a GEMM reads the weights once for both.
#pragma once

#include <cstdint>

namespace fourfold::cuda {

/// Where a row stands. Index: its term.
struct RowPlace {
  int32_t expert = 0;
  int32_t stacked[2] = {};    ///< row of the codes, and of what a GEMM makes of them
  int32_t scale_row[2] = {};  ///< row of the scales, groups padded to 128 rows
};

/// Codes [terms * M, code_stride bytes] and swizzled scales. `codes` null: none are wanted.
struct StackedRows {
  uint8_t* codes = nullptr;  ///< 16-byte aligned
  int64_t code_stride = 0;   ///< a multiple of 16; bytes behind a row's last block are written as zero
  uint8_t* scales = nullptr;
  int64_t scale_columns = 0;         ///< blocks of 16 a row, before they are padded to 4
  const RowPlace* places = nullptr;  ///< [M], on the device
};

}  // namespace fourfold::cuda
