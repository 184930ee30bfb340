// Checkpoint form -> what the GEMMs read, one matrix: a thread a block of 16 values, real or padding.
// shapes:   codes [rows, K/2], scales [rows, K/16] row-major or swizzled -> codes [rows', K'/2], swizzled
// scales numerics: exact oracle:   fourfold::swizzle_scales, tests/blackwell_stages_test.cpp
#include <cuda_runtime.h>

#include <algorithm>

#include "blackwell/block_weights.h"
#include "blackwell/unsigned_scale.h"
#include "cuda/check.cuh"

namespace fourfold::blackwell {
namespace {

struct BlockWeightsParams {
  const uint8_t *codes, *scales;
  int64_t code_stride, scale_stride;
  bool swizzled;
  int64_t rows, blocks;                              // that are there
  int64_t padded_rows, padded_blocks, scale_blocks;  // rows and blocks of codes; blocks of scales
  uint8_t *out_codes, *out_scales;
};

__global__ void block_weights_kernel(const __grid_constant__ BlockWeightsParams p) {
  const int64_t scale_rows = round_up(p.padded_rows, kScaleTileRows), all = scale_rows * p.scale_blocks;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < all;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t row = i / p.scale_blocks, block = i % p.scale_blocks;
    uint8_t scale = 0;
    uint32_t words[2] = {};
    if (row < p.rows && block < p.blocks) {
      scale =
          p.scales[p.swizzled ? swizzled_scale_offset(row, block, p.blocks) : row * p.scale_stride + block];
      const uint8_t* codes = p.codes + row * p.code_stride + block * 8;
#pragma unroll
      for (int byte = 0; byte < 8; ++byte) words[byte / 4] |= uint32_t{codes[byte]} << (byte % 4 * 8);
      words[0] ^= sign_flip(scale);
      words[1] ^= sign_flip(scale);
    }
    p.out_scales[swizzled_scale_offset(row, block, p.scale_blocks)] = unsigned_scale(scale);
    if (row < p.padded_rows && block < p.padded_blocks) {
      reinterpret_cast<uint2*>(p.out_codes)[row * p.padded_blocks + block] = make_uint2(words[0], words[1]);
    }
  }
}

}  // namespace

void launch_block_weights(const BlockScaledView& matrix, const BlockShape& shape, uint8_t* codes,
                          uint8_t* scales, void* stream) {
  const int64_t padded_blocks = shape.padded_depth() / 16;
  const BlockWeightsParams p{matrix.codes.data,
                             matrix.scales,
                             matrix.codes.stride,
                             matrix.scale_stride,
                             matrix.scale_layout == ScaleLayout::kSwizzled128x4,
                             matrix.rows,
                             matrix.blocks_per_row(),
                             shape.padded_rows(),
                             padded_blocks,
                             round_up(padded_blocks, kScaleTileCols),
                             codes,
                             scales};
  const int64_t work = shape.scale_bytes();
  if (work == 0) return;
  constexpr int kThreads = 256;
  const auto grid = static_cast<unsigned>(std::min<int64_t>((work + kThreads - 1) / kThreads, 1 << 16));
  block_weights_kernel<<<grid, kThreads, 0, cuda::as_stream(stream)>>>(p);
  cuda::check_launch("block_weights_kernel");
}

}  // namespace fourfold::blackwell
