// Gather, weigh, quantize and decode rows: a block of threads a row, a thread sixteen values.
#include <algorithm>
#include <string>

#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "cuda/stage.h"
#include "fourfold/quantize.h"

namespace fourfold::cuda {
namespace {

/// RowSource for kernels.
struct Source {
  Rows<const Bf16> rows;
  const int32_t* slot_of_row;
  int32_t top_k;
  const float* weights;
  int64_t weight_stride;
};

/// One row of it.
struct SourceRow {
  const Bf16* data;
  float weight;
  bool aligned, weighted;

  __device__ void load(int32_t block, float (&x)[kNvfp4Block]) const {
    load_block(data + int64_t{block} * kNvfp4Block, aligned, x);
    if (!weighted) return;
#pragma unroll
    for (float& value : x) value = static_cast<float>(encode_bf16(weight * value));
  }
};

struct Params {
  Source source;
  const int32_t* group_offsets;
  int32_t groups, blocks;  // sixteens of a row
  ScalePolicy policy;
  const float* expert_scales;
  const float* tensor_amax;
  Rows<Bf16> first, second;
  float* row_scales;
  Rows<Bf16> values;
  Rows<uint8_t> codes, scales, residual_codes, residual_scales;
  float* tapped_row_scales;
};

__device__ SourceRow row_of(const Source& source, int32_t row) {
  if (source.slot_of_row == nullptr) return {source.rows.row(row), 1.0f, source.rows.aligned, false};
  const int32_t slot = source.slot_of_row[row], token = slot / source.top_k;
  const bool weighted = source.weights != nullptr;
  const float weight = weighted ? source.weights[token * source.weight_stride + slot % source.top_k] : 1.0f;
  return {source.rows.row(token), weight, source.rows.aligned, weighted};
}

/// Largest magnitude of a row, the same in every thread.
__device__ float row_amax(const SourceRow& row, int32_t blocks) {
  uint32_t amax = 0;
  for (auto block = static_cast<int32_t>(threadIdx.x); block < blocks;
       block += static_cast<int32_t>(blockDim.x)) {
    float x[kNvfp4Block];
    row.load(block, x);
#pragma unroll
    for (const float value : x) amax = max(amax, magnitude_bits(value));
  }
  return float_from_bits(block_maximum(amax));
}

/// expert_scales of the row's group. All threads look: one of them finds it.
__device__ float expert_scale_of(const Params& p, int32_t row) {
  __shared__ float found;
  for (auto group = static_cast<int32_t>(threadIdx.x); group < p.groups;
       group += static_cast<int32_t>(blockDim.x)) {
    if (p.group_offsets[group] <= row && row < p.group_offsets[group + 1]) found = p.expert_scales[group];
  }
  __syncthreads();
  const float scale = found;
  __syncthreads();
  return scale;
}

template <ActivationFormat kFormat>
__device__ float global_scale_of(const Params& p, const SourceRow& source, int32_t row) {
  if (kFormat == ActivationFormat::kFp8) return dynamic_scale(row_amax(source, p.blocks), kE4m3Max);
  switch (p.policy) {
    case ScalePolicy::kStatic:
    case ScalePolicy::kMaxOverExperts:
      return expert_scale_of(p, row);
    case ScalePolicy::kDynamicTensor:
      return nvfp4_global_scale(*p.tensor_amax);
    case ScalePolicy::kDynamicToken:
      return nvfp4_global_scale(row_amax(source, p.blocks));
  }
  return 1.0f;
}

/// decode_e2m1(encode_e2m1(value)) in a few instructions. Adding 1.5 x 2^23 steps makes the step the unit in
/// the last place, so that the addition rounds, ties to even. NaN gives 6, as kE2m1NanCode has it.
__device__ float round_to_e2m1(float value) {
  const float magnitude = fminf(fabsf(value), kE2m1Max);
  const float anchor = magnitude < 2.0f ? 0x1.8p22f : magnitude < 4.0f ? 0x1.8p23f : 0x1.8p24f;
  return copysignf(__fsub_rn(__fadd_rn(magnitude, anchor), anchor), value);
}

/// As quantize_nvfp4_block, but codes become the values that they stand for.
__device__ uint8_t round_block(const float (&x)[kNvfp4Block], float global, float (&rounded)[kNvfp4Block]) {
  float amax = 0.0f;
#pragma unroll
  for (const float value : x) amax = max_magnitude(amax, value);
  const uint8_t scale = nvfp4_block_scale(amax, global, false);
  const float reciprocal = nvfp4_reciprocal(scale, global);
#pragma unroll
  for (int i = 0; i < kNvfp4Block; ++i) rounded[i] = round_to_e2m1(__fmul_rn(x[i], reciprocal));
  return scale;
}

/// Codes and scale of block `index`, where they are asked for.
__device__ void store_codes(const float (&rounded)[kNvfp4Block], uint8_t scale, int32_t row, int32_t index,
                            const Rows<uint8_t>& codes, const Rows<uint8_t>& scales) {
  if (scales.data != nullptr) scales.row(row)[index] = scale;
  if (codes.data == nullptr) return;
  uint8_t* to = codes.row(row) + int64_t{index} * (kNvfp4Block / 2);
  const bool nan = scale == kE4m3NanCode;  // then so is every value, of whatever sign
#pragma unroll
  for (int i = 0; i < kNvfp4Block; i += 2) {
    const uint8_t low = encode_e2m1(rounded[i]), high = encode_e2m1(rounded[i + 1]);
    to[i / 2] = static_cast<uint8_t>(nan ? kE2m1NanCode * 0x11 : low | high << 4);
  }
}

/// One NVFP4 term of sixteen values: what it holds -> `decoded` (without the global scale).
__device__ void quantize_block(const float (&x)[kNvfp4Block], float global, int32_t row, int32_t index,
                               const Rows<uint8_t>& codes, const Rows<uint8_t>& scales,
                               float (&decoded)[kNvfp4Block]) {
  const uint8_t scale_code = round_block(x, global, decoded);
  store_codes(decoded, scale_code, row, index, codes, scales);
  const float scale = decode_e4m3(scale_code);
#pragma unroll
  for (float& value : decoded) value = __fmul_rn(value, scale);
}

__device__ void store_decoded(const float (&x)[kNvfp4Block], int32_t row, int32_t index,
                              const Rows<Bf16>& to) {
  if (to.data != nullptr) {
    store_exact_block(x, to.row(row) + int64_t{index} * kNvfp4Block, to.aligned);
  }
}

template <ActivationFormat kFormat>
__device__ void stage_block(const Params& p, float (&x)[kNvfp4Block], float global, int32_t row,
                            int32_t index) {
  if constexpr (kFormat == ActivationFormat::kBf16) {
#pragma unroll
    for (float& value : x) value = static_cast<float>(encode_bf16(value));  // quiets a NaN
    store_decoded(x, row, index, p.first);
    store_decoded(x, row, index, p.values);
  } else if constexpr (kFormat == ActivationFormat::kFp8) {
    const float reciprocal = 1.0f / global;
#pragma unroll
    for (int i = 0; i < kNvfp4Block; ++i) {
      const uint8_t code = encode_e4m3(__fmul_rn(x[i], reciprocal));
      if (p.codes.data != nullptr) p.codes.row(row)[int64_t{index} * kNvfp4Block + i] = code;
      x[i] = decode_e4m3(code);
    }
    store_decoded(x, row, index, p.first);
  } else {
    float decoded[kNvfp4Block];
    quantize_block(x, global, row, index, p.codes, p.scales, decoded);
    store_decoded(decoded, row, index, p.first);
    if constexpr (kFormat == ActivationFormat::kNvfp4x2) {
#pragma unroll
      for (int i = 0; i < kNvfp4Block; ++i) x[i] = __fsub_rn(x[i], __fmul_rn(decoded[i], global));
      quantize_block(x, global, row, index, p.residual_codes, p.residual_scales, decoded);
      store_decoded(decoded, row, index, p.second);
    }
  }
}

/// Blocks of threads that a multiprocessor should hold: as many as registers allow without spilling.
template <ActivationFormat kFormat>
constexpr int kResidentBlocks = kFormat == ActivationFormat::kNvfp4x2 ? 2 : 3;

template <ActivationFormat kFormat>
__global__ void __launch_bounds__(kMostRowThreads, kResidentBlocks<kFormat>)
    stage_rows(const __grid_constant__ Params p) {
  start_after_previous();
  const int32_t rows = p.group_offsets[p.groups];
  for (auto row = static_cast<int32_t>(blockIdx.x); row < rows; row += static_cast<int32_t>(gridDim.x)) {
    const SourceRow source = row_of(p.source, row);
    float global = 1.0f;
    if constexpr (kFormat != ActivationFormat::kBf16) {
      global = global_scale_of<kFormat>(p, source, row);
      if (threadIdx.x == 0) {
        if (p.row_scales != nullptr) p.row_scales[row] = global;
        if (p.tapped_row_scales != nullptr) p.tapped_row_scales[row] = global;
      }
    }
    for (auto block = static_cast<int32_t>(threadIdx.x); block < p.blocks;
         block += static_cast<int32_t>(blockDim.x)) {
      float x[kNvfp4Block];
      source.load(block, x);
      stage_block<kFormat>(p, x, global, row, block);
    }
  }
}

__global__ void __launch_bounds__(kMostRowThreads)
    amax_of_rows(const __grid_constant__ Source source, const int32_t* group_offsets, int32_t groups,
                 int32_t blocks, uint32_t* amax_bits) {
  start_after_previous();
  const int32_t rows = group_offsets[groups];
  uint32_t amax = 0;
  for (auto row = static_cast<int32_t>(blockIdx.x); row < rows; row += static_cast<int32_t>(gridDim.x)) {
    amax = max(amax, float_bits(row_amax(row_of(source, row), blocks)));
  }
  if (threadIdx.x == 0 && amax != 0) atomicMax(amax_bits, amax);
}

[[noreturn]] void reject(const std::string& what, const std::string& expected, int64_t found) {
  throw Error(ErrorCode::kInvalidArgument,
              what + ": expected " + expected + ", found " + std::to_string(found));
}

Source source_of(const RowSource& source, int64_t max_rows) {
  if (source.rows.cols % kNvfp4Block != 0) reject("stage: columns", "a multiple of 16", source.rows.cols);
  if (max_rows > kMostRows) reject("stage: rows", "at most 2^30", max_rows);
  return {Rows<const Bf16>(source.rows), source.slot_of_row, static_cast<int32_t>(source.top_k),
          source.weights.data, source.weights.stride};
}

Params params_of(const StageArgs& args) {
  const StagedActivations& staged = args.staged;
  Params p{};
  p.source = source_of(args.source, args.max_rows);
  p.group_offsets = args.group_offsets.data();
  p.groups = static_cast<int32_t>(args.group_offsets.size()) - 1;
  p.blocks = static_cast<int32_t>(args.source.rows.cols / kNvfp4Block);
  p.policy = args.policy;
  p.expert_scales = args.expert_scales;
  p.tensor_amax = args.tensor_amax;
  p.first = Rows<Bf16>(args.decoded.first);
  p.second = Rows<Bf16>(args.decoded.second);
  p.row_scales = args.decoded.row_scales;
  p.values = Rows<Bf16>(staged.values);
  p.codes = Rows<uint8_t>(staged.codes);
  p.scales = Rows<uint8_t>(staged.scales);
  p.residual_codes = Rows<uint8_t>(staged.residual_codes);
  p.residual_scales = Rows<uint8_t>(staged.residual_scales);
  p.tapped_row_scales = staged.row_scales.data();
  return p;
}

}  // namespace

void stage(const StageArgs& args, void* stream) {
  if (args.max_rows == 0 || args.source.rows.cols == 0) return;
  const Params params = params_of(args);
  const auto launch = [&](auto* kernel) {
    const int64_t cols = args.source.rows.cols;
    launch_after_previous("stage_rows", kernel, row_blocks(args.max_rows, cols), row_threads(cols), 0, stream,
                          params);
  };
  switch (args.format) {
    case ActivationFormat::kNvfp4:
      return launch(stage_rows<ActivationFormat::kNvfp4>);
    case ActivationFormat::kNvfp4x2:
      return launch(stage_rows<ActivationFormat::kNvfp4x2>);
    case ActivationFormat::kFp8:
      return launch(stage_rows<ActivationFormat::kFp8>);
    case ActivationFormat::kBf16:
      return launch(stage_rows<ActivationFormat::kBf16>);
  }
}

void find_amax(const RowSource& source, std::span<const int32_t> group_offsets, int64_t max_rows, float* amax,
               void* stream) {
  if (max_rows == 0 || source.rows.cols == 0) return;
  launch_after_previous("amax_of_rows", amax_of_rows, row_blocks(max_rows, source.rows.cols),
                        row_threads(source.rows.cols), 0, stream, source_of(source, max_rows),
                        group_offsets.data(), static_cast<int32_t>(group_offsets.size()) - 1,
                        static_cast<int32_t>(source.rows.cols / kNvfp4Block),
                        reinterpret_cast<uint32_t*>(amax));
}

}  // namespace fourfold::cuda
