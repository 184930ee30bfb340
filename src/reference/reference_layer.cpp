// The whole layer and the backend "reference": stages of fourfold/reference.h, one after the other.
#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <utility>

#include "fourfold/error.h"
#include "fourfold/reference.h"
#include "fourfold/scale_layout.h"
#include "moe/workspace.h"

namespace fourfold {
namespace {

/// Of the stages between the rows of experts and what comes out of them.
struct ExpertSpace {
  StagedActivations staged_x;
  MatrixView<Bf16> h, activation;
  StagedActivations staged_intermediate;
  MatrixView<Bf16> z;

  ExpertSpace first(int64_t rows) const {
    ExpertSpace part = *this;
    part.h = h.rows_from(0, rows);
    part.activation = activation.rows_from(0, rows);
    part.z = z.rows_from(0, rows);
    return part;
  }
};

struct Workspace {
  PermutationView permutation;
  MatrixView<Bf16> rows;  // x in permuted order
  ExpertSpace routed, shared;
  std::span<float> shared_weights;
};

ExpertSpace carve_experts(WorkspaceCarver& carver, const LayerConfig& config, ActivationFormat format,
                          int64_t rows) {
  ExpertSpace space;
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
  const auto on_host = [](const Expert& expert) {
    for (const WeightView* weight : {&expert.gate, &expert.up, &expert.down}) {
      if (device_of(*weight).kind != Device::Kind::kHost) return false;
    }
    return true;
  };
  const bool readable = std::all_of(weights.experts.begin(), weights.experts.end(), on_host) &&
                        (!weights.shared || on_host(weights.shared->expert));
  return readable ? "" : "it reads weights in host memory alone";
}

void require_host(const ExpertWeights& weights) {
  const std::string reason = why_unreadable(weights);
  if (!reason.empty()) throw Error(ErrorCode::kUnsupported, "reference: " + reason);
}

/// Outputs that a caller wants of the stages of ExpertSpace.
struct ExpertTaps {
  const StagedActivations* staged_x = nullptr;
  MatrixView<Bf16> h, activation;
  const StagedActivations* staged_intermediate = nullptr;
  MatrixView<Bf16> z;
};

ExpertTaps taps_of(const StageTaps& taps) {
  return {taps.staged_x, taps.h, taps.activation, taps.staged_intermediate, taps.z};
}
ExpertTaps taps_of(const SharedTaps& taps) {
  return {taps.staged_x, taps.h, taps.activation, taps.staged_intermediate, taps.z};
}

/// Staging, both GEMMs and the activation between them, on rows that are sorted by expert: the routed
/// experts, or the shared one on all tokens.
class ExpertStages {
 public:
  ExpertStages(ExpertWeights weights, const LayerConfig& config, const LayerOptions& options)
      : config_(config), options_(options), weights_(std::move(weights)) {
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

  const LayerConfig& config() const { return config_; }
  const LayerOptions& options() const { return options_; }
  const ExpertWeights& weights() const { return weights_; }

  /// Stages `x` [M, H] and runs the experts on it.
  void run(MatrixView<const Bf16> x, std::span<const int32_t> group_offsets, const ExpertSpace& space,
           const ExpertTaps& taps) const {
    stage(x, group_offsets, options_.x_scale, x_scales_, space.staged_x);
    copy_tap(space.staged_x, taps.staged_x, x.rows);
    run_staged(space.staged_x.view(options_.activations, x.rows, config_.hidden), group_offsets, space, taps);
  }

  /// The experts on rows that are staged already.
  void run_staged(const ActivationView& a, std::span<const int32_t> group_offsets, const ExpertSpace& space,
                  const ExpertTaps& taps) const {
    const ExpertSpace part = space.first(a.rows);
    reference::gate_up(a, group_offsets, weights_, options_, part.h);
    copy_tap(part.h, taps.h);
    reference::activate(config_.activation, part.h, part.activation);
    copy_tap(part.activation, taps.activation);
    stage(part.activation, group_offsets, options_.intermediate_scale, intermediate_scales_,
          part.staged_intermediate);
    copy_tap(part.staged_intermediate, taps.staged_intermediate, a.rows);
    const ActivationView staged =
        part.staged_intermediate.view(options_.activations, a.rows, config_.intermediate);
    reference::down(staged, group_offsets, weights_, options_, part.z);
    copy_tap(part.z, taps.z);
  }

 private:
  void stage(MatrixView<const Bf16> rows, std::span<const int32_t> group_offsets, ScalePolicy policy,
             std::span<const float> expert_scales, const StagedActivations& out) const {
    if (is_nvfp4(options_.activations)) {
      reference::activation_scales(policy, rows, group_offsets, expert_scales,
                                   out.row_scales.first(static_cast<size_t>(rows.rows)));
    }
    reference::stage(options_.activations, rows, out, options_.activation_rule);
  }

  LayerConfig config_;
  LayerOptions options_;
  ExpertWeights weights_;
  std::vector<float> x_scales_, intermediate_scales_;  // [E], for the static policies
};

class ReferenceLayer final : public MoeLayer {
 public:
  ReferenceLayer(const ExpertWeights& weights, const LayerConfig& config, const LayerOptions& options)
      : config_(config), options_(options) {
    adopt(weights);
  }

  const LayerConfig& config() const override { return config_; }
  const LayerOptions& options() const override { return options_; }

  LayerPlan plan(int64_t max_tokens) const override {
    validate_plan(config_, max_tokens);
    WorkspaceCarver counter;
    carve(counter, max_tokens);
    return {max_tokens,
            counter.used(),
            options_.accumulation == Accumulation::kFloat32 ? "plain loops, float32 sums"
                                                            : "plain loops, float64 sums",
            "the reference has no other",
            nullptr,
            "f32"};
  }

  void forward(const LayerPlan& plan, const ForwardArgs& args) const override {
    validate(*this, plan, args);
    WorkspaceCarver carver(args.workspace);
    Workspace space = carve(carver, plan.max_tokens);

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
    routed_->run(space.rows.rows_from(0, rows), space.permutation.group_offsets, space.routed,
                 taps_of(args.taps));
    if (args.observer) args.observer->after("stage+experts", args.stream);
    reference::combine(space.routed.z.rows_from(0, rows), space.permutation.row_of_slot,
                       args.routing.topk_weights, config_, run_shared(args, space), args.y);
    if (args.observer) args.observer->after("combine", args.stream);
  }

  void experts(const LayerPlan& plan, const ExpertsArgs& args) const override {
    validate(*this, plan, args);
    validate_group_offsets(args.group_offsets, args.activations.rows);
    WorkspaceCarver carver(args.workspace);
    Workspace space = carve(carver, plan.max_tokens);
    space.routed.z = args.z;
    routed_->run_staged(args.activations, args.group_offsets, space.routed, taps_of(args.taps));
  }

  void update_weights(const ExpertWeights& weights) override {
    validate(weights, config_, options_);
    validate_update(routed_->weights(), weights);
    require_host(weights);
    adopt(weights);
  }

 private:
  void adopt(const ExpertWeights& weights) {
    routed_.emplace(weights, config_, options_);
    shared_.reset();
    if (weights.shared) {
      shared_.emplace(shared_as_layer(weights), shared_config(config_),
                      shared_options(*weights.shared, options_));
    }
  }

  Workspace carve(WorkspaceCarver& carver, int64_t max_tokens) const {
    const int64_t rows = max_tokens * config_.top_k;
    Workspace space;
    space.permutation = {carver.take<int32_t>(config_.experts + 1), carver.take<int32_t>(rows),
                         carver.take<int32_t>(rows)};
    space.rows = carver.take<Bf16>(rows, config_.hidden);
    space.routed = carve_experts(carver, config_, options_.activations, rows);
    if (shared_) {
      space.shared = carve_experts(carver, shared_->config(), shared_->options().activations, max_tokens);
      space.shared_weights = carver.take<float>(max_tokens);
    }
    return space;
  }

  /// The shared expert on all tokens, in their order; nothing where there is none.
  reference::SharedOutput run_shared(const ForwardArgs& args, const Workspace& space) const {
    if (!shared_) return {};
    const int64_t tokens = args.x.rows;
    const std::array<int32_t, 2> all_tokens = {0, static_cast<int32_t>(tokens)};
    shared_->run(args.x, all_tokens, space.shared, taps_of(args.taps.shared));
    const std::span<float> weights = space.shared_weights.first(static_cast<size_t>(tokens));
    reference::weigh_shared(args.x, *routed_->weights().shared, weights);
    copy_tap<float>(weights, args.taps.shared.z_weight);
    return {space.shared.z.rows_from(0, tokens), weights};
  }

  LayerConfig config_;
  LayerOptions options_;
  std::optional<ExpertStages> routed_, shared_;  // replaced whole by update_weights
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
