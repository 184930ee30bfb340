// Kernels between and after the GEMMs: a block of threads a row, a thread sixteen columns.
// shapes:   h [M, 2I] or [M, I] -> stacked nvfp4 [terms * M, I]; sums [terms * M, N] -> d [M, N]
// needs:    I a multiple of 16 where it is quantized; GEMM results in 16-byte aligned rows
// numerics: docs/formats.md, section 7: alpha, alpha * sum, + bias each rounded to float32, then to bf16
// oracle:   src/reference/stages.cpp, tests/blackwell_stages_test.cpp
#include <string>
#include <type_traits>
#include <variant>

#include "blackwell/finish_sums.h"
#include "cuda/activate.cuh"
#include "cuda/launch.cuh"
#include "cuda/quantize_rows.cuh"
#include "fourfold/quantize.h"

namespace fourfold::blackwell {
namespace {

using cuda::kMostRowThreads;
using cuda::Rows;

struct FinishParams {
  ActivationFunction function;
  bool gated;
  GemmResult h;
  const int32_t* rows;
  int32_t blocks;  // sixteens of a row
  ScalePolicy policy;
  const float* expert_scales;
  float* tensor_amax;
  cuda::QuantizedRows out;
  float *row_scales, *tapped_row_scales;
  Rows<Bf16> h_tap, activation_tap;
};

/// Sixteen sums of a half, all terms added.
__device__ void load_sums(const GemmResult& sums, const cuda::RowPlace& place, int64_t column,
                          float (&x)[kNvfp4Block]) {
#pragma unroll
  for (int term = 0; term < 2; ++term) {
    if (term >= sums.terms) break;
    const auto* from = static_cast<const float*>(sums.data) + place.stacked[term] * sums.stride + column;
#pragma unroll
    for (int i = 0; i < kNvfp4Block; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      x[i] = term == 0 ? four.x : __fadd_rn(x[i], four.x);
      x[i + 1] = term == 0 ? four.y : __fadd_rn(x[i + 1], four.y);
      x[i + 2] = term == 0 ? four.z : __fadd_rn(x[i + 2], four.z);
      x[i + 3] = term == 0 ? four.w : __fadd_rn(x[i + 3], four.w);
    }
  }
}

/// One rounding for alpha, one for alpha times the sum, one for the bias.
__device__ float apply_alpha(const GemmResult& sums, int32_t expert, int32_t half, float row_scale, float sum,
                             int64_t column) {
  const float alpha = __fmul_rn(row_scale, sums.globals[expert * sums.halves + half]);
  const float value = __fmul_rn(alpha, sum);
  if (sums.bias == nullptr) return value;
  return __fadd_rn(value, sums.bias[(int64_t{expert} * sums.halves + half) * sums.columns + column]);
}

__device__ float row_scale_of(const GemmResult& sums, int32_t row) {
  return sums.row_scales != nullptr ? sums.row_scales[row] : 1.0f;
}

/// Sixteen values of h, as bf16 holds them.
__device__ void load_h(const FinishParams& p, const cuda::RowPlace& place, int32_t row, int32_t half,
                       int32_t block, float (&x)[kNvfp4Block]) {
  const int64_t column = int64_t{block} * kNvfp4Block, first = half * p.h.columns + column;
  if (!p.h.is_float32) {
    cuda::load_block(static_cast<const Bf16*>(p.h.data) + row * p.h.stride + first, true, x);
    return;
  }
  load_sums(p.h, place, first, x);
  const float row_scale = row_scale_of(p.h, row);
#pragma unroll
  for (int i = 0; i < kNvfp4Block; ++i) {
    x[i] = static_cast<float>(encode_bf16(apply_alpha(p.h, place.expert, half, row_scale, x[i], column + i)));
  }
}

/// Sixteen values of the activation, as bf16 holds them. `tap`: h and they go where they are wanted.
__device__ void load_activation(const FinishParams& p, const cuda::RowPlace& place, int32_t row,
                                int32_t block, bool tap, float (&x)[kNvfp4Block]) {
  float up[kNvfp4Block];
  load_h(p, place, row, 0, block, x);  // gate, where there is one
  if (p.gated) load_h(p, place, row, 1, block, up);
  if (tap && p.h_tap.data != nullptr) {
    Bf16* to = p.h_tap.row(row) + int64_t{block} * kNvfp4Block;
    cuda::store_exact_block(x, to, p.h_tap.aligned);
    if (p.gated) cuda::store_exact_block(up, to + p.h.columns, p.h_tap.aligned && p.h.columns % 8 == 0);
  }
#pragma unroll
  for (int i = 0; i < kNvfp4Block; ++i) {
    x[i] = static_cast<float>(encode_bf16(cuda::activate(p.function, x[i], p.gated ? up[i] : x[i])));
  }
  if (tap) cuda::store_exact(x, row, block, p.activation_tap);
}

/// Largest magnitude of a row of the activation, the same in every thread.
__device__ float activation_amax(const FinishParams& p, const cuda::RowPlace& place, int32_t row) {
  uint32_t amax = 0;
  for (auto block = static_cast<int32_t>(threadIdx.x); block < p.blocks;
       block += static_cast<int32_t>(blockDim.x)) {
    float x[kNvfp4Block];
    load_activation(p, place, row, block, false, x);
#pragma unroll
    for (const float value : x) amax = max(amax, cuda::magnitude_bits(value));
  }
  return float_from_bits(cuda::block_maximum(amax));
}

__device__ float global_scale_of(const FinishParams& p, const cuda::RowPlace& place, int32_t row) {
  switch (p.policy) {
    case ScalePolicy::kStatic:
    case ScalePolicy::kMaxOverExperts:
      return p.expert_scales[place.expert];
    case ScalePolicy::kDynamicTensor:
      return nvfp4_global_scale(*p.tensor_amax);
    case ScalePolicy::kDynamicToken:
      return nvfp4_global_scale(activation_amax(p, place, row));
  }
  return 1.0f;
}

template <bool kTwoTerms>
__global__ void __launch_bounds__(kMostRowThreads) activate_kernel(const __grid_constant__ FinishParams p) {
  cuda::start_after_previous();
  const int32_t rows = *p.rows;
  for (auto row = static_cast<int32_t>(blockIdx.x); row < rows; row += static_cast<int32_t>(gridDim.x)) {
    const cuda::RowPlace place = p.h.places[row];
    const float global = global_scale_of(p, place, row);
    if (threadIdx.x == 0) {
      if (p.row_scales != nullptr) p.row_scales[row] = global;
      if (p.tapped_row_scales != nullptr) p.tapped_row_scales[row] = global;
    }
    for (auto block = static_cast<int32_t>(threadIdx.x); block < p.blocks;
         block += static_cast<int32_t>(blockDim.x)) {
      float x[kNvfp4Block];
      load_activation(p, place, row, block, true, x);
      cuda::quantize_block<kTwoTerms, cuda::CodesWanted::kStacked>(x, cuda::sixth_of_largest(x), global, row,
                                                                   block, place, p.out);
    }
  }
}

__global__ void __launch_bounds__(kMostRowThreads)
    activation_amax_kernel(const __grid_constant__ FinishParams p) {
  cuda::start_after_previous();
  const int32_t rows = *p.rows;
  uint32_t amax = 0;
  for (auto row = static_cast<int32_t>(blockIdx.x); row < rows; row += static_cast<int32_t>(gridDim.x)) {
    amax = max(amax, float_bits(activation_amax(p, p.h.places[row], row)));
  }
  if (threadIdx.x == 0 && amax != 0) atomicMax(reinterpret_cast<uint32_t*>(p.tensor_amax), amax);
}

FinishParams params_of(const ActivateRows& args) {
  FinishParams p{};
  p.function = args.function;
  p.gated = is_gated(args.function.kind);
  p.h = args.h;
  p.rows = args.rows;
  p.blocks = static_cast<int32_t>(args.h.columns / kNvfp4Block);
  p.policy = args.policy;
  p.expert_scales = args.expert_scales;
  p.tensor_amax = args.tensor_amax;
  const StagedActivations& tap = args.staged_tap;
  p.out = {{},
           {},
           Rows<uint8_t>(tap.codes),
           Rows<uint8_t>(tap.scales),
           Rows<uint8_t>(tap.residual_codes),
           Rows<uint8_t>(tap.residual_scales),
           args.stacked};
  p.row_scales = args.row_scales;
  p.tapped_row_scales = tap.row_scales.data();
  p.h_tap = Rows<Bf16>(args.h_tap);
  p.activation_tap = Rows<Bf16>(args.activation_tap);
  return p;
}

/// A block of threads a row, one column after another: d may have any alignment.
template <class Out>
__global__ void __launch_bounds__(kMostRowThreads)
    finish_kernel(const __grid_constant__ GemmResult sums, const int32_t* row_count, int64_t columns, Out* d,
                  int64_t d_stride) {
  cuda::start_after_previous();
  const int32_t rows = *row_count;
  for (auto row = static_cast<int32_t>(blockIdx.x); row < rows; row += static_cast<int32_t>(gridDim.x)) {
    const cuda::RowPlace place = sums.places[row];
    const float row_scale = row_scale_of(sums, row);
    const auto* first = static_cast<const float*>(sums.data) + place.stacked[0] * sums.stride;
    const auto* second = static_cast<const float*>(sums.data) + place.stacked[1] * sums.stride;
    for (int64_t column = threadIdx.x; column < columns; column += blockDim.x) {
      const float sum = sums.terms == 2 ? __fadd_rn(first[column], second[column]) : first[column];
      const float value = apply_alpha(sums, place.expert, 0, row_scale, sum, column);
      if constexpr (std::is_same_v<Out, Bf16>) {
        d[row * d_stride + column] = encode_bf16(value);
      } else {
        d[row * d_stride + column] = value;
      }
    }
  }
}

}  // namespace

void activate_rows(const ActivateRows& args, void* stream) {
  if (args.max_rows == 0 || args.h.columns == 0) return;
  const auto kernel =
      args.format == ActivationFormat::kNvfp4x2 ? activate_kernel<true> : activate_kernel<false>;
  cuda::launch_after_previous("activate_kernel", kernel, cuda::row_blocks(args.max_rows, args.h.columns),
                              cuda::row_threads(args.h.columns), 0, stream, params_of(args));
}

void find_activation_amax(const ActivateRows& args, void* stream) {
  if (args.max_rows == 0 || args.h.columns == 0) return;
  cuda::launch_after_previous("activation_amax_kernel", activation_amax_kernel,
                              cuda::row_blocks(args.max_rows, args.h.columns),
                              cuda::row_threads(args.h.columns), 0, stream, params_of(args));
}

void finish_rows(const GemmResult& sums, const int32_t* rows, int64_t max_rows, const OutputView& d,
                 void* stream) {
  std::visit(
      [&](const auto& to) {
        using Out = std::remove_pointer_t<decltype(to.data)>;
        if (max_rows == 0 || to.cols == 0) return;
        cuda::launch_after_previous("finish_kernel", finish_kernel<Out>, cuda::row_blocks(max_rows, to.cols),
                                    cuda::row_threads(to.cols), 0, stream, sums, rows, to.cols, to.data,
                                    to.stride);
      },
      d);
}

}  // namespace fourfold::blackwell
