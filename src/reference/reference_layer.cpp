// The whole layer and the backend "reference": stages of fourfold/reference.h, one after the other.
#include <algorithm>
#include <string>
#include <utility>

#include "fourfold/error.h"
#include "fourfold/reference.h"
#include "fourfold/scale_layout.h"
#include "moe/workspace.h"

namespace fourfold {
namespace {

struct Workspace {
  PermutationView permutation;
  MatrixView<Bf16> rows;  // x in permuted order
  StagedActivations staged_x;
  MatrixView<Bf16> h, activation;
  StagedActivations staged_intermediate;
  MatrixView<Bf16> z;
};

Workspace carve(WorkspaceCarver& carver, const LayerConfig& config, ActivationFormat format,
                int64_t max_tokens) {
  const int64_t rows = max_tokens * config.top_k;
  Workspace space;
  space.permutation = {carver.take<int32_t>(config.experts + 1), carver.take<int32_t>(rows),
                       carver.take<int32_t>(rows)};
  space.rows = carver.take<Bf16>(rows, config.hidden);
  space.staged_x = carver.take_staged(format, rows, config.hidden);
  space.h = carver.take<Bf16>(rows, config.h_columns());
  space.activation = carver.take<Bf16>(rows, config.intermediate);
  space.staged_intermediate = carver.take_staged(format, rows, config.intermediate);
  space.z = carver.take<Bf16>(rows, config.hidden);
  return space;
}

void copy_tap(MatrixView<const Bf16> rows, const MatrixView<Bf16>& tap) {
  if (tap.empty()) return;
  for (int64_t row = 0; row < rows.rows; ++row) std::copy_n(rows.row(row), rows.cols, tap.row(row));
}

template <class T>
void copy_tap(std::span<const T> values, std::span<T> tap) {
  if (!tap.empty()) std::copy(values.begin(), values.end(), tap.begin());
}

void copy_bytes(const MatrixView<uint8_t>& from, const MatrixView<uint8_t>& to, int64_t rows) {
  if (from.empty()) return;
  for (int64_t row = 0; row < rows; ++row) std::copy_n(from.row(row), from.cols, to.row(row));
}

void copy_tap(const StagedActivations& staged, const StagedActivations* tap, int64_t rows) {
  if (tap == nullptr) return;
  if (!staged.values.empty()) copy_tap(staged.values.rows_from(0, rows), tap->values);
  copy_bytes(staged.codes, tap->codes, rows);
  copy_bytes(staged.scales, tap->scales, rows);
  copy_bytes(staged.residual_codes, tap->residual_codes, rows);
  copy_bytes(staged.residual_scales, tap->residual_scales, rows);
  if (!staged.row_scales.empty()) {
    std::copy_n(staged.row_scales.begin(), rows, tap->row_scales.begin());
  }
}

/// Why these weights can't be read; empty when they can.
std::string why_unreadable(const ExpertWeights& weights) {
  for (const Expert& expert : weights.experts) {
    for (const WeightView* weight : {&expert.gate, &expert.up, &expert.down}) {
      if (device_of(*weight).kind != Device::Kind::kHost) return "it reads weights in host memory alone";
    }
  }
  return "";
}

void require_host(const ExpertWeights& weights) {
  const std::string reason = why_unreadable(weights);
  if (!reason.empty()) throw Error(ErrorCode::kUnsupported, "reference: " + reason);
}

class ReferenceLayer final : public MoeLayer {
 public:
  ReferenceLayer(ExpertWeights weights, const LayerConfig& config, const LayerOptions& options)
      : config_(config), options_(options) {
    adopt(std::move(weights));
  }

  const LayerConfig& config() const override { return config_; }
  const LayerOptions& options() const override { return options_; }

  LayerPlan plan(int64_t max_tokens) const override {
    validate_plan(config_, max_tokens);
    WorkspaceCarver counter;
    carve(counter, config_, options_.activations, max_tokens);
    return {max_tokens, counter.used(),
            options_.accumulation == Accumulation::kFloat32 ? "plain loops, float32 sums"
                                                            : "plain loops, float64 sums",
            "the reference has no other", nullptr, "f32"};
  }

  void forward(const LayerPlan& plan, const ForwardArgs& args) const override {
    validate(*this, plan, args);
    WorkspaceCarver carver(args.workspace);
    Workspace space = carve(carver, config_, options_.activations, plan.max_tokens);

    const auto slots = static_cast<size_t>(args.routing.tokens() * config_.top_k);
    space.permutation.slot_of_row = space.permutation.slot_of_row.first(slots);
    space.permutation.row_of_slot = space.permutation.row_of_slot.first(slots);
    const int32_t status = permute_by_expert(args.routing, space.permutation);
    if (args.status) *args.status |= status;
    const int64_t rows = space.permutation.rows();
    const auto slot_of_row = space.permutation.slot_of_row.first(static_cast<size_t>(rows));
    copy_tap<int32_t>(space.permutation.group_offsets, args.taps.group_offsets);
    copy_tap<int32_t>(slot_of_row, args.taps.slot_of_row);
    copy_tap<int32_t>(space.permutation.row_of_slot, args.taps.row_of_slot);

    reference::permute_rows(args.x, slot_of_row, args.routing.topk_weights, config_, space.rows);
    if (args.observer) args.observer->after("permute", args.stream);
    stage(space.rows.rows_from(0, rows), space.permutation.group_offsets, options_.x_scale, x_scales_,
          space.staged_x);
    copy_tap(space.staged_x, args.taps.staged_x, rows);
    run_experts(space.staged_x.view(options_.activations, rows, config_.hidden),
                space.permutation.group_offsets, space, args.taps, space.z);
    if (args.observer) args.observer->after("stage+experts", args.stream);
    reference::combine(space.z.rows_from(0, rows), space.permutation.row_of_slot, args.routing.topk_weights,
                       config_, args.y);
    if (args.observer) args.observer->after("combine", args.stream);
  }

  void experts(const LayerPlan& plan, const ExpertsArgs& args) const override {
    validate(*this, plan, args);
    validate_group_offsets(args.group_offsets, args.activations.rows);
    WorkspaceCarver carver(args.workspace);
    Workspace space = carve(carver, config_, options_.activations, plan.max_tokens);
    run_experts(args.activations, args.group_offsets, space, args.taps, args.z);
  }

  void update_weights(const ExpertWeights& weights) override {
    validate(weights, config_, options_);
    validate_update(weights_, weights);
    require_host(weights);
    adopt(weights);
  }

 private:
  void adopt(ExpertWeights weights) {
    weights_ = std::move(weights);
    x_scales_ = x_input_scales(weights_);
    intermediate_scales_ = intermediate_input_scales(weights_);
    const auto over_all = [](ScalePolicy policy, std::optional<float> scale) {
      return policy == ScalePolicy::kMaxOverExperts && scale;
    };
    if (over_all(options_.x_scale, options_.x_max_scale)) {
      x_scales_.assign(x_scales_.size(), *options_.x_max_scale);
    }
    if (over_all(options_.intermediate_scale, options_.intermediate_max_scale)) {
      intermediate_scales_.assign(intermediate_scales_.size(), *options_.intermediate_max_scale);
    }
  }

  void stage(MatrixView<const Bf16> rows, std::span<const int32_t> group_offsets, ScalePolicy policy,
             std::span<const float> expert_scales, const StagedActivations& out) const {
    if (is_nvfp4(options_.activations)) {
      reference::activation_scales(policy, rows, group_offsets, expert_scales,
                                   out.row_scales.first(static_cast<size_t>(rows.rows)));
    }
    reference::stage(options_.activations, rows, out);
  }

  void run_experts(const ActivationView& a, std::span<const int32_t> group_offsets, const Workspace& space,
                   const StageTaps& taps, MatrixView<Bf16> z) const {
    const int64_t rows = a.rows;
    const MatrixView<Bf16> h = space.h.rows_from(0, rows), activation = space.activation.rows_from(0, rows);
    reference::gate_up(a, group_offsets, weights_, options_, h);
    copy_tap(h, taps.h);
    reference::activate(config_.activation, h, activation);
    copy_tap(activation, taps.activation);
    stage(activation, group_offsets, options_.intermediate_scale, intermediate_scales_,
          space.staged_intermediate);
    copy_tap(space.staged_intermediate, taps.staged_intermediate, rows);
    const ActivationView staged =
        space.staged_intermediate.view(options_.activations, rows, config_.intermediate);
    reference::down(staged, group_offsets, weights_, options_, z.rows_from(0, rows));
    copy_tap(z.rows_from(0, rows), taps.z);
  }

  LayerConfig config_;
  LayerOptions options_;
  ExpertWeights weights_;
  std::vector<float> x_scales_, intermediate_scales_;  // [E], for the static policies
};

class ReferenceBackend final : public Backend {
 public:
  std::string_view name() const override { return "reference"; }
  std::string_view description() const override {
    return "every stage as a plain loop on the CPU; the specification";
  }
  std::string why_unavailable() const override { return ""; }

  std::string why_unsupported(const ExpertWeights& weights, const LayerConfig&,
                              const LayerOptions&) const override {
    return why_unreadable(weights);
  }

  std::unique_ptr<MoeLayer> make_layer(const ExpertWeights& weights, const LayerConfig& config,
                                       const LayerOptions& options) const override {
    validate(weights, config, options);
    require_host(weights);
    return std::make_unique<ReferenceLayer>(weights, config, options);
  }

  void gemm(const GemmArgs& args) const override { reference::gemm(args); }
  void grouped_gemm(const GroupedGemmArgs& args) const override { reference::grouped_gemm(args); }
};

}  // namespace

const Backend& reference_backend() {
  static const ReferenceBackend backend;
  return backend;
}

}  // namespace fourfold
