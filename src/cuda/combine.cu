// Combine: a thread eight columns of a token.
#include <algorithm>
#include <string>

#include "cuda/combine.h"
#include "cuda/launch.cuh"

namespace fourfold::cuda {
namespace {

constexpr int kColumns = 8;  // a 16-byte load of bf16
constexpr int kThreads = 128;
constexpr int kSlotsAtOnce = 4;                  // loads in flight; sums still run over k in order
constexpr unsigned kMostTokenBlocks = 1u << 20;  // more tokens are taken in turn

struct Params {
  const Bf16* z;
  int64_t z_stride;
  const int32_t* row_of_slot;
  const float* weights;  // null: all 1
  int64_t weight_stride;
  int32_t top_k, columns;  // columns in eights
  int64_t tokens;
};

__device__ void store_row(float* y, const float (&sums)[kColumns]) {
#pragma unroll
  for (int i = 0; i < kColumns; ++i) y[i] = sums[i];
}

__device__ void store_row(Bf16* y, const float (&sums)[kColumns]) {
  if (reinterpret_cast<uintptr_t>(y) % 16 != 0) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) y[i] = encode_bf16(sums[i]);
    return;
  }
  uint32_t words[kColumns / 2];
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) {
    words[i] = encode_bf16(sums[2 * i]).bits | uint32_t{encode_bf16(sums[2 * i + 1]).bits} << 16;
  }
  *reinterpret_cast<uint4*>(y) = make_uint4(words[0], words[1], words[2], words[3]);
}

/// Slots [first, first + kSlotsAtOnce) of a token, as far as there are.
__device__ void add_slots(const Params& p, int64_t token, int32_t first, int32_t column,
                          float (&sums)[kColumns]) {
  uint4 words[kSlotsAtOnce];
  int32_t rows[kSlotsAtOnce];
#pragma unroll
  for (int i = 0; i < kSlotsAtOnce; ++i) {
    rows[i] = first + i < p.top_k ? p.row_of_slot[token * p.top_k + first + i] : -1;
    if (rows[i] >= 0) {
      words[i] = *reinterpret_cast<const uint4*>(p.z + rows[i] * p.z_stride + int64_t{column} * kColumns);
    }
  }
#pragma unroll
  for (int i = 0; i < kSlotsAtOnce; ++i) {
    if (rows[i] < 0) continue;
    const float weight = p.weights != nullptr ? p.weights[token * p.weight_stride + first + i] : 1.0f;
    const uint32_t word[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const float low = float_from_bits(word[pair] << 16), high = float_from_bits(word[pair] & 0xFFFF0000u);
      sums[2 * pair] = __fadd_rn(sums[2 * pair], __fmul_rn(weight, low));
      sums[2 * pair + 1] = __fadd_rn(sums[2 * pair + 1], __fmul_rn(weight, high));
    }
  }
}

template <class Out>
__global__ void __launch_bounds__(kThreads)
    combine_rows(const __grid_constant__ Params p, Out* y, int64_t y_stride) {
  start_after_previous();
  const auto column = static_cast<int32_t>(blockIdx.y * kThreads + threadIdx.x);
  if (column >= p.columns) return;
  for (int64_t token = blockIdx.x; token < p.tokens; token += gridDim.x) {
    float sums[kColumns] = {};
    for (int32_t first = 0; first < p.top_k; first += kSlotsAtOnce) add_slots(p, token, first, column, sums);
    store_row(y + token * y_stride + int64_t{column} * kColumns, sums);
  }
}

}  // namespace

void combine(const CombineArgs& args, void* stream) {
  const int64_t tokens = args.topk_weights.rows, hidden = args.z.cols;
  if (tokens == 0 || hidden == 0) return;
  if (hidden % kColumns != 0 || args.z.stride % kColumns != 0 ||
      reinterpret_cast<uintptr_t>(args.z.data) % 16 != 0) {
    throw Error(
        ErrorCode::kInvalidArgument,
        "combine: z: expected H and stride in multiples of 8 and a 16-byte aligned address, found H " +
            std::to_string(hidden) + ", stride " + std::to_string(args.z.stride));
  }
  const Params params{args.z.data,
                      args.z.stride,
                      args.row_of_slot,
                      args.weight_on_input ? nullptr : args.topk_weights.data,
                      args.topk_weights.stride,
                      static_cast<int32_t>(args.topk_weights.cols),
                      static_cast<int32_t>(hidden / kColumns),
                      tokens};
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(tokens, kMostTokenBlocks)),
                  static_cast<unsigned>((params.columns + kThreads - 1) / kThreads));
  std::visit(
      [&](const auto& y) {
        using Out = std::remove_pointer_t<decltype(y.data)>;
        launch_after_previous("combine_rows", combine_rows<Out>, grid, kThreads, 0, stream, params, y.data,
                              y.stride);
      },
      args.y);
}

}  // namespace fourfold::cuda
