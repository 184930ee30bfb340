// Group arrays: every block of threads scans the offsets for itself, then they share groups and rows among
// them, so that one kernel does without a second one that waits for it. shapes:   group_offsets [E+1] ->
// arrays of E * halves groups, places [M] needs:    E <= 8192: offsets of padded groups lie in shared memory
// oracle:   fourfold::padded_group_rows, tests/blackwell_stages_test.cpp
#include <algorithm>

#include "blackwell/group_arrays.h"
#include "blackwell/group_entries.h"
#include "cuda/block_scan.cuh"
#include "cuda/launch.cuh"
#include "fourfold/scale_layout.h"

namespace fourfold::blackwell {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 512;
constexpr size_t kArrays = 13;  // members of GroupArrays
constexpr int64_t kArrayAlignment = 256;

struct GroupParams {
  const int32_t* group_offsets;
  int32_t experts, terms;
  StackedGemm gemms[2];
  GroupArrays arrays[2];
  cuda::RowPlace* places;
};

template <class T>
__device__ T& entry(void* array, int32_t group) {
  return static_cast<T*>(array)[group];
}

__device__ void write_group(const GroupParams& p, const StackedGemm& gemm, const GroupArrays& arrays,
                            int32_t group, int32_t first_scale_row) {
  const int32_t expert = group / gemm.halves, half = group % gemm.halves;
  const int64_t first = int64_t{p.group_offsets[expert]} * p.terms;
  const int32_t rows = (p.group_offsets[expert + 1] - p.group_offsets[expert]) * p.terms;
  const auto n = static_cast<int32_t>(gemm.n), k = static_cast<int32_t>(gemm.k);
  const int64_t scale_columns = gemm.k / kScaleBlock;
  entry<ShapeEntry>(arrays.shapes, group) = {rows, n, k};
  entry<const uint8_t*>(arrays.a, group) = gemm.a_codes + first * (gemm.k / 2);
  entry<const uint8_t*>(arrays.a_scales, group) =
      gemm.a_scales + first_scale_row * round_up(scale_columns, kScaleTileCols);
  const int64_t of_expert = expert * gemm.b_expert_bytes;
  entry<const uint8_t*>(arrays.b, group) = gemm.b_codes + of_expert + half * gemm.n * (gemm.k / 2);
  entry<const uint8_t*>(arrays.b_scales, group) =
      gemm.b_scales + of_expert + half * swizzled_scale_bytes(gemm.n, scale_columns);
  entry<char*>(arrays.d, group) =
      static_cast<char*>(gemm.d) + first * gemm.d_row_bytes + half * gemm.n * gemm.d_element_bytes;
  if (gemm.scales != nullptr) {
    float& alpha = entry<float>(arrays.alpha_values, group);
    alpha = __fmul_rn(gemm.scales[expert], gemm.globals[group]);
    entry<const float*>(arrays.alphas, group) = &alpha;
  }
  entry<StrideEntry>(arrays.a_strides, group) = {gemm.k};
  entry<StrideEntry>(arrays.b_strides, group) = {gemm.k};
  entry<StrideEntry>(arrays.d_strides, group) = {gemm.d_row_bytes / gemm.d_element_bytes};
  entry<ScaleLayoutEntry>(arrays.a_scale_layouts, group) = scale_layout_of(rows, k);
  entry<ScaleLayoutEntry>(arrays.b_scale_layouts, group) = scale_layout_of(n, k);
}

/// The last expert whose first row is not behind `row`: experts without rows come before it.
__device__ int32_t expert_of(const GroupParams& p, int32_t row) {
  int32_t low = 0, high = p.experts - 1;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (p.group_offsets[middle] <= row) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

__device__ cuda::RowPlace place_of(const GroupParams& p, const int32_t* scale_rows, int32_t row) {
  cuda::RowPlace place;
  place.expert = expert_of(p, row);
  const int32_t first = p.group_offsets[place.expert], rows = p.group_offsets[place.expert + 1] - first;
  for (int term = 0; term < 2; ++term) {
    const int32_t in_group = row - first + (term < p.terms ? term : 0) * rows;
    place.stacked[term] = first * p.terms + in_group;
    place.scale_row[term] = scale_rows[place.expert] + in_group;
  }
  return place;
}

__global__ void __launch_bounds__(kThreads) build_groups_kernel(const __grid_constant__ GroupParams p) {
  cuda::start_after_previous();
  extern __shared__ int32_t scale_rows[];  // [E+1]: first padded row of every expert
  for (auto expert = static_cast<int32_t>(threadIdx.x); expert < p.experts; expert += kThreads) {
    const int32_t rows = (p.group_offsets[expert + 1] - p.group_offsets[expert]) * p.terms;
    scale_rows[expert + 1] = static_cast<int32_t>(round_up(rows, kScaleTileRows));
  }
  __syncthreads();
  cuda::block_exclusive_offsets(scale_rows + 1, p.experts, scale_rows);

  const auto first = static_cast<int32_t>(blockIdx.x * kThreads + threadIdx.x);
  const auto step = static_cast<int32_t>(gridDim.x * kThreads);
  for (int which = 0; which < 2; ++which) {
    const StackedGemm& gemm = p.gemms[which];
    if (gemm.n == 0) continue;
    for (int32_t group = first; group < p.experts * gemm.halves; group += step) {
      write_group(p, gemm, p.arrays[which], group, scale_rows[group / gemm.halves]);
    }
  }
  const int32_t rows = p.group_offsets[p.experts];
  for (int32_t row = first; row < rows; row += step) p.places[row] = place_of(p, scale_rows, row);
}

}  // namespace

size_t group_arrays_bytes(int64_t groups) {
  const size_t widest =
      std::max({sizeof(ShapeEntry), sizeof(StrideEntry), sizeof(ScaleLayoutEntry), sizeof(void*)});
  const auto one = static_cast<size_t>(round_up(groups * static_cast<int64_t>(widest), kArrayAlignment));
  return kArrays * one;
}

GroupArrays carve_group_arrays(std::span<std::byte> bytes, int64_t groups) {
  GroupArrays arrays;
  arrays.groups = static_cast<int32_t>(groups);
  const size_t one = group_arrays_bytes(groups) / kArrays;
  std::byte* next = bytes.data();
  for (void** array :
       {&arrays.shapes, &arrays.a, &arrays.a_strides, &arrays.a_scales, &arrays.a_scale_layouts, &arrays.b,
        &arrays.b_strides, &arrays.b_scales, &arrays.b_scale_layouts, &arrays.d, &arrays.d_strides,
        &arrays.alphas, &arrays.alpha_values}) {
    *array = next;
    if (next != nullptr) next += one;
  }
  return arrays;
}

int64_t most_scale_bytes(int64_t rows, int32_t terms, int64_t experts, int64_t depth) {
  const int64_t most_rows = rows * terms + std::min(rows, experts) * (kScaleTileRows - 1);
  return swizzled_scale_bytes(most_rows, depth / kScaleBlock);
}

void build_groups(const BuildGroups& args, void* stream) {
  GroupParams p{args.group_offsets.data(),
                static_cast<int32_t>(args.group_offsets.size()) - 1,
                args.terms,
                {args.gemms[0], args.gemms[1]},
                {args.arrays[0], args.arrays[1]},
                args.places};
  if (p.experts <= 0) return;
  const int64_t work = std::max<int64_t>(args.max_rows, 2 * p.experts);
  const auto blocks =
      static_cast<unsigned>(std::clamp<int64_t>((work + kThreads - 1) / kThreads, 1, kMostBlocks));
  const size_t shared = static_cast<size_t>(p.experts + 1) * sizeof(int32_t);
  cuda::launch_after_previous("build_groups", build_groups_kernel, blocks, kThreads, shared, stream, p);
}

}  // namespace fourfold::blackwell
