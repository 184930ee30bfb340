// Combine: a thread eight columns of a token.
#include <algorithm>
#include <string>

#include "cuda/combine.h"
#include "cuda/combine_row.cuh"
#include "cuda/device.h"
#include "cuda/launch.cuh"

namespace fourfold::cuda {
namespace {

constexpr int kCombineThreads = 128;
constexpr unsigned kMostTokenBlocks = 1u << 20;  // more tokens are taken in turn
constexpr int kCombineSlots = 8;                 // added at once
constexpr int kFewBlocks = 8;  // a multiprocessor; seven wait there at once, by their registers

struct CombineParams {
  SlotRows slots;
  const Bf16* shared_z;  // null: no shared expert
  int64_t shared_stride;
  const float* shared_weights;  // null: all 1
  int32_t columns;              // in eights
  int64_t tokens;
};

/// Rows and weights of the first slots of a token, as many as are added at once. Past L1: they are read while
/// the kernel before this one ends, and no line that the multiprocessor kept from an earlier call must do.
struct FirstSlots {
  int32_t rows[kCombineSlots];  // -1: none
  float weights[kCombineSlots];

  __device__ FirstSlots(const SlotRows& slots, int64_t token) {
#pragma unroll
    for (int i = 0; i < kCombineSlots; ++i) {
      const bool there = i < slots.top_k;
      rows[i] = there ? __ldcg(slots.row_of_slot + token * slots.top_k + i) : -1;
      weights[i] =
          there && slots.weights != nullptr ? __ldcg(slots.weights + token * slots.weight_stride + i) : 1.0f;
    }
  }

  __device__ void add(const SlotRows& slots, int32_t column, float (&sums)[kColumns]) const {
    uint4 words[kCombineSlots];
#pragma unroll
    for (int i = 0; i < kCombineSlots; ++i) {
      if (rows[i] >= 0) words[i] = load_eight(slots.z + rows[i] * slots.z_stride, column);
    }
#pragma unroll
    for (int i = 0; i < kCombineSlots; ++i) {
      if (rows[i] >= 0) add_weighted(words[i], weights[i], sums);
    }
  }
};

__device__ void add_shared(const CombineParams& p, int64_t token, int32_t column, float (&sums)[kColumns]) {
  if (p.shared_z == nullptr) return;
  const float weight = p.shared_weights != nullptr ? p.shared_weights[token] : 1.0f;
  add_weighted(load_eight(p.shared_z + token * p.shared_stride, column), weight, sums);
}

__device__ int32_t column_of_thread() {
  return static_cast<int32_t>(blockIdx.y * kCombineThreads + threadIdx.x);
}

template <class Out>
__global__ void __launch_bounds__(kCombineThreads)
    combine_rows(const __grid_constant__ CombineParams p, Out* y, int64_t y_stride) {
  start_after_previous();
  const int32_t column = column_of_thread();
  if (column >= p.columns) return;
  for (int64_t token = blockIdx.x; token < p.tokens; token += gridDim.x) {
    float sums[kColumns] = {};
    add_slots<kCombineSlots>(p.slots, token, column, sums);
    add_shared(p, token, column, sums);
    store_row(y + token * y_stride + int64_t{column} * kColumns, sums);
  }
}

/// For so few tokens that most blocks wait at once, each for its own: what they may, they read meanwhile.
template <class Out>
__global__ void __launch_bounds__(kCombineThreads)
    combine_few_rows(const __grid_constant__ CombineParams p, Out* y, int64_t y_stride) {
  const int64_t token = blockIdx.x;
  const FirstSlots first(p.slots, token);
  start_after_previous();
  const int32_t column = column_of_thread();
  if (column >= p.columns) return;
  float sums[kColumns] = {};
  first.add(p.slots, column, sums);
  add_slots<kCombineSlots>(p.slots, token, column, sums, kCombineSlots);
  add_shared(p, token, column, sums);
  store_row(y + token * y_stride + int64_t{column} * kColumns, sums);
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
      tokens};
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(tokens, kMostTokenBlocks)),
                  static_cast<unsigned>((params.columns + kCombineThreads - 1) / kCombineThreads));
  const bool few =
      args.rows_are_known && int64_t{grid.x} * grid.y <= int64_t{kFewBlocks} * multiprocessor_count();
  std::visit(
      [&](const auto& y) {
        using Out = std::remove_pointer_t<decltype(y.data)>;
        launch_after_previous(few ? "combine_few_rows" : "combine_rows",
                              few ? combine_few_rows<Out> : combine_rows<Out>, grid, kCombineThreads, 0,
                              stream, params, y.data, y.stride);
      },
      args.y);
}

void weigh_shared(MatrixView<const Bf16> x, const float* gate, float* weights, void* stream) {
  if (x.rows == 0) return;
  launch_after_previous("weigh_tokens", weigh_tokens, static_cast<unsigned>(x.rows), kCombineThreads, 0,
                        stream, x.data, x.stride, x.cols, gate, weights);
}

}  // namespace fourfold::cuda
