// gemmtest: a backend's GEMMs alone, dense and grouped, with row-major and swizzled scales.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fourfold/comparison.h"
#include "fourfold/moe_layer.h"

namespace fourfold {

struct GemmtestRequest {
  int64_t groups = 5, rows = 300, columns = 328, depth = 272;  ///< padding of every kind is needed
  uint64_t seed = 0;
  const Backend* backend = nullptr;
};

/// One GEMM compared with one oracle.
struct GemmtestRow {
  std::string operation;  ///< "dense", "grouped"
  std::string scales;     ///< "row-major", "swizzled"
  std::string against;    ///< "emulation", "bf16 matmul"
  Comparison comparison;
  double limit = 0.0;  ///< on the relative L2

  bool exceeds() const { return !(comparison.rel_l2 <= limit); }
};

struct GemmtestReport {
  std::vector<GemmtestRow> rows;
  std::vector<int32_t> group_offsets;
  double quantization_error_a = 0.0, quantization_error_b = 0.0;  ///< relative L2 of the operands
  int64_t different_elements = 0;  ///< between row-major and swizzled scales; both GEMMs together
  int64_t elements = 0;

  bool has_finding() const;
};

/// Quantizes random bf16 operands to NVFP4, pads and swizzles their scales, poisons the padding with NaN and
/// compares. Throws Error for a depth that is no multiple of 16.
GemmtestReport run_gemmtest(const GemmtestRequest& request);

}  // namespace fourfold
