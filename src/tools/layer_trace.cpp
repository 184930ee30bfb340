#include "tools/layer_trace.h"

namespace fourfold {

StagedBuffers::StagedBuffers(ActivationFormat format, int64_t rows, int64_t cols) {
  const auto bytes = [&](std::vector<uint8_t>& buffer, int64_t width) {
    buffer.resize(static_cast<size_t>(rows * width));
    return MatrixView<uint8_t>(buffer.data(), rows, width);
  };
  if (format == ActivationFormat::kBf16) {
    values.resize(static_cast<size_t>(rows * cols));
    views.values = {values.data(), rows, cols};
    return;
  }
  row_scales.resize(static_cast<size_t>(rows));
  views.row_scales = row_scales;
  views.codes = bytes(codes, format == ActivationFormat::kFp8 ? cols : cols / 2);
  if (is_nvfp4(format)) views.scales = bytes(scales, cols / 16);
  if (format == ActivationFormat::kNvfp4x2) {
    views.residual_codes = bytes(residual_codes, cols / 2);
    views.residual_scales = bytes(residual_scales, cols / 16);
  }
}

AlignedWorkspace::AlignedWorkspace(size_t bytes) : buffer_(bytes + 256) {
  const size_t misaligned = reinterpret_cast<uintptr_t>(buffer_.data()) % 256;
  span_ = {buffer_.data() + (256 - misaligned) % 256, bytes};
}

LayerTrace trace(const MoeLayer& layer, const LayerInputs& inputs) {
  const LayerConfig& config = layer.config();
  const ActivationFormat format = layer.options().activations;
  LayerTrace trace;
  trace.permutation = permute_by_expert(inputs.routing(), config.experts);
  trace.rows = trace.permutation.rows();
  trace.tokens = inputs.tokens;
  trace.hidden = config.hidden;
  trace.intermediate = config.intermediate;
  trace.staged_x = StagedBuffers(format, trace.rows, config.hidden);
  trace.staged_intermediate = StagedBuffers(format, trace.rows, config.intermediate);
  const auto matrix = [](std::vector<Bf16>& values, int64_t rows, int64_t cols) {
    values.resize(static_cast<size_t>(rows * cols));
    return MatrixView<Bf16>(values.data(), rows, cols);
  };

  // The layer's own permutation replaces the one that told the sizes.
  const LayerPlan plan = layer.plan(inputs.tokens);
  const AlignedWorkspace workspace(plan.workspace_bytes);
  ForwardArgs args;
  args.x = inputs.x_view();
  args.routing = inputs.routing();
  args.y = matrix(trace.y, inputs.tokens, config.hidden);
  args.workspace = workspace.span();
  args.status = &trace.permutation.status;
  args.taps.group_offsets = trace.permutation.group_offsets;
  args.taps.slot_of_row = trace.permutation.slot_of_row;
  args.taps.row_of_slot = trace.permutation.row_of_slot;
  args.taps.staged_x = &trace.staged_x.views;
  args.taps.h = matrix(trace.h, trace.rows, 2 * config.intermediate);
  args.taps.activation = matrix(trace.activation, trace.rows, config.intermediate);
  args.taps.staged_intermediate = &trace.staged_intermediate.views;
  args.taps.z = matrix(trace.z, trace.rows, config.hidden);
  layer.forward(plan, args);
  return trace;
}

}  // namespace fourfold
