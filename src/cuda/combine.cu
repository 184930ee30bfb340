// Combine: a thread eight columns of a token.
#include <algorithm>
#include <string>

#include "cuda/combine.h"
#include "cuda/combine_row.cuh"
#include "cuda/launch.cuh"

namespace fourfold::cuda {
namespace {

constexpr int kCombineThreads = 128;
constexpr unsigned kMostTokenBlocks = 1u << 20;  // more tokens are taken in turn

struct CombineParams {
  SlotRows slots;
  const Bf16* shared_z;  // null: no shared expert
  int64_t shared_stride;
  const float* shared_weights;  // null: all 1
  int32_t columns;              // in eights
  int64_t tokens;
  bool rows_are_known;
};

template <class Out>
__global__ void __launch_bounds__(kCombineThreads)
    combine_rows(const __grid_constant__ CombineParams p, Out* y, int64_t y_stride) {
  using Batch = SlotBatch<8>;
  if (!p.rows_are_known) cudaGridDependencySynchronize();
  Batch first(p.slots, blockIdx.x, 0);
  start_after_previous();
  const auto column = static_cast<int32_t>(blockIdx.y * kCombineThreads + threadIdx.x);
  if (column >= p.columns) return;
  for (int64_t token = blockIdx.x;;) {
    float sums[kColumns] = {};
    add_slots(p.slots, token, column, first, sums);
    if (p.shared_z != nullptr) {
      const float weight = p.shared_weights != nullptr ? p.shared_weights[token] : 1.0f;
      add_weighted(load_eight(p.shared_z + token * p.shared_stride, column), weight, sums);
    }
    store_row(y + token * y_stride + int64_t{column} * kColumns, sums);
    token += gridDim.x;
    if (token >= p.tokens) return;
    first = Batch(p.slots, token, 0);
  }
}

/// A block a token; its threads' sums meet in a fixed order.
__global__ void __launch_bounds__(kCombineThreads)
    weigh_tokens(const Bf16* x, int64_t x_stride, int64_t hidden, const float* gate, float* weights) {
  start_after_previous();
  __shared__ float of_warps[kCombineThreads / 32];
  const int64_t token = blockIdx.x;
  float sum = 0.0f;
  if (gate != nullptr) {
    for (int64_t h = threadIdx.x; h < hidden; h += kCombineThreads) {
      sum = __fadd_rn(sum, __fmul_rn(static_cast<float>(x[token * x_stride + h]), gate[h]));
    }
  }
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double logit = 0.0;
  for (const float part : of_warps) logit += part;
  weights[token] = gate != nullptr ? static_cast<float>(1.0 / (1.0 + exp(-logit))) : 1.0f;
}

bool is_loadable(const MatrixView<const Bf16>& z) {
  return z.stride % kColumns == 0 && reinterpret_cast<uintptr_t>(z.data) % 16 == 0;
}

}  // namespace

void combine(const CombineArgs& args, void* stream) {
  const int64_t tokens = args.topk_weights.rows, hidden = args.z.cols;
  if (tokens == 0 || hidden == 0) return;
  if (hidden % kColumns != 0 || !is_loadable(args.z) || !is_loadable(args.shared_z)) {
    throw Error(
        ErrorCode::kInvalidArgument,
        "combine: z: expected H and stride in multiples of 8 and a 16-byte aligned address, found H " +
            std::to_string(hidden) + ", stride " + std::to_string(args.z.stride));
  }
  const CombineParams params{
      {args.z.data, args.z.stride, args.row_of_slot, args.weight_on_input ? nullptr : args.topk_weights.data,
       args.topk_weights.stride, static_cast<int32_t>(args.topk_weights.cols)},
      args.shared_z.data,
      args.shared_z.stride,
      args.shared_weights,
      static_cast<int32_t>(hidden / kColumns),
      tokens,
      args.rows_are_known};
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(tokens, kMostTokenBlocks)),
                  static_cast<unsigned>((params.columns + kCombineThreads - 1) / kCombineThreads));
  std::visit(
      [&](const auto& y) {
        using Out = std::remove_pointer_t<decltype(y.data)>;
        launch_after_previous("combine_rows", combine_rows<Out>, grid, kCombineThreads, 0, stream, params,
                              y.data, y.stride);
      },
      args.y);
}

void weigh_shared(MatrixView<const Bf16> x, const float* gate, float* weights, void* stream) {
  if (x.rows == 0) return;
  launch_after_previous("weigh_tokens", weigh_tokens, static_cast<unsigned>(x.rows), kCombineThreads, 0,
                        stream, x.data, x.stride, x.cols, gate, weights);
}

}  // namespace fourfold::cuda
