// Prepare the weights, stack the activations, multiply to float32, round.
#include "blackwell/standalone_gemm.h"

#include <array>
#include <vector>

#include "base/fail.h"
#include "blackwell/activation_support.h"
#include "blackwell/block_weights.h"
#include "blackwell/finish_sums.h"
#include "blackwell/group_arrays.h"
#include "cuda/device.h"
#include "moe/workspace.h"

namespace fourfold::blackwell {
namespace {

struct Space {
  std::span<uint8_t> weights;
  std::span<float> globals;
  std::span<int32_t> one_group;  // offsets of a dense GEMM
  std::span<std::byte> arrays;
  std::span<cuda::RowPlace> places;
  std::span<uint8_t> codes, scales;
  std::span<float> row_scales;
  MatrixView<float> sums;
  std::span<std::byte> gemm;
};

int64_t groups_of(const GroupedGemmArgs& args) {
  return static_cast<int64_t>(args.b.size());
}
BlockShape shape_of(const GroupedGemmArgs& args) {
  return {args.b.empty() ? 0 : rows_of(args.b.front()), args.a.cols};
}
int32_t terms_of(const GroupedGemmArgs& args) {
  return args.a.format == ActivationFormat::kNvfp4x2 ? 2 : 1;
}

Space carve(WorkspaceCarver& carver, const GemmKernels& kernels, const GroupedGemmArgs& args) {
  const int64_t groups = groups_of(args), rows = args.a.rows, stacked_rows = rows * terms_of(args);
  const BlockShape shape = shape_of(args);
  Space space;
  space.weights = carver.take<uint8_t>(groups * expert_bytes(shape, 1));
  space.globals = carver.take<float>(groups);
  space.one_group = carver.take<int32_t>(2);
  space.arrays = carver.take<std::byte>(static_cast<int64_t>(group_arrays_bytes(groups)));
  space.places = carver.take<cuda::RowPlace>(rows);
  space.codes = carver.take<uint8_t>(stacked_rows * shape.padded_depth() / 2);
  space.scales = carver.take<uint8_t>(most_scale_bytes(rows, terms_of(args), groups, shape.padded_depth()));
  space.row_scales = carver.take<float>(rows);
  space.sums = carver.take<float>(stacked_rows, shape.padded_rows());
  space.gemm = carver.take<std::byte>(static_cast<int64_t>(
      kernels.to_float32.workspace_bytes(static_cast<int32_t>(groups), cuda::multiprocessor_count())));
  return space;
}

void prepare_weights(const GroupedGemmArgs& args, const Space& space) {
  const BlockShape shape = shape_of(args);
  std::vector<float> globals;
  uint8_t* next = space.weights.data();
  for (const WeightView& weight : args.b) {
    const auto* blocks = std::get_if<BlockScaledView>(&weight);
    if (blocks == nullptr || blocks->format != QuantFormat::kNvfp4) {
      fail(ErrorCode::kUnsupported, "blackwell: gemm: weights: expected nvfp4, found {}",
           format_name(weight));
    }
    launch_block_weights(*blocks, shape, next, next + shape.code_bytes(), args.stream);
    next += expert_bytes(shape, 1);
    globals.push_back(blocks->global.multiplier());
  }
  cuda::write_words_async(space.globals.data(), globals.data(), static_cast<int64_t>(globals.size()),
                          args.stream);
}

StackedGemm stacked_gemm(const GroupedGemmArgs& args, const Space& space) {
  const BlockShape shape = shape_of(args);
  StackedGemm gemm;
  gemm.n = shape.padded_rows();
  gemm.k = shape.padded_depth();
  gemm.a_codes = space.codes.data();
  gemm.a_scales = space.scales.data();
  gemm.b_codes = space.weights.data();
  gemm.b_scales = space.weights.data() + shape.code_bytes();
  gemm.b_expert_bytes = expert_bytes(shape, 1);
  gemm.d = space.sums.data;
  gemm.d_element_bytes = sizeof(float);
  gemm.d_row_bytes = space.sums.stride * gemm.d_element_bytes;
  return gemm;
}

GemmResult result_of(const GroupedGemmArgs& args, const Space& space) {
  GemmResult result;
  result.data = space.sums.data;
  result.stride = space.sums.stride;
  result.is_float32 = true;
  result.terms = terms_of(args);
  result.columns = space.sums.cols;
  result.places = space.places.data();
  result.row_scales = space.row_scales.data();
  result.globals = space.globals.data();
  return result;
}

void require_supported(const GemmKernels& kernels, const GroupedGemmArgs& args) {
  if (args.accumulation == Accumulation::kFloat64) {
    fail(ErrorCode::kUnsupported,
         "blackwell: gemm: expected float32 sums, found float64, which are for the reference");
  }
  const std::string reason = why_not_activations(args.a.format);
  if (!reason.empty()) fail(ErrorCode::kUnsupported, "blackwell: gemm: {}", reason);
  const size_t bytes = grouped_gemm_workspace_bytes(kernels, args);
  if (args.workspace.size() < bytes ||
      reinterpret_cast<uintptr_t>(args.workspace.data()) % kWorkspaceAlignment) {
    reject("blackwell: gemm: workspace",
           fmt::format("{} bytes at a multiple of {}", bytes, kWorkspaceAlignment),
           fmt::format("{} bytes", args.workspace.size()));
  }
}

/// `dense`: all rows are one group, and args.group_offsets is empty.
void multiply(const GemmKernels& kernels, const GroupedGemmArgs& args, bool dense) {
  require_supported(kernels, args);
  const BlockShape shape = shape_of(args);
  if (args.a.rows == 0 || shape.rows == 0) return;
  WorkspaceCarver carver(args.workspace);
  const Space space = carve(carver, kernels, args);
  prepare_weights(args, space);
  BuildGroups build;
  build.group_offsets = args.group_offsets;
  if (dense) {
    const std::array<int32_t, 2> offsets = {0, static_cast<int32_t>(args.a.rows)};
    cuda::write_words_async(space.one_group.data(), offsets.data(), 2, args.stream);
    build.group_offsets = space.one_group;
  }
  build.max_rows = args.a.rows;
  build.terms = terms_of(args);
  build.gemms[0] = stacked_gemm(args, space);
  build.arrays[0] = carve_group_arrays(space.arrays, groups_of(args));
  build.places = space.places.data();
  cuda::fill_async(space.scales.data(), 0, space.scales.size_bytes(), args.stream);
  build_groups(build, args.stream);
  const cuda::StackedRows stacked{space.codes.data(), shape.padded_depth() / 2, space.scales.data(),
                                  shape.depth / 16, space.places.data()};
  stack_staged(args.a, args.group_offsets, 0, args.a.rows, stacked, space.row_scales.data(), args.stream);
  kernels.to_float32.launch(build.arrays[0], cuda::multiprocessor_count(), space.gemm, args.stream);
  finish_rows(result_of(args, space), build.group_offsets.data() + groups_of(args), args.a.rows, args.d,
              args.stream);
}

}  // namespace

size_t grouped_gemm_workspace_bytes(const GemmKernels& kernels, const GroupedGemmArgs& args) {
  WorkspaceCarver counter;
  carve(counter, kernels, args);
  return counter.used();
}

void grouped_gemm(const GemmKernels& kernels, const GroupedGemmArgs& args) {
  validate_shapes(args);
  multiply(kernels, args, false);
}

void gemm(const GemmKernels& kernels, const GemmArgs& args) {
  validate(args);
  multiply(kernels, {args.a, {&args.b, 1}, {}, args.d, args.accumulation, args.workspace, args.stream}, true);
}

}  // namespace fourfold::blackwell
