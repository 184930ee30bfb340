// Activation variants over rows of h: d[m,c] = f(gate, up) in float32 from bf16, rounded once.
// shapes:   h [M,2I] or [M,I] bf16, d [M,I] bf16; M is read on the device
// needs:    I a multiple of 8, rows aligned to 16 bytes
// numerics: NaN goes through clamps, as in src/reference/stages.cpp
// oracle:   formulas in float64, tests/sm90_gemm_test.cu
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/activate.cuh"
#include "cuda/check.cuh"
#include "sm90/activate_rows.h"

namespace fourfold::sm90 {
namespace {

struct ActivateArguments {
  ActivationFunction function;
  bool gated;
  const Bf16* h;
  Bf16* d;
  int64_t h_stride, d_stride;
  int32_t channels;
  const int32_t* rows;
};

/// Eight channels a thread.
__global__ void activate_rows_kernel(const __grid_constant__ ActivateArguments args) {
  const int32_t rows = *args.rows;
  const int64_t pieces = int64_t{rows} * (args.channels / 8);
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < pieces;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t row = i / (args.channels / 8);
    const int32_t channel = static_cast<int32_t>(i % (args.channels / 8)) * 8;
    const Bf16* h = args.h + row * args.h_stride + channel;
    alignas(16) Bf16 gate[8], up[8], out[8];
    *reinterpret_cast<uint4*>(gate) = *reinterpret_cast<const uint4*>(h);
    *reinterpret_cast<uint4*>(up) = *reinterpret_cast<const uint4*>(args.gated ? h + args.channels : h);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      out[c] =
          encode_bf16(cuda::activate(args.function, static_cast<float>(gate[c]), static_cast<float>(up[c])));
    }
    *reinterpret_cast<uint4*>(args.d + row * args.d_stride + channel) = *reinterpret_cast<const uint4*>(out);
  }
}

}  // namespace

void launch_activate_rows(const ActivateRows& args, void* stream) {
  const ActivateArguments kernel{
      args.function, is_gated(args.function.kind),      args.h.data, args.d.data, args.h.stride,
      args.d.stride, static_cast<int32_t>(args.d.cols), args.rows};
  // Enough to fill any GPU of the architecture; the loop takes the rest.
  const int64_t blocks = std::min<int64_t>((args.d.rows * args.d.cols / 8 + 255) / 256, 132 * 16);
  activate_rows_kernel<<<static_cast<unsigned>(blocks), 256, 0, cuda::as_stream(stream)>>>(kernel);
  cuda::check(cudaGetLastError(), "activate_rows_kernel");
}

}  // namespace fourfold::sm90
