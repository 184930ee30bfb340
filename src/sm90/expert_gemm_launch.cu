// launch_expert_gemm(s): tensor maps, the launches of the plan, and the activation where it is a kernel of
// its own.
#include <cuda.h>
#include <cuda_runtime.h>

#include <string>

#include "cuda/check.cuh"
#include "cuda/device.h"
#include "sm90/activate_rows.h"
#include "sm90/expert_gemm.h"
#include "sm90/expert_gemm_checks.h"
#include "sm90/gemm_launch.cuh"

namespace fourfold::sm90 {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

/// The driver's encoder, found at run time so that nothing links against the driver.
EncodeTiled encoder() {
  static const EncodeTiled function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    cuda::check(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
        "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess || entry == nullptr) {
      throw Error(ErrorCode::kDevice,
                  "the CUDA driver has no cuTensorMapEncodeTiled; expected a driver of CUDA 12.0 or later");
    }
    return reinterpret_cast<EncodeTiled>(entry);
  }();
  return function;
}

/// Boxes of 64 k x `box_rows` x `box_units` of a token matrix; what lies outside the matrix reads as zero.
CUtensorMap token_map(MatrixView<const Bf16> tokens, int box_rows, int box_units) {
  CUtensorMap map;
  const bool by_unit = box_units > 1;
  const auto columns = static_cast<cuuint64_t>(tokens.cols);
  const cuuint64_t extent[3] = {by_unit ? kUnitDepth : columns, static_cast<cuuint64_t>(tokens.rows),
                                by_unit ? columns / kUnitDepth : 1};
  const cuuint64_t stride[2] = {static_cast<cuuint64_t>(tokens.stride) * 2, kUnitDepth * 2};
  const cuuint32_t box[3] = {kUnitDepth, static_cast<cuuint32_t>(box_rows),
                             static_cast<cuuint32_t>(box_units)};
  const cuuint32_t step[3] = {1, 1, 1};
  const CUresult result =
      encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<Bf16*>(tokens.data), extent, stride,
                box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw Error(ErrorCode::kDevice, "cuTensorMapEncodeTiled refused token rows [" +
                                        std::to_string(tokens.rows) + ", " + std::to_string(tokens.cols) +
                                        "] of stride " + std::to_string(tokens.stride) + ": CUresult " +
                                        std::to_string(static_cast<int>(result)));
  }
  return map;
}

GemmKernelArgs kernel_args(const ExpertGemm& args) {
  GemmKernelArgs kernel{};
  kernel.packed = reinterpret_cast<const uint8_t*>(args.packed);
  kernel.packed_bytes_per_expert = args.weights.bytes();
  kernel.experts = static_cast<int32_t>(args.experts);
  kernel.row_blocks = static_cast<int32_t>(args.weights.row_blocks());
  kernel.depth_units = static_cast<int32_t>(args.weights.depth_units());
  kernel.channels = static_cast<int32_t>(args.weights.channels);
  kernel.paired = args.weights.order == RowOrder::kGateUpPaired;
  kernel.group_offsets = args.group_offsets;
  kernel.row_scales = args.row_scales;
  kernel.weight_globals = args.weight_globals;
  kernel.bias = args.bias;
  return kernel;
}

GatheredTokens gathered_tokens(const ExpertGemm& args) {
  const MatrixView<const Bf16>& rows = args.tokens[0];
  return {rows.data, rows.stride, static_cast<int32_t>(rows.cols), args.slot_of_row,
          static_cast<int32_t>(args.top_k)};
}

void write_bf16(GemmKernelArgs& kernel, MatrixView<Bf16> d) {
  kernel.d = d.data;
  kernel.d_stride = d.stride;
}

/// Where h goes: the tap, or else the workspace.
MatrixView<Bf16> h_rows(const ExpertGemm& args) {
  if (!args.h.empty()) return args.h;
  const int64_t columns = args.weights.rows();
  return {reinterpret_cast<Bf16*>(args.workspace.data()), args.max_rows, columns};
}

TokenMaps token_maps(const ExpertGemm& args, const GemmKernelShape& shape) {
  const int terms = args.tokens[1].empty() ? 1 : 2, stage_units = shape.stage_units(terms);
  const int granule = box_granule(shape.tokens, shape.granule);
  TokenMaps maps;
  maps.stage_in_a_box = stage_units > 1 && args.weights.depth % kUnitDepth == 0;
  for (int term = 0; term < terms; ++term) {
    for (int rows = granule; rows <= shape.tokens; rows += granule) {
      maps.of[term][rows / granule - 1] =
          token_map(args.tokens[term], rows, maps.stage_in_a_box ? stage_units : 1);
    }
  }
  return maps;
}

/// What becomes of the sums.
void set_outputs(const ExpertGemm& args, GemmLaunch& launch) {
  GemmKernelArgs& kernel = launch.args;
  const auto* d = std::get_if<MatrixView<Bf16>>(&args.d);
  if (needs_own_activation(args)) {
    const MatrixView<Bf16> h = h_rows(args);
    if (!kernel.paired) return write_bf16(kernel, h);
    kernel.h = h.data;
    kernel.h_stride = h.stride;
  } else if (args.activation) {
    write_bf16(kernel, *d);
    kernel.h = args.h.data;
    kernel.h_stride = args.h.stride;
    kernel.requantize_scales = args.requantize.expert_scales;
    kernel.residual = args.requantize.residual.data;
    kernel.d_row_scales = args.requantize.row_scales;
    kernel.swiglu = swiglu_args(*args.activation);
  } else if (d != nullptr) {
    write_bf16(kernel, *d);
  } else {
    const auto& wide = std::get<MatrixView<float>>(args.d);
    kernel.d = wide.data;
    kernel.d_stride = wide.stride;
    kernel.d_is_float32 = true;
  }
}

void run_kernel(GemmKernel kernel, const GemmLaunch& launch) {
  switch (kernel) {
    case GemmKernel::kFew:
      return launch_few_gemm(launch);
    case GemmKernel::kNarrow:
      return launch_narrow_gemm(launch);
    case GemmKernel::kMedium:
      return launch_medium_gemm(launch);
    case GemmKernel::kBroad:
      return launch_broad_gemm(launch);
    case GemmKernel::kWide:
      return launch_wide_gemm(launch);
  }
}

/// A launch of the GEMM, but for what its plan says.
GemmLaunch launch_of(const ExpertGemm& args, void* stream) {
  GemmLaunch launch;
  launch.args = kernel_args(args);
  launch.terms = args.tokens[1].empty() ? 1 : 2;
  launch.overlap_previous = args.overlap_previous;
  launch.multiprocessors = cuda::multiprocessor_count();
  launch.stream = cuda::as_stream(stream);
  launch.args.gathers = args.slot_of_row != nullptr;
  if (launch.args.gathers) launch.args.gathered = gathered_tokens(args);
  set_outputs(args, launch);
  return launch;
}

void run_plan(const ExpertGemm& args, GemmLaunch& launch) {
  const GemmPlan plan = planned_launches(args);
  for (int i = 0; i < plan.count; ++i) {
    const GemmPart& part = plan.parts[static_cast<size_t>(i)];
    launch.args.band = part.band;
    if (args.tickets != nullptr) launch.args.tickets = args.tickets + i;
    if (!launch.args.gathers) launch.maps = token_maps(args, shape_of(part.kernel));
    run_kernel(part.kernel, launch);
    launch.overlap_previous = launch.args.waits_at_end = true;
  }
}

}  // namespace

void launch_expert_gemm(const ExpertGemm& args, void* stream) {
  validate(args);
  if (args.max_rows == 0) return;
  GemmLaunch launch = launch_of(args, stream);
  run_plan(args, launch);
  if (needs_own_activation(args)) {
    const auto& d = std::get<MatrixView<Bf16>>(args.d);
    launch_activate_rows({*args.activation, h_rows(args), d, args.group_offsets + args.experts}, stream);
  }
}

void launch_expert_gemms(const ExpertGemm& first, const ExpertGemm& second, int32_t* progress, void* stream) {
  validate(first, second, progress);
  if (first.max_rows == 0) return;
  GemmLaunch launch = launch_of(first, stream), next = launch_of(second, stream);
  launch.args.progress = progress;
  next.args.awaited = progress;
  next.args.awaited_row_blocks = launch.args.row_blocks;
  next.overlap_previous = next.args.waits_at_end = true;
  run_plan(first, launch);
  run_plan(second, next);
}

}  // namespace fourfold::sm90
