// Which compiled kernel a grouped GEMM runs: a table over tokens per expert.
#pragma once

#include <cstdint>
#include <iterator>
#include <string_view>

namespace fourfold::sm90 {

enum class GemmKernel : uint8_t { kFew, kNarrow, kMedium, kWide };

/// The shapes of the kernels, as their sources instantiate GemmTraits.
struct GemmKernelShape {
  GemmKernel kernel;
  std::string_view name;  ///< for reports
  int row_parts, row_blocks, depth_parts;
  int tokens, granule;
  /// Largest average of rows an expert, max_rows / experts, for which the kernel is taken.
  double most_rows_per_expert;
  /// Whether quantizing what SwiGLU gives costs less in the epilogue than in a kernel of its own: where
  /// memory is what the GEMM waits for.
  bool requantizes;
  /// Whether a kernel that gathers its token rows itself is compiled: where the copy of them, sorted, costs
  /// more than a plain load for each 16 bytes.
  bool gathers;
};

/// In order of preference. Measured on an H100, docs/hopper.md: narrow tiles keep all SMs busy and read
/// weights at full speed while tokens are few (room for eight leaves the most shared memory to weights in
/// flight); wide tiles read tokens seldom enough when they are many.
inline constexpr GemmKernelShape kGemmKernels[] = {
    {GemmKernel::kFew, "few: 64 rows x 8 tokens, k split over 4 warpgroups", 1, 1, 4, 8, 8, 4.0, true, false},
    {GemmKernel::kNarrow, "narrow: 64 rows x 32 tokens, k split over 4 warpgroups", 1, 1, 4, 32, 8, 12.0,
     true, false},
    {GemmKernel::kMedium, "medium: 256 rows x 96 tokens, 4 warpgroups", 4, 1, 1, 96, 16, 72.0, false, true},
    {GemmKernel::kWide, "wide: 256 rows x 160 tokens, 2 warpgroups", 2, 2, 1, 160, 16, 1e30, false, true},
};

constexpr const GemmKernelShape& choose_gemm_kernel(int64_t max_rows, int64_t experts) {
  const double rows_per_expert = static_cast<double>(max_rows) / static_cast<double>(experts);
  for (const GemmKernelShape& shape : kGemmKernels) {
    if (rows_per_expert <= shape.most_rows_per_expert) return shape;
  }
  return kGemmKernels[std::size(kGemmKernels) - 1];
}

}  // namespace fourfold::sm90
