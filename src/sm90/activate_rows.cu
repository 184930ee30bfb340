// Activation variants over rows of h: d[m,c] = f(gate, up) in float32 from bf16, rounded once.
// shapes:   h [M,2I] or [M,I] bf16, d [M,I] bf16; M is read on the device
// needs:    I a multiple of 8, rows aligned to 16 bytes
// numerics: NaN goes through clamps, as in src/reference/stages.cpp
// oracle:   formulas in float64, tests/sm90_gemm_test.cu
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/check.cuh"
#include "sm90/activate_rows.h"

namespace fourfold::sm90 {
namespace {

struct Arguments {
  ActivationKind kind;
  bool gated;
  float alpha, beta, limit;
  const Bf16* h;
  Bf16* d;
  int64_t h_stride, d_stride;
  int32_t channels;
  const int32_t* rows;
};

__device__ float clamp_keeping_nan(float value, float low, float high) {
  return value < low ? low : value > high ? high : value;
}
__device__ float sigmoid(float x) {
  return 1.0f / (1.0f + expf(-x));
}
__device__ float silu(float x) {
  return x / (1.0f + expf(-x));
}
/// erfc, not 1 + erf, which cancels for negative x.
__device__ float gelu(float x) {
  return 0.5f * x * erfcf(-x * 0.707106781f);
}
__device__ float gelu_tanh(float x) {
  return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
}

__device__ float activate(const Arguments& args, float gate, float up) {
  const float limit = args.limit;
  switch (args.kind) {
    case ActivationKind::kSwiglu: {
      const float g = gate > limit ? limit : gate, u = clamp_keeping_nan(up, -limit, limit);
      return g * sigmoid(args.alpha * g) * (args.beta == 0.0f ? u : u + args.beta);
    }
    case ActivationKind::kSwigluStep: {
      const float s = silu(gate);
      return (s > limit ? limit : s) * clamp_keeping_nan(up, -limit, limit);
    }
    case ActivationKind::kGeglu:
      return gelu(gate) * up;
    case ActivationKind::kGegluTanh:
      return gelu_tanh(gate) * up;
    case ActivationKind::kReluSquared: {
      const float positive = up < 0.0f ? 0.0f : up;
      return positive * positive;
    }
    case ActivationKind::kSilu:
      return silu(up);
    case ActivationKind::kGelu:
      return gelu(up);
  }
  return up;
}

/// Eight channels a thread.
__global__ void activate_rows_kernel(const __grid_constant__ Arguments args) {
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
      out[c] = encode_bf16(activate(args, static_cast<float>(gate[c]), static_cast<float>(up[c])));
    }
    *reinterpret_cast<uint4*>(args.d + row * args.d_stride + channel) = *reinterpret_cast<const uint4*>(out);
  }
}

}  // namespace

void launch_activate_rows(const ActivateRows& args, void* stream) {
  const Arguments kernel{args.function.kind,
                         is_gated(args.function.kind),
                         args.function.alpha,
                         args.function.beta,
                         args.function.limit,
                         args.h.data,
                         args.d.data,
                         args.h.stride,
                         args.d.stride,
                         static_cast<int32_t>(args.d.cols),
                         args.rows};
  // Enough to fill any GPU of the architecture; the loop takes the rest.
  const int64_t blocks = std::min<int64_t>((args.d.rows * args.d.cols / 8 + 255) / 256, 132 * 16);
  activate_rows_kernel<<<static_cast<unsigned>(blocks), 256, 0, static_cast<cudaStream_t>(stream)>>>(kernel);
  cuda::check(cudaGetLastError(), "activate_rows_kernel");
}

}  // namespace fourfold::sm90
