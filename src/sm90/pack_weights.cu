// Checkpoint form -> packed units (sm90/packed_layout.h), one matrix or one gate/up pair.
// shapes:   codes [channels, K/2], scales [channels, K/16] row-major or swizzled; packed: shape.bytes()
// needs:    nothing of the sources' alignment; K a multiple of 16
// numerics: exact, all 16 codes x 256 scales; padding is zero
// oracle:   tests/sm90_packed_layout_test.cpp (the index functions), tests/sm90_gemm_test.cu (the kernel)
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/check.cuh"
#include "sm90/expert_gemm.h"
#include "sm90/expert_gemm_checks.h"

namespace fourfold::sm90 {
namespace {

struct Source {
  const uint8_t* codes;
  int64_t code_stride;
  const uint8_t* scales;
  int64_t scale_stride;
  bool swizzled;
};

struct PackArguments {
  PackedShape shape;
  Source halves[2];
  uint8_t* packed;
};

constexpr int kSteps = kUnitDepth / 16;

__device__ uint8_t scale_of(const PackedShape& shape, const Source& source, int64_t channel, int64_t block) {
  return source.scales[source.swizzled ? swizzled_scale_offset(channel, block, shape.depth / 16)
                                       : channel * source.scale_stride + block];
}

/// One block a unit: the unit's codes and scales are read and re-encoded into shared memory, then every
/// thread assembles the words that its namesake in the GEMM will read.
__global__ void __launch_bounds__(128) pack_weights_kernel(const __grid_constant__ PackArguments args) {
  __shared__ uint8_t codes[kUnitRows][kUnitDepth];
  __shared__ uint8_t scales[kUnitRows][kSteps];
  const PackedShape& shape = args.shape;
  const int64_t row_block = blockIdx.x / shape.depth_units(), depth_unit = blockIdx.x % shape.depth_units();

  for (int i = static_cast<int>(threadIdx.x); i < kUnitRows * kSteps; i += 128) {
    const int row = i / kSteps, step = i % kSteps;
    const int64_t packed_row = row_block * kUnitRows + row, block = depth_unit * kSteps + step;
    PackedScale scale{0, 0, 0};
    const SourceRow from = source_row(shape.order, packed_row);
    const bool real = from.channel < shape.channels && block < shape.depth / 16;
    if (real) scale = pack_scale(scale_of(shape, args.halves[from.half], from.channel, block));
    scales[row][step] = scale.byte;
    for (int byte = 0; byte < 8; ++byte) {
      const Source& source = args.halves[from.half];
      const uint8_t pair = real ? source.codes[from.channel * source.code_stride + block * 8 + byte] : 0;
      codes[row][step * 16 + byte * 2] =
          static_cast<uint8_t>(((pair & 15) & scale.code_and) ^ scale.code_xor);
      codes[row][step * 16 + byte * 2 + 1] =
          static_cast<uint8_t>(((pair >> 4) & scale.code_and) ^ scale.code_xor);
    }
  }
  __syncthreads();

  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 32; ++i) {  // 4 steps x 2 rows x 2 k halves x 2 codes
    const int step = i / 8, row = warp * 16 + i / 4 % 2 * 8 + g,
              k = step * 16 + i / 2 % 2 * 8 + t * 2 + i % 2;
    const uint32_t code = codes[row][k];
#pragma unroll
    for (int bit = 0; bit < 4; ++bit) {
      // Every thread has the bit where thread 0 has that of its row and k: known at compile time.
      const BitPosition at = code_bit_position(i / 4 % 2 * 8, step * 16 + i / 2 % 2 * 8 + i % 2, bit);
      words[at.byte / 4] |= ((code >> bit) & 1u) << (at.byte % 4 * 8 + at.bit);
    }
  }
  uint8_t* unit = args.packed + shape.unit_offset(row_block, depth_unit);
  *reinterpret_cast<uint4*>(unit + thread * 16) = make_uint4(words[0], words[1], words[2], words[3]);
  if (thread < kUnitScaleBytes / 4) {  // word p of rows 16 w + g and + 8
    const int rows = thread / 2, pair = thread % 2;
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) {
      const int row = rows / 8 * 16 + rows % 8 + i / 2 * 8, step = pair * 2 + i % 2;
      word |= rotate_left(scales[row][step], scale_position(row, step).bit);
    }
    *reinterpret_cast<uint32_t*>(unit + kUnitCodeBytes + thread * 4) = word;
  }
}

Source source_of(const BlockScaledView& matrix) {
  return {matrix.codes.data, matrix.codes.stride, matrix.scales, matrix.scale_stride,
          matrix.scale_layout == ScaleLayout::kSwizzled128x4};
}

}  // namespace

void launch_pack_weights(const PackWeights& args, void* stream) {
  validate(args);
  const int64_t units = args.shape.row_blocks() * args.shape.depth_units();
  if (units == 0) return;
  const PackArguments kernel{
      args.shape, {source_of(args.matrix), source_of(args.up)}, reinterpret_cast<uint8_t*>(args.packed)};
  pack_weights_kernel<<<static_cast<unsigned>(units), 128, 0, cuda::as_stream(stream)>>>(kernel);
  cuda::check(cudaGetLastError(), "pack_weights_kernel");
}

}  // namespace fourfold::sm90
