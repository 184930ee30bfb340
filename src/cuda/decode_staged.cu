// Staged activations that a caller brings, decoded: a block of threads a row, a thread sixteen values.
#include <algorithm>
#include <string>

#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "cuda/stage.h"
#include "fourfold/scale_layout.h"

namespace fourfold::cuda {
namespace {

/// One NVFP4 term.
struct Term {
  Rows<const uint8_t> codes;
  const uint8_t* scales;
  Rows<Bf16> to;
};

struct DecodeParams {
  ActivationFormat format;
  int32_t first_row, rows, blocks;  // rows come from first_row on and go to row 0 on
  Rows<const Bf16> values;
  Term terms[2];
  int32_t term_count;
  int64_t scale_stride;
  bool nvfp4, swizzled;
  const int32_t* group_offsets;  // null: one group
  int32_t groups;
  const float *row_scales, *group_scales;
  float* out_row_scales;
};

/// Where a row stands: its group, the group's first row, and its first row in the padded scale array.
struct Place {
  int32_t group, first_row, first_padded_row;
};

/// All threads look; ends with a barrier. Rows beyond the last group count as of group 0 and are no one's.
__device__ Place place_of(const DecodeParams& p, int32_t row) {
  __shared__ Place place;
  if (threadIdx.x == 0) place = {0, 0, 0};
  __syncthreads();
  if (p.group_offsets == nullptr) return place;
  for (auto group = static_cast<int32_t>(threadIdx.x); group < p.groups;
       group += static_cast<int32_t>(blockDim.x)) {
    const int32_t first = p.group_offsets[group], end = p.group_offsets[group + 1];
    if (first <= row && row < end) {
      place.group = group;
      place.first_row = first;
    } else if (end <= row) {
      atomicAdd(&place.first_padded_row, static_cast<int32_t>(round_up(end - first, kScaleTileRows)));
    }
  }
  __syncthreads();
  const Place found = place;
  __syncthreads();
  return found;
}

__device__ void decode_nvfp4(const DecodeParams& p, const Term& term, const Place& place, int32_t row,
                             int32_t block) {
  const int64_t in_group = row - place.first_row, k_sf = p.blocks;
  const int64_t offset = p.swizzled ? place.first_padded_row * round_up(k_sf, kScaleTileCols) +
                                          swizzled_scale_offset(in_group, block, k_sf)
                                    : row * p.scale_stride + block;
  const float scale = decode_e4m3(term.scales[offset]);
  const uint8_t* codes = term.codes.row(row) + int64_t{block} * (kNvfp4Block / 2);
  float x[kNvfp4Block];
#pragma unroll
  for (int i = 0; i < kNvfp4Block / 2; ++i) {
    const uint8_t pair = codes[i];
    x[2 * i] = __fmul_rn(decode_e2m1(pair), scale);
    x[2 * i + 1] = __fmul_rn(decode_e2m1(static_cast<uint8_t>(pair >> 4)), scale);
  }
  store_exact_block(x, term.to.row(row - p.first_row) + int64_t{block} * kNvfp4Block, term.to.aligned);
}

__device__ void decode_other(const DecodeParams& p, int32_t row, int32_t block) {
  const int64_t first = int64_t{block} * kNvfp4Block;
  float x[kNvfp4Block];
  if (p.format == ActivationFormat::kBf16) {
    load_block(p.values.row(row) + first, p.values.aligned, x);
  } else {
#pragma unroll
    for (int i = 0; i < kNvfp4Block; ++i) x[i] = decode_e4m3(p.terms[0].codes.row(row)[first + i]);
  }
  store_exact_block(x, p.terms[0].to.row(row - p.first_row) + first, p.terms[0].to.aligned);
}

__global__ void __launch_bounds__(kMostRowThreads) decode_rows(const __grid_constant__ DecodeParams p) {
  start_after_previous();
  for (auto i = static_cast<int32_t>(blockIdx.x); i < p.rows; i += static_cast<int32_t>(gridDim.x)) {
    const int32_t row = p.first_row + i;
    const Place place = place_of(p, row);
    if (threadIdx.x == 0 && p.out_row_scales != nullptr) {
      p.out_row_scales[i] = p.row_scales != nullptr     ? p.row_scales[row]
                            : p.group_scales != nullptr ? p.group_scales[place.group]
                                                        : 1.0f;
    }
    for (auto block = static_cast<int32_t>(threadIdx.x); block < p.blocks;
         block += static_cast<int32_t>(blockDim.x)) {
      if (p.nvfp4) {
        for (int term = 0; term < p.term_count; ++term) decode_nvfp4(p, p.terms[term], place, row, block);
      } else {
        decode_other(p, row, block);
      }
    }
  }
}

}  // namespace

void decode_staged(const ActivationView& a, std::span<const int32_t> group_offsets, int64_t first_row,
                   int64_t rows, const DecodedRows& decoded, void* stream) {
  if (rows == 0 || a.cols == 0) return;
  if (a.cols % kNvfp4Block != 0 || a.rows > kMostRows) {
    throw Error(ErrorCode::kInvalidArgument,
                "staged activations: expected at most 2^30 rows and a multiple of 16 columns, found [" +
                    std::to_string(a.rows) + ", " + std::to_string(a.cols) + "]");
  }
  DecodeParams p{};
  p.format = a.format;
  p.nvfp4 = is_nvfp4(a.format);
  p.first_row = static_cast<int32_t>(first_row);
  p.rows = static_cast<int32_t>(rows);
  p.blocks = static_cast<int32_t>(a.cols / kNvfp4Block);
  p.values = Rows<const Bf16>(a.values);
  p.terms[0] = {Rows<const uint8_t>(a.codes), a.scales, Rows<Bf16>(decoded.first)};
  p.terms[1] = {Rows<const uint8_t>(a.residual_codes), a.residual_scales, Rows<Bf16>(decoded.second)};
  p.term_count = a.format == ActivationFormat::kNvfp4x2 ? 2 : 1;
  p.scale_stride = a.scale_stride != 0 ? a.scale_stride : p.blocks;
  p.swizzled = a.scale_layout == ScaleLayout::kSwizzled128x4;
  p.group_offsets = group_offsets.data();
  p.groups = std::max(static_cast<int32_t>(group_offsets.size()) - 1, 0);
  p.row_scales = a.row_scales.data();
  p.group_scales = a.group_scales.data();
  p.out_row_scales = decoded.row_scales;
  launch_after_previous("decode_rows", decode_rows, row_blocks(rows, a.cols), row_threads(a.cols), 0, stream,
                        p);
}

}  // namespace fourfold::cuda
