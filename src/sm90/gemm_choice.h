// Which compiled kernels a grouped GEMM runs: a table over tokens per expert, a rule where tiles are few, and
// another launch for experts far from the mean where they are many.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "sm90/tile_schedule.h"

namespace fourfold::sm90 {

/// Boxes of tokens that a launch has, of different sizes: two terms' maps, 128 bytes each, fit the 4 KB of a
/// kernel's parameters.
inline constexpr int kMostTokenMaps = 12;

/// What the tokens of a tile are rounded up to in shared memory: where there are more granules than boxes,
/// two of them.
constexpr int box_granule(int tokens, int granule) {
  return tokens / granule <= kMostTokenMaps ? granule : 2 * granule;
}

enum class GemmKernel : uint8_t { kFew, kNarrow, kMedium, kBroad, kWide };

/// The shapes of the kernels, as their sources instantiate GemmTraits.
struct GemmKernelShape {
  GemmKernel kernel;
  std::string_view name;  ///< for reports
  int row_parts, row_blocks, depth_parts;
  int one_term_stage_units;  ///< see stage_units()
  int tokens, granule;
  /// Largest average of rows an expert, max_rows / experts, for which the kernel is taken; 0: by
  /// choose_gemm_kernel's rules alone, as kNarrow up to kMostRowsOfManyNarrow.
  double most_rows_per_expert;
  /// Whether the kernel of one term can gather its token rows itself: where the copy of them, sorted, costs
  /// more than a plain load for each 16 bytes.
  bool gathers;

  /// k units of a pipeline stage. Every stage costs barriers and addresses, so it has as many as leave three
  /// stages or more in shared memory; a second term takes the room of half of them.
  constexpr int stage_units(int terms) const {
    return terms == 1 ? one_term_stage_units : std::max(one_term_stage_units / 2, depth_parts);
  }
};

/// In order of preference. Measured on an H200, docs/hopper-tried.md: tiles of 256 rows keep four warpgroups
/// at one matrix, and the fewer tokens a tile has room for, the more weights are in flight.
inline constexpr GemmKernelShape kGemmKernels[] = {
    {GemmKernel::kFew, "few: 64 rows x 8 tokens, k split over 4 warpgroups", 1, 1, 4, 8, 8, 8, 0.0, false},
    {GemmKernel::kNarrow, "narrow: 256 rows x 32 tokens, 4 warpgroups", 4, 1, 1, 4, 32, 8, 12.0, true},
    {GemmKernel::kMedium, "medium: 256 rows x 64 tokens, 4 warpgroups", 4, 1, 1, 4, 64, 8, 52.0, true},
    {GemmKernel::kBroad, "broad: 256 rows x 96 tokens, 4 warpgroups", 4, 1, 1, 2, 96, 8, 84.0, true},
    {GemmKernel::kWide, "wide: 256 rows x 160 tokens, 2 warpgroups", 2, 2, 1, 2, 160, 8, 1e30, true},
};

constexpr const GemmKernelShape& shape_of(GemmKernel kernel) {
  return kGemmKernels[static_cast<size_t>(kernel)];
}
static_assert([] {
  for (const GemmKernelShape& shape : kGemmKernels) {
    if (shape_of(shape.kernel).kernel != shape.kernel) return false;
  }
  return true;
}());

/// Of an H100 SXM and an H200, one CTA each. A constant, so that a choice, and with it the last bits of a
/// result, does not depend on the GPU.
inline constexpr int64_t kMultiprocessors = 132;

/// How often every SM has a tile of a GEMM, where all experts that can have rows have equally many.
/// `row_blocks`: of 64 packed rows, of one expert.
constexpr int64_t gemm_waves(const GemmKernelShape& shape, int64_t max_rows, int64_t experts,
                             int64_t row_blocks) {
  const auto pieces = [](int64_t whole, int64_t piece) { return (whole + piece - 1) / piece; };
  const int64_t hit = std::min(max_rows, experts);
  if (hit == 0) return 0;
  return pieces(hit * pieces(row_blocks, shape.row_parts * shape.row_blocks) *
                    pieces(pieces(max_rows, hit), shape.tokens),
                kMultiprocessors);
}

/// Of kNarrow, where a launch of tiles with room for more is worth it for the experts that have more.
inline constexpr double kMostRowsOfManyNarrow = 20.0;

/// Whether a GEMM has so many tiles of a kernel that other tiles may be a launch of their own: beginning and
/// ending one costs about a tile's time. Measured on an H200, docs/hopper-tried.md: at 6 waves of kWide it is
/// worth it, of others not; at 12 waves and more of any.
constexpr bool has_many_waves(const GemmKernelShape& shape, int64_t max_rows, int64_t experts,
                              int64_t row_blocks) {
  const int64_t many = shape.kernel == GemmKernel::kWide ? 5 : 10;
  return experts > 1 && gemm_waves(shape, max_rows, experts, row_blocks) >= many;
}

/// By rows an expert, kNarrow for more of them where tiles are many, unless there are so few tiles that SMs
/// would be idle: a tile of kFew takes a quarter of the time, and is taken where that saves more than a
/// quarter; and kMedium where a single expert's tiles of it are all there at once, instead of larger ones.
/// (Of several, half have more rows than the mean.)
constexpr const GemmKernelShape& choose_gemm_kernel(int64_t max_rows, int64_t experts, int64_t row_blocks) {
  const GemmKernelShape &few = shape_of(GemmKernel::kFew), &narrow = shape_of(GemmKernel::kNarrow),
                        &medium = shape_of(GemmKernel::kMedium);
  const double rows_per_expert = static_cast<double>(max_rows) / static_cast<double>(experts);
  const int64_t medium_waves = gemm_waves(medium, max_rows, experts, row_blocks);
  if (gemm_waves(few, max_rows, experts, row_blocks) < 3 * medium_waves) return few;
  if (rows_per_expert <= kMostRowsOfManyNarrow && has_many_waves(narrow, max_rows, experts, row_blocks)) {
    return narrow;
  }
  for (const GemmKernelShape& shape : kGemmKernels) {
    if (shape.kernel == GemmKernel::kFew || rows_per_expert > shape.most_rows_per_expert) continue;
    return experts == 1 && medium_waves == 1 && shape.tokens > medium.tokens ? medium : shape;
  }
  return shape_of(GemmKernel::kWide);
}

/// One launch of a grouped GEMM, for the experts in a band of rows.
struct GemmPart {
  GemmKernel kernel;
  RowBand band = {};
};

/// The launches of a grouped GEMM, in order.
struct GemmPlan {
  std::array<GemmPart, 2> parts;
  int count = 1;

  /// What the mean of rows an expert asks for: decides for all what choices there are.
  constexpr const GemmKernelShape& main() const { return shape_of(parts[0].kernel); }
};

/// What choose_gemm_kernel says; and another launch for experts that are far from the mean, as they are known
/// on the device alone: those with more rows than a tile has room for, or so few that kWide's would be half
/// empty. Kernels but kFew give the same bits, so that a row's result does not depend on the others'.
constexpr GemmPlan plan_gemm(int64_t max_rows, int64_t experts, int64_t row_blocks) {
  const GemmKernelShape& main = choose_gemm_kernel(max_rows, experts, row_blocks);
  if (main.kernel == GemmKernel::kFew || !has_many_waves(main, max_rows, experts, row_blocks)) {
    return {{{{main.kernel}}}};
  }
  if (main.kernel == GemmKernel::kWide) {
    const int32_t little = shape_of(GemmKernel::kBroad).tokens;
    return {{{{GemmKernel::kWide, {little}}, {GemmKernel::kBroad, {0, little}}}}, 2};
  }
  const GemmKernel larger = main.kernel == GemmKernel::kNarrow ? GemmKernel::kMedium : GemmKernel::kWide;
  return {{{{main.kernel, {0, main.tokens}}, {larger, {main.tokens}}}}, 2};
}

}  // namespace fourfold::sm90
