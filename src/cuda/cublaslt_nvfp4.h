// NVIDIA's own dense NVFP4 GEMM, by cuBLASLt: a second opinion on GPUs that have the instruction.
#pragma once

#include <cstdint>
#include <string>

#include "fourfold/tensor.h"

namespace fourfold::cuda {

/// d[m,n] = bf16(alpha * sum_k a[m,k] * b[n,k]). Codes without gaps, scales in the 128x4 layout with zeros
/// where it has padding, all in device memory, 16-byte aligned; K a multiple of 32, N of 8.
struct Nvfp4Gemm {
  int64_t rows = 0, columns = 0, depth = 0;  ///< M, N, K
  const uint8_t *a_codes = nullptr, *a_scales = nullptr;
  const uint8_t *b_codes = nullptr, *b_scales = nullptr;
  float alpha = 1.0f;
  Bf16* d = nullptr;
};

/// Computes it and waits; -> why it can't be (no library, none with such a GEMM, not on this GPU), empty when
/// it is done. The library is looked for when the program runs.
std::string multiply_by_cublaslt(const Nvfp4Gemm& gemm);

}  // namespace fourfold::cuda
