// One block an expert and output column: its weight row is decoded into shared memory, a piece at a time, and
// every warp multiplies it with sampled rows of the expert.
#include "cuda/naive_multiply.h"

#include <algorithm>

#include "cuda/check.cuh"

namespace fourfold::cuda {
namespace {

constexpr int kMultiplyThreads = 256, kWarps = kMultiplyThreads / 32;
constexpr int kPiece = 2048;  // values of a weight row in shared memory

/// A block-scaled matrix on the device.
struct DeviceMatrix {
  const uint8_t* codes;
  const uint8_t* scales;
  int64_t code_stride, scale_stride;  // bytes between rows
  float global;
};

/// Sampled rows [first, last) of one expert. `matrices` are gate and up, or down twice.
struct ExpertRange {
  DeviceMatrix matrices[2];
  int64_t first, last;
};

struct MultiplyArgs {
  const ExpertRange* ranges;
  const float* values;  // [terms, rows, depth]
  const float* row_scales;
  const int64_t* columns;
  double* sums;  // [rows, columns], of the pieces so far
  float* out;    // [rows, columns]
  int64_t rows, depth, column_count;
  int64_t rows_a_half;  // columns from here on are those of matrices[1]
  int terms;
};

__device__ double warp_sum(double value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  return value;
}

__global__ void __launch_bounds__(kMultiplyThreads) multiply_kernel(MultiplyArgs args) {
  __shared__ float weights[kPiece];
  const ExpertRange& range = args.ranges[blockIdx.y];
  const int64_t column = args.columns[blockIdx.x];
  const int half = column >= args.rows_a_half;
  const DeviceMatrix& matrix = range.matrices[half];
  const int64_t weight_row = column - half * args.rows_a_half;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t piece = 0; piece < args.depth; piece += kPiece) {
    const int64_t count = min(int64_t{kPiece}, args.depth - piece);
    for (int64_t i = threadIdx.x; i < count; i += kMultiplyThreads) {
      const int64_t k = piece + i;
      const uint8_t byte = matrix.codes[weight_row * matrix.code_stride + k / 2];
      const uint8_t scale = matrix.scales[weight_row * matrix.scale_stride + k / 16];
      weights[i] = decode_e2m1(static_cast<uint8_t>(byte >> (4 * (k % 2)) & 15)) * decode_e4m3(scale);
    }
    __syncthreads();
    for (int64_t row = range.first + warp; row < range.last; row += kWarps) {
      double sum = 0.0;
      for (int term = 0; term < args.terms; ++term) {
        const float* values = args.values + (term * args.rows + row) * args.depth + piece;
        for (int64_t i = lane; i < count; i += 32) sum += double{values[i]} * double{weights[i]};
      }
      sum = warp_sum(sum);
      if (lane != 0) continue;
      const int64_t at = row * args.column_count + blockIdx.x;
      if (piece > 0) sum += args.sums[at];
      args.sums[at] = sum;
      if (piece + count == args.depth) {
        const float alpha = __fmul_rn(args.row_scales[row], matrix.global);
        args.out[at] = __fmul_rn(alpha, static_cast<float>(sum));
      }
    }
    __syncthreads();
  }
}

[[noreturn]] void refuse(const Expert& expert, const std::string& found) {
  throw Error(ErrorCode::kUnsupported, expert.name +
                                           ": expected gate, up and down in NVFP4 with row-major scales and "
                                           "without biases, for the float64 oracle; found " +
                                           found);
}

DeviceMatrix device_matrix(const Expert& expert, const WeightView& weight, Device device) {
  const auto* blocks = std::get_if<BlockScaledView>(&weight);
  if (blocks == nullptr || blocks->format != QuantFormat::kNvfp4)
    refuse(expert, std::string(format_name(weight)));
  if (blocks->scale_layout != ScaleLayout::kRowMajor) refuse(expert, "swizzled scales");
  if (!(device_of(weight) == device)) refuse(expert, "weights on another device");
  return {blocks->codes.data, blocks->scales, blocks->codes.stride, blocks->scale_stride,
          blocks->global.multiplier()};
}

std::vector<ExpertRange> ranges_of_experts(const ExpertWeights& weights, ExpertGemm gemm,
                                           const SampledRows& rows, Device device) {
  std::vector<ExpertRange> ranges;
  for (int64_t row = 0; row < rows.rows; ++row) {
    const auto index = static_cast<size_t>(row);
    if (row == 0 || rows.expert_of[index] != rows.expert_of[index - 1]) {
      const Expert& expert = weights.experts[static_cast<size_t>(rows.expert_of[index])];
      if (!expert.has_gate()) refuse(expert, "no gate");
      if (expert.gate_bias || expert.up_bias || expert.down_bias) refuse(expert, "a bias");
      const WeightView& first = gemm == ExpertGemm::kDown ? expert.down : expert.gate;
      const WeightView& second = gemm == ExpertGemm::kDown ? expert.down : expert.up;
      ranges.push_back(
          {{device_matrix(expert, first, device), device_matrix(expert, second, device)}, row, row});
    }
    ranges.back().last = row + 1;
  }
  return ranges;
}

template <class T>
Buffer upload(const Memory& memory, const T* values, size_t count) {
  Buffer buffer = memory.allocate(count * sizeof(T));
  memory.copy_from_host(buffer.data(), values, count * sizeof(T));
  return buffer;
}

}  // namespace

std::vector<float> multiply_sampled(const Memory& memory, const ExpertWeights& weights, ExpertGemm gemm,
                                    const SampledRows& rows, std::span<const int64_t> columns) {
  std::vector<float> out(static_cast<size_t>(rows.rows) * columns.size());
  if (out.empty()) return out;
  const std::vector<ExpertRange> ranges = ranges_of_experts(weights, gemm, rows, memory.device());
  const Buffer device_ranges = upload(memory, ranges.data(), ranges.size()),
               values = upload(memory, rows.values.data(), rows.values.size()),
               row_scales = upload(memory, rows.row_scales.data(), rows.row_scales.size()),
               device_columns = upload(memory, columns.data(), columns.size()),
               sums = memory.allocate(out.size() * sizeof(double)),
               device_out = memory.allocate(out.size() * sizeof(float));
  MultiplyArgs args{};
  args.ranges = reinterpret_cast<const ExpertRange*>(device_ranges.data());
  args.values = reinterpret_cast<const float*>(values.data());
  args.row_scales = reinterpret_cast<const float*>(row_scales.data());
  args.columns = reinterpret_cast<const int64_t*>(device_columns.data());
  args.sums = reinterpret_cast<double*>(sums.data());
  args.out = reinterpret_cast<float*>(device_out.data());
  args.rows = rows.rows;
  args.depth = rows.depth;
  args.column_count = static_cast<int64_t>(columns.size());
  args.rows_a_half = gemm == ExpertGemm::kDown ? weights.hidden : weights.intermediate;
  args.terms = rows.terms;
  const dim3 grid(static_cast<unsigned>(columns.size()), static_cast<unsigned>(ranges.size()));
  multiply_kernel<<<grid, kMultiplyThreads>>>(args);
  check_launch("multiply_kernel");
  memory.synchronize();
  memory.copy_to_host(out.data(), device_out.data(), out.size() * sizeof(float));
  return out;
}

}  // namespace fourfold::cuda
