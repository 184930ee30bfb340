#include "tools/layer_trace.h"

#include <algorithm>
#include <limits>

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

AlignedWorkspace::AlignedWorkspace(size_t bytes) : buffer_(bytes + kWorkspaceAlignment) {
  const size_t beyond = reinterpret_cast<uintptr_t>(buffer_.data()) % kWorkspaceAlignment;
  span_ = {buffer_.data() + (kWorkspaceAlignment - beyond) % kWorkspaceAlignment, bytes};
}

namespace {

/// A tap of `rows` x `cols` full of NaN: what a backend leaves unwritten shows.
MatrixView<Bf16> poisoned_tap(std::vector<Bf16>& values, int64_t rows, int64_t cols) {
  values.assign(static_cast<size_t>(rows * cols), Bf16{0x7FFF});
  return {values.data(), rows, cols};
}

SharedTrace make_shared_trace(const LayerConfig& config, ActivationFormat format, int64_t tokens,
                              SharedTaps& taps) {
  const LayerConfig own = shared_config(config);
  SharedTrace trace;
  trace.intermediate = own.intermediate;
  trace.h_columns = own.h_columns();
  trace.staged_x = StagedBuffers(format, tokens, own.hidden);
  trace.staged_intermediate = StagedBuffers(format, tokens, own.intermediate);
  trace.z_weight.assign(static_cast<size_t>(tokens), std::numeric_limits<float>::quiet_NaN());
  taps.h = poisoned_tap(trace.h, tokens, own.h_columns());
  taps.activation = poisoned_tap(trace.activation, tokens, own.intermediate);
  taps.z = poisoned_tap(trace.z, tokens, own.hidden);
  taps.z_weight = trace.z_weight;
  return trace;
}

}  // namespace

void StagedBuffers::trim(int64_t rows) {
  for (MatrixView<uint8_t>* view :
       {&views.codes, &views.scales, &views.residual_codes, &views.residual_scales}) {
    view->rows = std::min(view->rows, rows);
  }
  views.values.rows = std::min(views.values.rows, rows);
  values.resize(static_cast<size_t>(views.values.rows * views.values.cols));
  codes.resize(static_cast<size_t>(views.codes.rows * views.codes.cols));
  scales.resize(static_cast<size_t>(views.scales.rows * views.scales.cols));
  residual_codes.resize(static_cast<size_t>(views.residual_codes.rows * views.residual_codes.cols));
  residual_scales.resize(static_cast<size_t>(views.residual_scales.rows * views.residual_scales.cols));
  row_scales.resize(std::min(row_scales.size(), static_cast<size_t>(rows)));
  views.row_scales = row_scales;
}

LayerTrace trace(const MoeLayer& layer, const LayerInputs& inputs, const SharedExpert* shared) {
  const LayerConfig& config = layer.config();
  const ActivationFormat format = layer.options().activations;
  const int64_t slots = inputs.tokens * inputs.top_k;
  LayerTrace trace;
  trace.tokens = inputs.tokens;
  trace.hidden = config.hidden;
  trace.intermediate = config.intermediate;
  trace.h_columns = config.h_columns();
  trace.staged_x = StagedBuffers(format, slots, config.hidden);
  trace.staged_intermediate = StagedBuffers(format, slots, config.intermediate);
  Permutation& permutation = trace.permutation;
  permutation.group_offsets.resize(static_cast<size_t>(config.experts + 1));
  permutation.slot_of_row.resize(static_cast<size_t>(slots));
  permutation.row_of_slot.resize(static_cast<size_t>(slots));

  const LayerPlan plan = layer.plan(inputs.tokens);
  const AlignedWorkspace workspace(plan.workspace_bytes);
  ForwardArgs args;
  args.x = inputs.x_view();
  args.routing = inputs.routing();
  args.y = poisoned_tap(trace.y, inputs.tokens, config.hidden);
  args.workspace = workspace.span();
  args.status = &permutation.status;
  args.taps.group_offsets = permutation.group_offsets;
  args.taps.slot_of_row = permutation.slot_of_row;
  args.taps.row_of_slot = permutation.row_of_slot;
  args.taps.staged_x = &trace.staged_x.views;
  args.taps.h = poisoned_tap(trace.h, slots, config.h_columns());
  args.taps.activation = poisoned_tap(trace.activation, slots, config.intermediate);
  args.taps.staged_intermediate = &trace.staged_intermediate.views;
  args.taps.z = poisoned_tap(trace.z, slots, config.hidden);
  if (shared != nullptr) {
    const ActivationFormat shared_format = shared_options(*shared, layer.options()).activations;
    trace.shared = make_shared_trace(config, shared_format, inputs.tokens, args.taps.shared);
    args.taps.shared.staged_x = &trace.shared->staged_x.views;
    args.taps.shared.staged_intermediate = &trace.shared->staged_intermediate.views;
  }
  layer.forward(plan, args);

  // The rows that there are, by the layer's own word.
  trace.rows = std::clamp<int64_t>(permutation.group_offsets.back(), 0, slots);
  permutation.slot_of_row.resize(static_cast<size_t>(trace.rows));
  trace.h.resize(static_cast<size_t>(trace.rows * config.h_columns()));
  trace.activation.resize(static_cast<size_t>(trace.rows * config.intermediate));
  trace.z.resize(static_cast<size_t>(trace.rows * config.hidden));
  trace.staged_x.trim(trace.rows);
  trace.staged_intermediate.trim(trace.rows);
  return trace;
}

}  // namespace fourfold
