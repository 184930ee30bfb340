#include "sm90/expert_stages.h"

#include <algorithm>
#include <memory>

#include "base/fail.h"
#include "cuda/device.h"
#include "cuda/permute.h"
#include "sm90/fused_layer.h"

namespace fourfold::sm90 {
namespace {

/// The same memory with as many rows as the GEMM was planned for; those from M on are not touched.
MatrixView<Bf16> with_rows(MatrixView<Bf16> matrix, int64_t rows) {
  matrix.rows = rows;
  return matrix;
}

ExpertGemm gemm_of(const cuda::PreparedMatrix& matrix, const PackedShape& shape, int64_t experts,
                   int64_t max_rows) {
  ExpertGemm gemm;
  gemm.experts = experts;
  gemm.max_rows = max_rows;
  gemm.weights = shape;
  gemm.packed = matrix.packed.data();
  gemm.weight_globals = matrix.global_scales();
  gemm.bias = matrix.biases();
  return gemm;
}

/// Gate and up go into one array of paired rows.
class Packer final : public cuda::WeightPacker {
 public:
  Packer(const PackedShape& gate_up, const PackedShape& down) : gate_up_(gate_up), down_(down) {}

  int64_t gate_up_bytes() const override { return gate_up_.bytes(); }
  int64_t down_bytes() const override { return down_.bytes(); }
  void pack_gate_up(const BlockScaledView* gate, const BlockScaledView& up,
                    std::byte* packed) const override {
    if (gate == nullptr) return launch_pack_weights({gate_up_, up, {}, packed}, nullptr);
    launch_pack_weights({gate_up_, *gate, up, packed}, nullptr);
  }
  void pack_down(const BlockScaledView& down, std::byte* packed) const override {
    launch_pack_weights({down_, down, {}, packed}, nullptr);
  }

 private:
  PackedShape gate_up_, down_;
};

}  // namespace

ExpertStages::ExpertStages(const ExpertWeights& weights, const LayerConfig& config,
                           const LayerOptions& options, const Memory& memory)
    : config_(config),
      options_(options),
      gate_up_shape_{is_gated(config.activation.kind) ? RowOrder::kGateUpPaired : RowOrder::kPlain,
                     config.intermediate, config.hidden},
      down_shape_{RowOrder::kPlain, config.hidden, config.intermediate},
      weights_(kBackend, weights, config, options, memory,
               std::make_unique<Packer>(gate_up_shape_, down_shape_)) {}

ExpertSpace ExpertStages::carve(WorkspaceCarver& carver, int64_t rows) const {
  ExpertSpace space;
  space.x[0] = carver.take<Bf16>(rows, config_.hidden);
  if (has_two_terms()) space.x[1] = carver.take<Bf16>(rows, config_.hidden);
  space.z = space.x[0];
  if (keeps_tokens_apart(rows)) {
    space.token_x = carver.take<Bf16>(rows / config_.top_k, config_.hidden);
  }
  space.x_row_scales = carver.take<float>(rows);
  space.activation = carver.take<Bf16>(rows, config_.intermediate);
  if (restages()) {
    space.intermediate[0] = carver.take<Bf16>(rows, config_.intermediate);
    space.intermediate_row_scales = carver.take<float>(rows);
  }
  if (has_two_terms()) space.intermediate[1] = carver.take<Bf16>(rows, config_.intermediate);
  space.amaxes = carver.take<float>(2);
  space.counters = carver.take<int32_t>(2 * kGemmTickets + config_.experts);
  space.gemm = carver.take<std::byte>(
      static_cast<int64_t>(std::max(workspace_bytes(gate_up_gemm(rows)), workspace_bytes(down_gemm(rows)))));
  return space;
}

bool ExpertStages::keeps_tokens_apart(int64_t rows) const {
  if (!is_nvfp4(options_.activations) || has_two_terms() || !stages_by_token() ||
      !knows_intermediate_scale() || config_.weight_on_input || config_.top_k == 1 || config_.experts == 0) {
    return false;
  }
  const ExpertGemm gate_up = gate_up_gemm(rows);
  return can_gather(gate_up) && activates_in_epilogue(gate_up);
}

ExpertGemm ExpertStages::gate_up_gemm(int64_t max_rows) const {
  ExpertGemm gemm = gemm_of(weights_.gate_up(), gate_up_shape_, config_.experts, max_rows);
  gemm.activation = config_.activation;
  return gemm;
}

ExpertGemm ExpertStages::down_gemm(int64_t max_rows) const {
  return gemm_of(weights_.down(), down_shape_, config_.experts, max_rows);
}

std::string ExpertStages::describe_kernels(int64_t rows) const {
  if (config_.experts == 0 || rows == 0) return "none";
  const std::string gate_up = describe_kernel(gate_up_gemm(rows)), down = describe_kernel(down_gemm(rows));
  return gate_up == down ? gate_up : fmt::format("gate/up {}, down {}", gate_up, down);
}

bool ExpertStages::needs(Walk walk) const {
  return walk == Walk::kCompute || (walk == Walk::kFindXAmax && is_dynamic_tensor(options_.x_scale)) ||
         (walk == Walk::kFindIntermediateAmax && is_dynamic_tensor(options_.intermediate_scale));
}

void ExpertStages::clear_amaxes(const ExpertSpace& space, void* stream) const {
  if (!needs(Walk::kFindXAmax) && !needs(Walk::kFindIntermediateAmax)) return;
  cuda::fill_async(space.amaxes.data(), 0, space.amaxes.size_bytes(), stream);
}

cuda::StageArgs ExpertStages::stage_x(const cuda::RowSource& source, const ExpertRows& rows,
                                      const ExpertSpace& space) const {
  cuda::StageArgs stage;
  stage.format = options_.activations;
  stage.policy = options_.x_scale;
  stage.source = source;
  stage.group_offsets = rows.group_offsets;
  stage.max_rows = rows.rows;
  stage.expert_scales = weights_.x_scales();
  stage.tensor_amax = &space.amaxes[0];
  return stage;
}

cuda::StageArgs ExpertStages::stage_intermediate(const ExpertRows& rows, const ExpertSpace& space) const {
  cuda::StageArgs stage;
  stage.format = options_.activations;
  stage.policy = options_.intermediate_scale;
  stage.source.rows = space.activation;
  stage.group_offsets = rows.group_offsets;
  stage.max_rows = rows.rows;
  stage.expert_scales = weights_.intermediate_scales();
  stage.tensor_amax = &space.amaxes[1];
  return stage;
}

void ExpertStages::copy_activation(const ExpertRows& rows, const ExpertSpace& space, MatrixView<Bf16> to,
                                   void* stream) const {
  cuda::StageArgs copy = stage_intermediate(rows, space);
  copy.format = ActivationFormat::kBf16;
  copy.staged.values = to;
  cuda::stage(copy, stream);
}

bool ExpertStages::stages_by_token() const {
  return !is_nvfp4(options_.activations) || options_.x_scale != ScalePolicy::kStatic;
}

bool ExpertStages::gathers_x(const ExpertGemm& gate_up, const cuda::RowSource& source,
                             const ExpertTaps& taps) const {
  return stages_by_token() && !has_two_terms() && source.slot_of_row != nullptr && source.weights.empty() &&
         taps.staged_x == nullptr && can_gather(gate_up);
}

void ExpertStages::gather_x(const ExpertSpace& space, const cuda::RowSource& source, ExpertGemm& gate_up,
                            const Step& step) const {
  gate_up.tokens[0] = source.rows;
  gate_up.slot_of_row = source.slot_of_row;
  gate_up.top_k = source.top_k;
  if (!restages() && can_read_in_place(source.rows)) return;
  const int64_t tokens = source.rows.rows;
  cuda::StageArgs stage = stage_x({source.rows}, {{}, tokens, {}}, space);
  const MatrixView<Bf16> x = (space.token_x.empty() ? space.x[0] : space.token_x).rows_from(0, tokens);
  stage.decoded = {x, {}, space.x_row_scales.data()};
  stage.beside_previous = !is_dynamic_tensor(options_.x_scale);  // a scale that the kernel before finds
  cuda::stage(stage, step.stream);
  step.finish("stage");
  gate_up.tokens[0] = x;
  if (restages()) gate_up.row_scales = space.x_row_scales.data();
}

void ExpertStages::run(const ExpertSpace& space, const cuda::RowSource& source, const ExpertRows& rows,
                       const ExpertTaps& taps, MatrixView<Bf16> z, const Step& step) const {
  cuda::StageArgs stage = stage_x(source, rows, space);
  stage.decoded = {space.x[0], space.x[1], space.x_row_scales.data()};
  if (taps.staged_x) stage.staged = *taps.staged_x;
  if (is_dynamic_tensor(options_.x_scale) && (step.whole || step.walk == Walk::kFindXAmax)) {
    cuda::find_amax(source, rows.group_offsets, rows.rows, &space.amaxes[0], step.stream);
  }
  if (step.walk == Walk::kFindXAmax) return;
  if (config_.experts == 0) return;
  ExpertGemm gate_up = gate_up_gemm(space.activation.rows);
  if (gathers_x(gate_up, source, taps)) {
    gather_x(space, source, gate_up, step);
    return run_gemms(space, gate_up, rows, taps, z, step);
  }
  cuda::stage(stage, step.stream);
  step.finish("stage");
  run_decoded(space, restages() ? space.x_row_scales.data() : nullptr, rows, taps, z, step);
}

void ExpertStages::run_staged(const ExpertSpace& space, const ActivationView& staged,
                              std::span<const int32_t> all_offsets, int64_t first_row, const ExpertRows& rows,
                              const ExpertTaps& taps, MatrixView<Bf16> z, const Step& step) const {
  if (step.walk == Walk::kFindXAmax) return;  // x has its scales
  cuda::decode_staged(staged, all_offsets, first_row, rows.rows,
                      {space.x[0], space.x[1], space.x_row_scales.data()}, step.stream);
  const bool scaled = restages() || !staged.row_scales.empty() || !staged.group_scales.empty();
  run_decoded(space, scaled ? space.x_row_scales.data() : nullptr, rows, taps, z, step);
}

bool ExpertStages::restages_in_epilogue(const ExpertGemm& gate_up, const ExpertTaps& taps) const {
  return is_nvfp4(options_.activations) && knows_intermediate_scale() && activates_in_epilogue(gate_up) &&
         taps.activation.empty() && taps.staged_intermediate == nullptr;
}

bool ExpertStages::run_closely(const ExpertSpace& space, const ExpertGemm& gate_up, const ExpertTaps& taps,
                               const Step& step) const {
  // z takes the place of an expert's sorted rows when they are multiplied; of rows that others still gather
  // it must not.
  const bool z_is_apart = gate_up.slot_of_row == nullptr || gate_up.tokens[0].data != space.x[0].data;
  const bool staged = !restages() || gate_up.requantize.expert_scales != nullptr;
  return step.walk == Walk::kCompute && step.observer == nullptr && staged && z_is_apart &&
         activates_in_epilogue(gate_up) && taps.activation.empty() && taps.staged_intermediate == nullptr;
}

bool ExpertStages::restage(const ExpertSpace& space, const ExpertRows& rows, const ExpertTaps& taps,
                           const Step& step) const {
  cuda::StageArgs stage = stage_intermediate(rows, space);
  if (is_dynamic_tensor(options_.intermediate_scale) &&
      (step.whole || step.walk == Walk::kFindIntermediateAmax)) {
    cuda::find_amax(stage.source, rows.group_offsets, rows.rows, &space.amaxes[1], step.stream);
  }
  if (step.walk == Walk::kFindIntermediateAmax) return false;
  if (!taps.activation.empty()) {
    // A copy: the second GEMM reads as many rows as were planned for, and a tap may have fewer.
    copy_activation(rows, space, taps.activation, step.stream);
  }
  stage.decoded = {space.intermediate[0], space.intermediate[1], space.intermediate_row_scales.data()};
  stage.staged = taps.staged_intermediate ? *taps.staged_intermediate : StagedActivations{};
  if (restages() || taps.staged_intermediate) cuda::stage(stage, step.stream);
  if (restages()) step.finish("restage");
  return true;
}

void ExpertStages::run_decoded(const ExpertSpace& space, const float* row_scales, const ExpertRows& rows,
                               const ExpertTaps& taps, const MatrixView<Bf16>& z, const Step& step) const {
  if (config_.experts == 0) return;
  ExpertGemm gate_up = gate_up_gemm(space.activation.rows);
  gate_up.tokens[0] = space.x[0];
  gate_up.tokens[1] = space.x[1];
  gate_up.row_scales = row_scales;
  run_gemms(space, gate_up, rows, taps, z, step);
}

void ExpertStages::run_gemms(const ExpertSpace& space, ExpertGemm gate_up, const ExpertRows& rows,
                             const ExpertTaps& taps, const MatrixView<Bf16>& z, const Step& step) const {
  const int64_t planned_rows = space.activation.rows;
  gate_up.group_offsets = rows.group_offsets.data();
  if (!rows.counters.empty()) gate_up.tickets = &rows.counters[0];
  gate_up.d = space.activation;
  if (!taps.h.empty()) gate_up.h = with_rows(taps.h, planned_rows);
  gate_up.workspace = space.gemm;
  gate_up.overlap_previous = true;  // after a kernel that staged or decoded x, or permuted rows to gather
  const bool fused = restages_in_epilogue(gate_up, taps);
  if (fused) {
    gate_up.d = space.intermediate[0];
    gate_up.requantize = {weights_.intermediate_scales(), space.intermediate[1],
                          space.intermediate_row_scales.data()};
  }
  ExpertGemm down = down_gemm(planned_rows);
  down.tokens[0] = restages() ? space.intermediate[0] : space.activation;
  down.tokens[1] = space.intermediate[1];
  down.row_scales = restages() ? space.intermediate_row_scales.data() : nullptr;
  down.group_offsets = rows.group_offsets.data();
  if (!rows.counters.empty()) down.tickets = &rows.counters[kGemmTickets];
  down.d = with_rows(z, planned_rows);
  down.workspace = space.gemm;
  down.overlap_previous = true;  // after the first GEMM or a staging kernel
  if (!rows.counters.empty() && run_closely(space, gate_up, taps, step)) {
    return launch_expert_gemms(gate_up, down, &rows.counters[2 * kGemmTickets], step.stream);
  }
  launch_expert_gemm(gate_up, step.stream);
  step.finish("gemm1+activate");
  if (fused ? step.walk != Walk::kCompute : !restage(space, rows, taps, step)) return;
  launch_expert_gemm(down, step.stream);
  step.finish("gemm2");
}

bool ExpertStages::fuses(int64_t slots) const {
  return can_fuse(config_, options_, slots);
}

void ExpertStages::carve_fused(WorkspaceCarver& carver, int64_t slots, ExpertSpace& space) const {
  space.fused_x = carver.take<Bf16>(slots, config_.hidden);
  space.fused_counters = carver.take<int32_t>(fused_counters(slots, config_.hidden));
}

void ExpertStages::stage_fused_x(const ExpertSpace& space, const cuda::RowSource& source,
                                 const ExpertRows& rows, const ExpertTaps& taps, FusedLayer& layer,
                                 const Step& step) const {
  if (stages_beside(rows.rows, source.rows, taps)) return stage_beside(space, source, rows, layer, step);
  cuda::StageArgs stage = stage_x(source, rows, space);
  if (taps.staged_x) stage.staged = *taps.staged_x;
  if (restages() || !can_read_in_place(source.rows)) {
    stage.decoded = {space.fused_x, {}, space.x_row_scales.data()};
    layer.x = space.fused_x;
    layer.x_row_scales = restages() ? space.x_row_scales.data() : nullptr;
    layer.weights_ahead = true;
  } else {
    layer.x = source.rows;
    layer.slot_of_row = source.slot_of_row;
    layer.slots_of_x_row = source.top_k;
    layer.finds_own_rows = rows.rows <= cuda::kHandfulOfSlots;
    if (!taps.staged_x) return;
  }
  if (is_dynamic_tensor(options_.x_scale)) {
    cuda::find_amax(source, rows.group_offsets, rows.rows, &space.amaxes[0], step.stream);
  }
  cuda::stage(stage, step.stream);
  step.finish("stage");
}

bool ExpertStages::stages_beside(int64_t slots, const MatrixView<const Bf16>& x,
                                 const ExpertTaps& taps) const {
  return slots <= cuda::kHandfulOfSlots && (restages() || !can_read_in_place(x)) &&
         taps.staged_x == nullptr && !is_dynamic_tensor(options_.x_scale);
}

void ExpertStages::stage_beside(const ExpertSpace& space, const cuda::RowSource& source,
                                const ExpertRows& rows, FusedLayer& layer, const Step& step) const {
  const bool by_slot = !stages_by_token();
  const int64_t staged_rows = by_slot ? rows.rows : source.rows.rows;
  cuda::RowSource unsorted{source.rows};
  unsorted.top_k = source.top_k;
  unsorted.routing = source.routing;
  cuda::StageArgs stage = stage_x(unsorted, {{}, staged_rows, {}}, space);
  if (by_slot) stage.by_slot_of_experts = config_.experts;
  stage.decoded = {space.fused_x, {}, space.x_row_scales.data()};
  stage.beside_previous = true;
  stage.cleared = space.fused_counters;
  cuda::stage(stage, step.stream);
  step.finish("stage");
  layer.x = space.fused_x;
  layer.x_row_scales = restages() ? space.x_row_scales.data() : nullptr;
  layer.slots_of_x_row = by_slot ? 1 : source.top_k;
  layer.waits_for_x = true;
  layer.slot_of_row = source.slot_of_row;
  layer.finds_own_rows = true;
}

void ExpertStages::run_fused(const ExpertSpace& space, const cuda::RowSource& source, const ExpertRows& rows,
                             const ForwardArgs& args, const ExpertTaps& taps, MatrixView<Bf16> z,
                             const Step& step) const {
  FusedLayer layer;
  stage_fused_x(space, source, rows, taps, layer, step);
  layer.experts = config_.experts;
  layer.tokens = args.routing.tokens();
  layer.top_k = config_.top_k;
  layer.group_offsets = rows.group_offsets.data();
  layer.row_of_slot = source.row_of_slot;
  const auto matrix = [](const cuda::PreparedMatrix& prepared, const PackedShape& shape) {
    return FusedMatrix{shape, prepared.packed.data(), prepared.global_scales(), prepared.biases()};
  };
  layer.gate_up = matrix(weights_.gate_up(), gate_up_shape_);
  layer.down = matrix(weights_.down(), down_shape_);
  layer.activation = config_.activation;
  layer.h = taps.h;
  layer.intermediate = space.activation;
  if (restages()) {
    layer.intermediate_scales = weights_.intermediate_scales();
    layer.intermediate = space.intermediate[0];
    if (!taps.activation.empty() || taps.staged_intermediate) layer.activated = space.activation;
  }
  layer.z = z;
  layer.routing = args.routing;
  layer.y = args.y;
  layer.counters = space.fused_counters;
  launch_fused_layer(layer, step.stream);
  step.finish("experts+combine");
  if (!taps.activation.empty()) copy_activation(rows, space, taps.activation, step.stream);
  if (!taps.staged_intermediate) return;
  cuda::StageArgs stage = stage_intermediate(rows, space);
  stage.staged = *taps.staged_intermediate;
  cuda::stage(stage, step.stream);
}

}  // namespace fourfold::sm90
