// Pack, decode the activations, multiply.
#include "sm90/standalone_gemm.h"

#include <array>
#include <string>
#include <vector>

#include "base/fail.h"
#include "cuda/device.h"
#include "cuda/stage.h"
#include "fourfold/scale_layout.h"
#include "moe/workspace.h"
#include "sm90/expert_gemm.h"

namespace fourfold::sm90 {
namespace {

constexpr int64_t kChannelMultiple = 16;  // of the grouped GEMM's output

struct Space {
  std::span<std::byte> packed;
  std::span<float> globals;
  std::span<int32_t> one_group;  // offsets of a dense GEMM
  MatrixView<Bf16> tokens[2];
  std::span<float> row_scales;
  // Where N is no multiple of 16: one weight with rows behind its last, which make output columns that
  // nobody copies.
  std::span<uint8_t> codes, scales;
  std::span<std::byte> d;  // where the GEMM can't write the caller's
  std::span<std::byte> gemm;
};

int64_t columns_of(const GroupedGemmArgs& args) {
  return args.b.empty() ? 0 : rows_of(args.b.front());
}
int64_t padded_columns(const GroupedGemmArgs& args) {
  return round_up(columns_of(args), kChannelMultiple);
}

PackedShape packed_shape(const GroupedGemmArgs& args) {
  return {RowOrder::kPlain, padded_columns(args), args.a.cols};
}

int64_t element_bytes(const OutputView& d) {
  return std::holds_alternative<MatrixView<float>>(d) ? 4 : 2;
}

/// Whether the GEMM can write `d` itself.
bool is_writable(const GroupedGemmArgs& args) {
  return std::visit(
      [&](const auto& d) {
        return padded_columns(args) == columns_of(args) && reinterpret_cast<uintptr_t>(d.data) % 16 == 0 &&
               d.stride * static_cast<int64_t>(sizeof(*d.data)) % 16 == 0;
      },
      args.d);
}

ExpertGemm gemm_of(const GroupedGemmArgs& args) {
  ExpertGemm gemm;
  gemm.experts = static_cast<int64_t>(args.b.size());
  gemm.max_rows = args.a.rows;
  gemm.weights = packed_shape(args);
  gemm.d = args.d;
  return gemm;
}

Space carve(WorkspaceCarver& carver, const GroupedGemmArgs& args) {
  const auto groups = static_cast<int64_t>(args.b.size());
  const int64_t rows = args.a.rows, depth = args.a.cols, columns = padded_columns(args);
  Space space;
  space.packed = carver.take<std::byte>(groups * packed_shape(args).bytes());
  space.globals = carver.take<float>(groups);
  space.one_group = carver.take<int32_t>(2);
  space.tokens[0] = carver.take<Bf16>(rows, depth);
  if (args.a.format == ActivationFormat::kNvfp4x2) space.tokens[1] = carver.take<Bf16>(rows, depth);
  space.row_scales = carver.take<float>(rows);
  if (columns != columns_of(args)) {
    space.codes = carver.take<uint8_t>(columns * depth / 2);
    space.scales = carver.take<uint8_t>(columns * depth / 16);
  }
  // Sized as if it were needed: alignment is not known when the workspace is asked for.
  space.d = carver.take<std::byte>(rows * columns * element_bytes(args.d));
  space.gemm = carver.take<std::byte>(static_cast<int64_t>(workspace_bytes(gemm_of(args))));
  return space;
}

/// `weight` with rows up to a multiple of 16; what is in the new rows does not matter.
BlockScaledView pad_rows(BlockScaledView weight, const Space& space, void* stream) {
  const int64_t rows = round_up(weight.rows, kChannelMultiple), blocks = weight.blocks_per_row();
  if (rows == weight.rows) return weight;
  const int64_t code_bytes = weight.cols / 2;
  cuda::copy_rows_async(space.codes.data(), code_bytes, weight.codes.data, weight.codes.stride, code_bytes,
                        weight.rows, stream);
  weight.codes = {space.codes.data(), rows, code_bytes, code_bytes, weight.codes.device};
  if (weight.scale_layout == ScaleLayout::kRowMajor) {
    cuda::copy_rows_async(space.scales.data(), blocks, weight.scales, weight.scale_stride, blocks,
                          weight.rows, stream);
    weight.scales = space.scales.data();
    weight.scale_stride = blocks;
  }  // swizzled ones have padding rows up to 128
  weight.rows = rows;
  return weight;
}

void pack(const GroupedGemmArgs& args, const Space& space) {
  const PackedShape shape = packed_shape(args);
  std::vector<float> globals;
  std::byte* packed = space.packed.data();
  for (const WeightView& weight : args.b) {
    const auto* blocks = std::get_if<BlockScaledView>(&weight);
    if (blocks == nullptr || blocks->format != QuantFormat::kNvfp4) {
      fail(ErrorCode::kUnsupported, "sm90: gemm: weights: expected nvfp4, found {}", format_name(weight));
    }
    launch_pack_weights({shape, pad_rows(*blocks, space, args.stream), {}, packed}, args.stream);
    packed += shape.bytes();
    globals.push_back(blocks->global.multiplier());
  }
  cuda::write_words_async(space.globals.data(), globals.data(), static_cast<int64_t>(globals.size()),
                          args.stream);
}

void require_supported(const GroupedGemmArgs& args) {
  if (args.accumulation == Accumulation::kFloat64) {
    fail(ErrorCode::kUnsupported,
         "sm90: gemm: expected float32 sums, found float64, which are for the reference");
  }
  const size_t bytes = grouped_gemm_workspace_bytes(args);
  if (args.workspace.size() < bytes ||
      reinterpret_cast<uintptr_t>(args.workspace.data()) % kWorkspaceAlignment) {
    reject("sm90: gemm: workspace", fmt::format("{} bytes at a multiple of {}", bytes, kWorkspaceAlignment),
           fmt::format("{} bytes", args.workspace.size()));
  }
}

/// `dense`: all rows are one group, and args.group_offsets is empty.
void multiply(const GroupedGemmArgs& args, bool dense) {
  require_supported(args);
  if (args.a.rows == 0 || columns_of(args) == 0) return;
  WorkspaceCarver carver(args.workspace);
  const Space space = carve(carver, args);
  pack(args, space);
  cuda::decode_staged(args.a, args.group_offsets, 0, args.a.rows,
                      {space.tokens[0], space.tokens[1], space.row_scales.data()}, args.stream);
  ExpertGemm gemm = gemm_of(args);
  gemm.tokens[0] = space.tokens[0];
  gemm.tokens[1] = space.tokens[1];
  gemm.row_scales = space.row_scales.data();
  gemm.packed = space.packed.data();
  gemm.weight_globals = space.globals.data();
  gemm.group_offsets = args.group_offsets.data();
  gemm.workspace = space.gemm;
  if (dense) {
    const std::array<int32_t, 2> offsets = {0, static_cast<int32_t>(args.a.rows)};
    cuda::write_words_async(space.one_group.data(), offsets.data(), 2, args.stream);
    gemm.group_offsets = space.one_group.data();
  }
  if (is_writable(args)) return launch_expert_gemm(gemm, args.stream);

  std::visit(
      [&](const auto& d) {
        const int64_t columns = padded_columns(args), bytes = element_bytes(args.d);
        auto own = d;
        own.data = reinterpret_cast<decltype(own.data)>(space.d.data());
        own.cols = own.stride = columns;
        gemm.d = own;
        launch_expert_gemm(gemm, args.stream);
        cuda::copy_rows_async(d.data, d.stride * bytes, own.data, columns * bytes, d.cols * bytes, d.rows,
                              args.stream);
      },
      args.d);
}

}  // namespace

size_t grouped_gemm_workspace_bytes(const GroupedGemmArgs& args) {
  WorkspaceCarver counter;
  carve(counter, args);
  return counter.used();
}

void grouped_gemm(const GroupedGemmArgs& args) {
  validate_shapes(args);
  multiply(args, false);
}

void gemm(const GemmArgs& args) {
  validate(args);
  multiply({args.a, {&args.b, 1}, {}, args.d, args.accumulation, args.workspace, args.stream}, true);
}

}  // namespace fourfold::sm90
