// Weights in the form that the GEMMs read: rows of codes without gaps, scales in the 128x4 layout. Nothing is
// rounded: bytes are moved, K is padded to 32 with zeros, rows of scales to 128 and their columns to 4, and
// the sign of a negative scale goes into its codes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "blackwell/grouped_gemm.h"
#include "fourfold/block_scaled.h"
#include "fourfold/scale_layout.h"

namespace fourfold::blackwell {

/// One matrix [rows, depth] as it is stored: rows are padded to 8 and depth to 32.
struct BlockShape {
  int64_t rows = 0;
  int64_t depth = 0;

  int64_t padded_rows() const { return round_up(rows, kColumnMultiple); }
  int64_t padded_depth() const { return round_up(depth, kDepthMultiple); }
  int64_t code_bytes() const { return padded_rows() * padded_depth() / 2; }
  int64_t scale_bytes() const { return swizzled_scale_bytes(padded_rows(), padded_depth() / 16); }
};

/// Matrices of one expert and one GEMM, all codes, then all scales; and where the next expert's begin.
inline int64_t expert_bytes(const BlockShape& shape, int64_t halves) {
  return round_up(halves * (shape.code_bytes() + shape.scale_bytes()), 256);
}

/// Enqueues the preparation of `matrix`, NVFP4 in device memory: codes and scales at any address and stride,
/// scales row-major or swizzled. Writes shape.code_bytes() at `codes` and shape.scale_bytes() at `scales`,
/// 16-byte aligned, every byte. Throws Error when CUDA refuses.
void launch_block_weights(const BlockScaledView& matrix, const BlockShape& shape, uint8_t* codes,
                          uint8_t* scales, void* stream);

}  // namespace fourfold::blackwell
