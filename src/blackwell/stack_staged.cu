// Activations that a caller staged, brought into the layout of the GEMMs: a block of threads a row, a thread
// a block of 16 values. Codes and scales stay what they are, but for a scale's sign, which goes into its
// codes: block-scaled tensor cores read scales as unsigned. shapes:   codes [M, K/2], scales [M, K/16]
// row-major or swizzled group by group -> stacked rows oracle:   the codes themselves,
// tests/blackwell_stages_test.cpp
#include <algorithm>
#include <string>

#include "blackwell/finish_sums.h"
#include "blackwell/unsigned_scale.h"
#include "cuda/launch.cuh"
#include "cuda/quantize_rows.cuh"

namespace fourfold::blackwell {
namespace {

struct Term {
  cuda::Rows<const uint8_t> codes;
  const uint8_t* scales;
};

struct StackParams {
  int32_t first_row, rows, blocks;
  Term terms[2];
  int32_t term_count;
  int64_t scale_stride;
  bool swizzled;
  const int32_t* group_offsets;  // null: one group
  int32_t groups;
  const float *row_scales, *group_scales;
  cuda::StackedRows stacked;
  float* out_row_scales;
};

/// First row of the row's group, and of its padded scales. All threads look; begins and ends with a barrier.
struct Group {
  int32_t first_row, first_padded_row;
};

__device__ Group group_of(const StackParams& p, int32_t row) {
  __shared__ Group group;
  __syncthreads();
  if (threadIdx.x == 0) group = {0, 0};
  __syncthreads();
  if (p.group_offsets != nullptr && p.swizzled) {
    for (auto g = static_cast<int32_t>(threadIdx.x); g < p.groups; g += static_cast<int32_t>(blockDim.x)) {
      const int32_t first = p.group_offsets[g], end = p.group_offsets[g + 1];
      if (first <= row && row < end) group.first_row = first;
      if (end <= row)
        atomicAdd(&group.first_padded_row, static_cast<int32_t>(round_up(end - first, kScaleTileRows)));
    }
  }
  __syncthreads();
  return group;
}

__device__ void stack_block(const StackParams& p, const Group& group, const cuda::RowPlace& place,
                            int32_t row, int term, int32_t block) {
  const int64_t offset = p.swizzled ? group.first_padded_row * round_up(p.blocks, kScaleTileCols) +
                                          swizzled_scale_offset(row - group.first_row, block, p.blocks)
                                    : row * p.scale_stride + block;
  const uint8_t scale = p.terms[term].scales[offset];
  const uint8_t* codes = p.terms[term].codes.row(row) + int64_t{block} * (kNvfp4Block / 2);
  uint32_t words[2] = {};
#pragma unroll
  for (int i = 0; i < kNvfp4Block / 2; ++i) words[i / 4] |= uint32_t{codes[i]} << (i % 4 * 8);
  const uint32_t flip = sign_flip(scale);
  cuda::store_stacked_block(make_uint2(words[0] ^ flip, words[1] ^ flip), unsigned_scale(scale), place, term,
                            block, p.stacked);
}

__global__ void __launch_bounds__(cuda::kMostRowThreads)
    stack_staged_kernel(const __grid_constant__ StackParams p) {
  cuda::start_after_previous();
  for (auto i = static_cast<int32_t>(blockIdx.x); i < p.rows; i += static_cast<int32_t>(gridDim.x)) {
    const int32_t row = p.first_row + i;
    const cuda::RowPlace place = p.stacked.places[i];
    const Group group = group_of(p, row);
    if (threadIdx.x == 0) {
      p.out_row_scales[i] = p.row_scales != nullptr     ? p.row_scales[row]
                            : p.group_scales != nullptr ? p.group_scales[place.expert]
                                                        : 1.0f;
    }
    for (auto block = static_cast<int32_t>(threadIdx.x); block < p.blocks;
         block += static_cast<int32_t>(blockDim.x)) {
      for (int term = 0; term < p.term_count; ++term) stack_block(p, group, place, row, term, block);
    }
  }
}

}  // namespace

void stack_staged(const ActivationView& a, std::span<const int32_t> group_offsets, int64_t first_row,
                  int64_t rows, const cuda::StackedRows& stacked, float* row_scales, void* stream) {
  if (rows == 0 || a.cols == 0) return;
  StackParams p{};
  p.first_row = static_cast<int32_t>(first_row);
  p.rows = static_cast<int32_t>(rows);
  p.blocks = static_cast<int32_t>(a.cols / kNvfp4Block);
  p.terms[0] = {cuda::Rows<const uint8_t>(a.codes), a.scales};
  p.terms[1] = {cuda::Rows<const uint8_t>(a.residual_codes), a.residual_scales};
  p.term_count = a.format == ActivationFormat::kNvfp4x2 ? 2 : 1;
  p.scale_stride = a.scale_stride != 0 ? a.scale_stride : p.blocks;
  p.swizzled = a.scale_layout == ScaleLayout::kSwizzled128x4;
  p.group_offsets = group_offsets.data();
  p.groups = std::max(static_cast<int32_t>(group_offsets.size()) - 1, 0);
  p.row_scales = a.row_scales.data();
  p.group_scales = a.group_scales.data();
  p.stacked = stacked;
  p.out_row_scales = row_scales;
  cuda::launch_after_previous("stack_staged_kernel", stack_staged_kernel, cuda::row_blocks(rows, a.cols),
                              cuda::row_threads(a.cols), 0, stream, p);
}

}  // namespace fourfold::blackwell
