#include "tools/stage_comparison.h"

#include <algorithm>
#include <array>

#include "fourfold/reference.h"

namespace fourfold {
namespace {

/// Which row of a stage is what.
enum class Rows : uint8_t { kSlots, kTokens };

StageReport stage_report(Stage stage, const Comparison& comparison, const Permutation& permutation,
                         const LayertestRequest& request, Rows rows) {
  StageReport report{stage, comparison.cosine, comparison.norm_ratio, comparison.rel_l2, -1,
                     -1,    std::nullopt};
  if (comparison.worst_row >= 0) {
    report.worst_token =
        rows == Rows::kTokens
            ? comparison.worst_row
            : permutation.slot_of_row[static_cast<size_t>(comparison.worst_row)] / request.inputs->top_k;
  }
  if (comparison.worst_group >= 0) {
    report.worst_expert = request.expert_ids[static_cast<size_t>(comparison.worst_group)];
  }
  return report;
}

/// The stages of the routed experts, or of the shared one: what the reference needs to replay them.
struct Replay {
  const ExpertWeights& weights;
  LayerOptions options;
  ActivationFunction activation;
  std::span<const int32_t> group_offsets;
};

MatrixView<Bf16> sized_like(std::vector<Bf16>& values, MatrixView<const Bf16> like) {
  values.resize(static_cast<size_t>(like.rows * like.cols));
  return {values.data(), like.rows, like.cols};
}

/// The specification's staging of a backend's activation output.
StagedBuffers restage(const Replay& replay, MatrixView<const Bf16> activation) {
  const ActivationFormat format = replay.options.activations;
  StagedBuffers staged(format, activation.rows, activation.cols);
  if (is_nvfp4(format)) {
    std::vector<float> scales = intermediate_input_scales(replay.weights);
    const auto& over_all = replay.options.intermediate_max_scale;
    if (replay.options.intermediate_scale == ScalePolicy::kMaxOverExperts && over_all) {
      scales.assign(scales.size(), *over_all);
    }
    reference::activation_scales(replay.options.intermediate_scale, activation, replay.group_offsets, scales,
                                 staged.views.row_scales);
  }
  reference::stage(format, activation, staged.views, replay.options.activation_rule);
  return staged;
}

/// Fills the stages of `expected` from those of `run`; these and `known`, the specification's own run, are a
/// LayerTrace or a SharedTrace all three.
template <class Trace>
void replay_stages(const Replay& replay, const Trace& run, const Trace& known, MatrixView<const Bf16> h,
                   MatrixView<const Bf16> activation, MatrixView<const Bf16> z, Trace& expected) {
  const ActivationFormat format = replay.options.activations;
  const int64_t rows = h.rows;
  if (run.staged_x == known.staged_x) {
    expected.h = known.h;
  } else {
    reference::gate_up(run.staged_x.views.view(format, rows, z.cols), replay.group_offsets, replay.weights,
                       replay.options, sized_like(expected.h, h));
  }
  reference::activate(replay.activation, h, sized_like(expected.activation, activation));
  expected.staged_intermediate = restage(replay, activation);
  if (run.staged_intermediate == known.staged_intermediate) {
    expected.z = known.z;
  } else {
    reference::down(run.staged_intermediate.views.view(format, rows, activation.cols), replay.group_offsets,
                    replay.weights, replay.options, sized_like(expected.z, z));
  }
}

}  // namespace

std::vector<StageReport> compare_traces(const LayerTrace& reference, const LayerTrace& candidate,
                                        const LayertestRequest& request) {
  const Permutation& permutation = reference.permutation;
  const auto slots = [&](Stage stage, MatrixView<const Bf16> a, MatrixView<const Bf16> b) {
    return stage_report(stage, compare(a, b, permutation.group_offsets), permutation, request, Rows::kSlots);
  };
  const auto tokens = [&](Stage stage, MatrixView<const Bf16> a, MatrixView<const Bf16> b) {
    return stage_report(stage, compare(a, b), permutation, request, Rows::kTokens);
  };
  std::vector<StageReport> stages = {
      slots(Stage::kL1, reference.h_view(), candidate.h_view()),
      slots(Stage::kActivation, reference.activation_view(), candidate.activation_view()),
      slots(Stage::kL2, reference.z_view(), candidate.z_view()),
  };
  if (reference.shared) {
    stages.push_back(tokens(Stage::kSharedL1, reference.shared_h_view(), candidate.shared_h_view()));
    stages.push_back(tokens(Stage::kSharedActivation, reference.shared_activation_view(),
                            candidate.shared_activation_view()));
    stages.push_back(tokens(Stage::kSharedL2, reference.shared_z_view(), candidate.shared_z_view()));
  }
  stages.push_back(tokens(Stage::kOut, reference.y_view(), candidate.y_view()));
  return stages;
}

LayerTrace expected_stages(const LayerTrace& run, const LayerTrace& emulation,
                           const LayertestRequest& request) {
  const LayerConfig& config = request.config;
  LayerTrace expected;
  expected.rows = run.rows;
  expected.tokens = run.tokens;
  expected.hidden = run.hidden;
  expected.intermediate = run.intermediate;
  expected.h_columns = run.h_columns;
  expected.permutation = run.permutation;
  replay_stages({*request.nvfp4, request.options, config.activation, run.permutation.group_offsets}, run,
                emulation, run.h_view(), run.activation_view(), run.z_view(), expected);
  reference::SharedOutput shared;
  if (run.shared) {
    const SharedExpert& expert = *request.nvfp4->shared;
    const std::array<int32_t, 2> all_tokens = {0, static_cast<int32_t>(run.tokens)};
    SharedTrace& stages = expected.shared.emplace();
    stages.intermediate = run.shared->intermediate;
    stages.h_columns = run.shared->h_columns;
    const ExpertWeights weights = shared_as_layer(*request.nvfp4);
    replay_stages({weights, shared_options(expert, request.options), config.shared_activation, all_tokens},
                  *run.shared, *emulation.shared, run.shared_h_view(), run.shared_activation_view(),
                  run.shared_z_view(), stages);
    stages.z_weight.resize(static_cast<size_t>(run.tokens));
    reference::weigh_shared(request.inputs->x_view(), expert, stages.z_weight);
    shared = {run.shared_z_view(), stages.z_weight};
  }
  reference::combine(run.z_view(), run.permutation.row_of_slot, request.inputs->routing().topk_weights,
                     config, shared, sized_like(expected.y, run.y_view()));
  return expected;
}

}  // namespace fourfold
