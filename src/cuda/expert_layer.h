// A MoE layer on a GPU: permute, experts, combine, part by part. What the experts do is the backend's.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "base/fail.h"
#include "cuda/combine.h"
#include "cuda/device.h"
#include "cuda/expert_steps.h"
#include "cuda/permute.h"
#include "cuda/prepared_weights.h"
#include "cuda/stage.h"
#include "moe/workspace.h"

namespace fourfold::cuda {

/// Tokens are taken in parts of at most this many slots, so that the workspace stays bounded: 16384 tokens at
/// top-8. Every part reads the weights again, and begins and ends its kernels: in two parts a call takes 2 to
/// 4% longer on an H200 (docs/hopper-tried.md).
inline constexpr int64_t kMostRowsAtOnce = 131072;

template <class T>
bool is_aligned(const MatrixView<T>& matrix) {
  return reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 &&
         matrix.stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

/// `tap` where there is one, else `own`.
template <class View>
View tap_or(const View& tap, const View& own) {
  return tap.empty() ? own : tap;
}

/// Of the routed experts, or of the shared one.
template <class Taps>
ExpertTaps expert_taps(const Taps& taps) {
  return {taps.staged_x, taps.h, taps.activation, taps.staged_intermediate, taps.z};
}

inline ForwardArgs part_of(const ForwardArgs& args, int64_t first, int64_t tokens) {
  ForwardArgs part = args;
  part.x = args.x.rows_from(first, tokens);
  std::visit([&](const auto& ids) { part.routing.topk_ids = ids.rows_from(first, tokens); },
             args.routing.topk_ids);
  part.routing.topk_weights = args.routing.topk_weights.rows_from(first, tokens);
  std::visit([&](const auto& y) { part.y = y.rows_from(first, tokens); }, args.y);
  return part;
}

inline StagedActivations part_of(const StagedActivations& staged, int64_t first, int64_t rows) {
  const auto part = [&](const auto& matrix) {
    return matrix.empty() ? matrix : matrix.rows_from(first, rows);
  };
  StagedActivations result{part(staged.values),         part(staged.codes),           part(staged.scales),
                           part(staged.residual_codes), part(staged.residual_scales), {}};
  if (!staged.row_scales.empty()) result.row_scales = staged.row_scales.subspan(static_cast<size_t>(first));
  return result;
}

/// On the current device. `weights`, `config` and `options` fit each other and are supported.
///
/// Calls enqueue on their stream alone. Kernels are chosen by the plan, not by the number of tokens of a
/// call, so that a row's result does not depend on what else is in the batch. Taps need all tokens in one
/// part (kMostRowsAtOnce), and those of h and z 16-byte aligned rows; else Error.
///
/// `Stages` computes a set of experts, from their rows to z; src/sm90/expert_stages.h is one, and says what
/// is wanted of it. `details` are what else its constructor takes.
template <class Stages>
class ExpertLayer final : public MoeLayer {
 public:
  template <class... Details>
  ExpertLayer(const ExpertWeights& weights, const LayerConfig& config, const LayerOptions& options,
              const Details&... details)
      : config_(config),
        options_(options),
        memory_(device_memory(current_device())),
        routed_(weights, config, options, memory_, details...) {
    if (!weights.shared) return;
    shared_.emplace(shared_as_layer(weights), shared_config(config), shared_options(*weights.shared, options),
                    memory_, details...);
    if (!weights.shared->gate) return;
    shared_gate_ = memory_.allocate(static_cast<size_t>(config.hidden) * sizeof(float));
    upload_shared_gate(*weights.shared);
  }

  const LayerConfig& config() const override { return config_; }
  const LayerOptions& options() const override { return options_; }

  LayerPlan plan(int64_t max_tokens) const override {
    validate_plan(config_, max_tokens);
    WorkspaceCarver counter;
    carve(counter, max_tokens);
    const int64_t tokens = tokens_at_once(max_tokens), rows = tokens * config_.top_k;
    std::string kernels = routed_.describe_kernels(rows);
    if constexpr (Stages::kCanFuse) {
      if (fuses(rows)) kernels = routed_.describe_fused();
    }
    if (shared_) kernels += "; shared expert: " + shared_->describe_kernels(tokens);
    return {max_tokens, counter.used(), std::move(kernels), fmt::format("for up to {} rows at once", rows),
            nullptr};
  }

  void forward(const LayerPlan& plan, const ForwardArgs& args) const override {
    validate(*this, plan, args);
    const DeviceScope scope(memory_.device().index);
    const int64_t tokens = args.routing.tokens(),
                  part = std::max<int64_t>(tokens_at_once(plan.max_tokens), 1);
    require_tappable(args.taps, tokens * config_.top_k);
    WorkspaceCarver carver(args.workspace);
    const Space space = carve(carver, plan.max_tokens);
    walk(space, {Walk::kCompute, tokens <= part, args.stream, args.observer}, [&](const Step& step) {
      int64_t first = 0;
      do {  // without tokens, too: taps and status are written
        run_tokens(space, part_of(args, first, std::min(part, tokens - first)), step);
        first += part;
      } while (first < tokens);
    });
  }

  void experts(const LayerPlan& plan, const ExpertsArgs& args) const override {
    validate(*this, plan, args);
    const DeviceScope scope(memory_.device().index);
    const int64_t rows = args.activations.rows;
    const int64_t part = std::max<int64_t>(tokens_at_once(plan.max_tokens) * config_.top_k, 1);
    require_tappable(args.taps, 0);
    WorkspaceCarver carver(args.workspace);
    const Space space = carve(carver, plan.max_tokens);
    walk(space, {Walk::kCompute, rows <= part, args.stream, nullptr}, [&](const Step& step) {
      for (int64_t first = 0; first < rows; first += part) {
        run_staged_rows(space, args, first, std::min(part, rows - first), step);
      }
    });
  }

  void update_weights(const ExpertWeights& weights) override {
    const DeviceScope scope(memory_.device().index);
    if (weights.shared.has_value() != shared_.has_value()) {
      reject("update_weights: shared expert", shared_ ? "one" : "none", weights.shared ? "one" : "none");
    }
    if (shared_ && weights.shared->gate.has_value() != (shared_gate_.bytes() > 0)) {
      reject("update_weights: gate of the shared expert", shared_gate_.bytes() > 0 ? "one" : "none",
             weights.shared->gate ? "one" : "none");
    }
    routed_.require_replaceable_by(weights);
    if (shared_) shared_->require_replaceable_by(shared_as_layer(weights));
    routed_.update(weights);
    if (!shared_) return;
    shared_->update(shared_as_layer(weights));
    if (weights.shared->gate) upload_shared_gate(*weights.shared);
  }

 private:
  /// The workspace of a plan. Rows are those of one part.
  struct Space {
    PermutationView permutation;
    std::span<std::byte> permute_scratch;
    typename Stages::Space routed, shared;
    std::span<int32_t> shared_offsets;  // [2]: all tokens are the shared expert's
    std::span<float> shared_weights;
  };

  int64_t tokens_at_once(int64_t max_tokens) const {
    return std::min(max_tokens, std::max<int64_t>(kMostRowsAtOnce / config_.top_k, 1));
  }

  /// Whether forward() of a plan for so many slots is one kernel after the permutation.
  bool fuses(int64_t slots) const {
    if constexpr (Stages::kCanFuse) return !shared_ && routed_.fuses(slots);
    return false;
  }

  Space carve(WorkspaceCarver& carver, int64_t max_tokens) const {
    const int64_t tokens = tokens_at_once(max_tokens), rows = tokens * config_.top_k;
    Space space;
    space.permutation = {carver.take<int32_t>(config_.experts + 1), carver.take<int32_t>(rows),
                         carver.take<int32_t>(rows)};
    space.permute_scratch =
        carver.take<std::byte>(static_cast<int64_t>(permute_scratch_bytes(rows, config_.experts)));
    space.routed = routed_.carve(carver, rows);
    if constexpr (Stages::kCanFuse) {
      if (fuses(rows)) routed_.carve_fused(carver, rows, space.routed);
    }
    if (shared_) {
      space.shared = shared_->carve(carver, tokens);
      space.shared_offsets = carver.take<int32_t>(2);
      space.shared_weights = carver.take<float>(tokens);
    }
    return space;
  }

  /// Taps that the kernels can write. `slots` beyond one part have no place in a tap: each part permutes for
  /// itself.
  static void require_tappable(const StageTaps& taps, int64_t slots) {
    const auto any = [](const ExpertTaps& t) {
      return t.staged_x || !t.h.empty() || !t.activation.empty() || t.staged_intermediate || !t.z.empty();
    };
    if (slots > kMostRowsAtOnce &&
        (!taps.group_offsets.empty() || !taps.slot_of_row.empty() || !taps.row_of_slot.empty() ||
         !taps.shared.z_weight.empty() || any(expert_taps(taps)) || any(expert_taps(taps.shared)))) {
      reject(fmt::format("{}: taps", Stages::kBackend),
             fmt::format("at most {} slots in a call", kMostRowsAtOnce), slots);
    }
    for (const auto& [what, tap] : {std::pair("h", &taps.h), std::pair("z", &taps.z),
                                    std::pair("the shared expert's h", &taps.shared.h),
                                    std::pair("the shared expert's z", &taps.shared.z)}) {
      if (!tap->empty() && !is_aligned(*tap)) {
        reject(fmt::format("{}: tap of {}", Stages::kBackend, what), "rows at multiples of 16 bytes",
               "others");
      }
    }
  }

  /// Calls `over_parts(step)` for every walk that is needed, `compute` the last of them.
  template <class OverParts>
  void walk(const Space& space, const Step& compute, const OverParts& over_parts) const {
    routed_.clear_amaxes(space.routed, compute.stream);
    if (shared_) shared_->clear_amaxes(space.shared, compute.stream);
    for (const Walk which : {Walk::kFindXAmax, Walk::kFindIntermediateAmax}) {
      if (!compute.whole && (routed_.needs(which) || (shared_ && shared_->needs(which)))) {
        Step step = compute;
        step.walk = which;
        over_parts(step);
      }
    }
    over_parts(compute);
  }

  void run_tokens(const Space& space, const ForwardArgs& args, const Step& step) const {
    const StageTaps& taps = args.taps;
    const std::span<int32_t> offsets = tap_or(taps.group_offsets, space.permutation.group_offsets);
    const PermutationView permutation{offsets.first(static_cast<size_t>(config_.experts + 1)),
                                      tap_or(taps.slot_of_row, space.permutation.slot_of_row),
                                      tap_or(taps.row_of_slot, space.permutation.row_of_slot)};
    std::span<int32_t> counters;
    bool fused = false;
    if constexpr (Stages::kCanFuse) {
      fused = !space.routed.fused_counters.empty();
      counters = fused ? space.routed.fused_counters : space.routed.counters;
    }
    const int64_t tokens = args.routing.tokens();
    std::span<int32_t> cleared = counters;
    if constexpr (Stages::kCanFuse) {
      if (fused && tokens > 0 && routed_.stages_beside(tokens * config_.top_k, args.x, expert_taps(taps))) {
        cleared = {};
      }
    }
    permute({args.routing, permutation, args.status, space.permute_scratch, cleared}, step.stream);
    step.finish("permute");
    if (tokens == 0) return;
    RowSource source{args.x, permutation.slot_of_row.data(), config_.top_k, permutation.row_of_slot.data()};
    source.routing = &args.routing;
    if (config_.weight_on_input) source.weights = args.routing.topk_weights;
    const MatrixView<Bf16> z = tap_or(taps.z, space.routed.z);
    const ExpertRows rows{permutation.group_offsets, tokens * config_.top_k,
                          fused ? std::span<int32_t>() : counters};
    if constexpr (Stages::kCanFuse) {
      if (fused) return routed_.run_fused(space.routed, source, rows, args, expert_taps(taps), z, step);
    }
    routed_.run(space.routed, source, rows, expert_taps(taps), z, step);
    CombineArgs combine_args{z, permutation.row_of_slot.data(), args.routing.topk_weights,
                             config_.weight_on_input, args.y};
    combine_args.rows_are_known = config_.experts > 0;  // the last of whose kernels began after it
    if (shared_) run_shared(space, args, step, combine_args);
    if (step.walk != Walk::kCompute) return;
    combine(combine_args, step.stream);
    step.finish("combine");
  }

  /// The shared expert on all tokens; tells `combine` where its output and weights are.
  void run_shared(const Space& space, const ForwardArgs& args, const Step& step, CombineArgs& combine) const {
    const SharedTaps& taps = args.taps.shared;
    const std::array<int32_t, 2> offsets = {0, static_cast<int32_t>(args.x.rows)};
    write_words_async(space.shared_offsets.data(), offsets.data(), 2, step.stream);
    const MatrixView<Bf16> z = tap_or(taps.z, space.shared.z);
    shared_->run(space.shared, {args.x}, {space.shared_offsets, args.x.rows}, expert_taps(taps), z, step);
    if (step.walk != Walk::kCompute) return;
    combine.shared_z = z;
    const bool gated = shared_gate_.bytes() > 0;
    if (!gated && taps.z_weight.empty()) return;
    float* weights = tap_or(taps.z_weight, space.shared_weights).data();
    weigh_shared(args.x, gated ? reinterpret_cast<const float*>(shared_gate_.data()) : nullptr, weights,
                 step.stream);
    combine.shared_weights = weights;
  }

  /// Rows [first, first + rows) of what the caller of experts() brought.
  void run_staged_rows(const Space& space, const ExpertsArgs& args, int64_t first, int64_t rows,
                       const Step& step) const {
    std::span<const int32_t> offsets = args.group_offsets;
    if (!step.whole) {
      slice_group_offsets(args.group_offsets, first, rows, space.permutation.group_offsets, step.stream);
      offsets = space.permutation.group_offsets;
    }
    ExpertTaps taps = expert_taps(args.taps);
    for (MatrixView<Bf16>* tap : {&taps.h, &taps.activation, &taps.z}) {
      if (!tap->empty()) *tap = tap->rows_from(first, rows);
    }
    StagedActivations staged;
    if (taps.staged_intermediate) {
      staged = part_of(*taps.staged_intermediate, first, rows);
      taps.staged_intermediate = &staged;
    }
    const MatrixView<Bf16> wanted = args.z.rows_from(first, rows);
    const MatrixView<Bf16> z = is_aligned(wanted) ? wanted : space.routed.z;
    routed_.run_staged(space.routed, args.activations, args.group_offsets, first, {offsets, rows}, taps, z,
                       step);
    if (step.walk != Walk::kCompute) return;
    const auto copy_to = [&](const MatrixView<Bf16>& to) {
      constexpr auto kBytes = static_cast<int64_t>(sizeof(Bf16));
      copy_rows_async(to.data, to.stride * kBytes, z.data, z.stride * kBytes, z.cols * kBytes, rows,
                      step.stream);
    };
    if (!is_aligned(wanted)) copy_to(wanted);
    if (!taps.z.empty()) copy_to(taps.z);
  }

  void upload_shared_gate(const SharedExpert& shared) const {
    const std::vector<float> gate = decode_to_host(*shared.gate);
    memory_.copy_from_host(shared_gate_.data(), gate.data(), gate.size() * sizeof(float));
    memory_.synchronize();
  }

  LayerConfig config_;
  LayerOptions options_;
  const Memory& memory_;
  Stages routed_;
  std::optional<Stages> shared_;
  Buffer shared_gate_;  // float32 [H]; no bytes where the shared expert's output has no gate
};

}  // namespace fourfold::cuda
