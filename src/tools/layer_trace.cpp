#include "tools/layer_trace.h"

#include <algorithm>
#include <limits>

#include "tools/mirror.h"

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

namespace {

/// A tap of `rows` x `cols` full of NaN: what a backend leaves unwritten shows.
MatrixView<Bf16> poisoned_tap(std::vector<Bf16>& values, int64_t rows, int64_t cols) {
  values.assign(static_cast<size_t>(rows * cols), Bf16{0x7FFF});
  return {values.data(), rows, cols};
}

SharedTrace make_shared_trace(const LayerConfig& config, ActivationFormat format, int64_t tokens) {
  const LayerConfig own = shared_config(config);
  SharedTrace trace;
  trace.intermediate = own.intermediate;
  trace.h_columns = own.h_columns();
  trace.staged_x = StagedBuffers(format, tokens, own.hidden);
  trace.staged_intermediate = StagedBuffers(format, tokens, own.intermediate);
  trace.z_weight.assign(static_cast<size_t>(tokens), std::numeric_limits<float>::quiet_NaN());
  return trace;
}

/// The taps of `trace` but for the staged ones, poisoned.
SharedTaps bring_taps(SharedTrace& trace, int64_t tokens, int64_t hidden, Mirror& mirror) {
  SharedTaps taps;
  taps.h = mirror.bring(poisoned_tap(trace.h, tokens, trace.h_columns));
  taps.activation = mirror.bring(poisoned_tap(trace.activation, tokens, trace.intermediate));
  taps.z = mirror.bring(poisoned_tap(trace.z, tokens, hidden));
  taps.z_weight = mirror.bring(std::span(trace.z_weight));
  return taps;
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

LayerTrace trace(const MoeLayer& layer, const LayerInputs& inputs, const SharedExpert* shared,
                 const Memory& memory) {
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
  const AlignedWorkspace workspace(plan.workspace_bytes, memory);
  Mirror mirror(memory);
  const StagedActivations staged_x = mirror.bring(trace.staged_x.views);
  const StagedActivations staged_intermediate = mirror.bring(trace.staged_intermediate.views);
  const Routing routing = inputs.routing();
  ForwardArgs args;
  args.x = mirror.bring(inputs.x_view());
  std::visit([&](const auto& ids) { args.routing.topk_ids = mirror.bring(ids); }, routing.topk_ids);
  args.routing.topk_weights = mirror.bring(routing.topk_weights);
  args.y = mirror.bring(poisoned_tap(trace.y, inputs.tokens, config.hidden));
  args.workspace = workspace.span();
  args.status = mirror.bring(&permutation.status, 1);
  args.taps.group_offsets = mirror.bring(std::span(permutation.group_offsets));
  args.taps.slot_of_row = mirror.bring(std::span(permutation.slot_of_row));
  args.taps.row_of_slot = mirror.bring(std::span(permutation.row_of_slot));
  args.taps.staged_x = &staged_x;
  args.taps.h = mirror.bring(poisoned_tap(trace.h, slots, config.h_columns()));
  args.taps.activation = mirror.bring(poisoned_tap(trace.activation, slots, config.intermediate));
  args.taps.staged_intermediate = &staged_intermediate;
  args.taps.z = mirror.bring(poisoned_tap(trace.z, slots, config.hidden));
  StagedActivations shared_x, shared_intermediate;
  if (shared != nullptr) {
    const ActivationFormat shared_format = shared_options(*shared, layer.options()).activations;
    trace.shared = make_shared_trace(config, shared_format, inputs.tokens);
    shared_x = mirror.bring(trace.shared->staged_x.views);
    shared_intermediate = mirror.bring(trace.shared->staged_intermediate.views);
    args.taps.shared = bring_taps(*trace.shared, inputs.tokens, config.hidden, mirror);
    args.taps.shared.staged_x = &shared_x;
    args.taps.shared.staged_intermediate = &shared_intermediate;
  }
  layer.forward(plan, args);
  mirror.fetch();

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
