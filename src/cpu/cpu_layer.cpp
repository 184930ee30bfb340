#include "cpu/cpu_layer.h"

#include <omp.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <vector>

#include "base/fail.h"
#include "cpu/expert_pass.h"
#include "fourfold/scale_layout.h"

namespace fourfold::cpu {
namespace {

/// LayerPlan::details.
struct PlannedThreads {
  int count = 1;
};

struct Workspace {
  PermutationView permutation;
  PassSpace routed, shared;
  std::span<float> shared_weights;  ///< [T]
  std::span<std::byte> scratch;     ///< threads times thread_scratch_bytes
};

/// Which kernels rows of a layer meet.
std::string describe_kernels(Isa isa, ActivationFormat format) {
  const bool ints = is_nvfp4(format);
  switch (isa) {
    case Isa::kAmx:
      return ints ? fmt::format("AMX bf16 tiles, int8 VNNI for up to {} rows an expert",
                                kMostIntRows / terms_of(format))
                  : "AMX bf16 tiles";
    case Isa::kAvx512Bf16:
      return ints ? "AVX-512 VNNI int8" : "AVX-512 bf16 products";
    case Isa::kAvx512:
      return ints ? "AVX-512 VNNI int8" : "AVX-512 float32";
    case Isa::kAvx2:
      return ints ? "AVX2 int8" : "AVX2 float32";
    case Isa::kPortable:
      break;
  }
  return ints ? "portable loops, int8" : "portable loops, float32";
}

/// LayerPlan::arithmetic.
std::string arithmetic_of(Isa isa, ActivationFormat format) {
  switch (isa) {
    case Isa::kAmx:
      return "bf16-amx";
    case Isa::kAvx512Bf16:
      return is_nvfp4(format) ? "int8-vnni-avx512" : "bf16-avx512";
    case Isa::kAvx512:
      return is_nvfp4(format) ? "int8-vnni-avx512" : "f32-avx512";
    case Isa::kAvx2:
      return is_nvfp4(format) ? "int8-avx2" : "f32-avx2";
    case Isa::kPortable:
      break;
  }
  return "f32";
}

void copy_rows(MatrixView<const Bf16> rows, const MatrixView<Bf16>& tap) {
  if (tap.empty()) return;
  for (int64_t row = 0; row < rows.rows; ++row) std::copy_n(rows.row(row), rows.cols, tap.row(row));
}
void copy_rows(const MatrixView<uint8_t>& from, int64_t rows, const MatrixView<uint8_t>& to) {
  if (from.empty()) return;
  for (int64_t row = 0; row < rows; ++row) std::copy_n(from.row(row), from.cols, to.row(row));
}
template <class T>
void copy_tap(std::span<const T> values, std::span<T> tap) {
  if (!tap.empty()) std::copy(values.begin(), values.end(), tap.begin());
}

void copy_staged(const StagedActivations& staged, int64_t rows, const StagedActivations* tap) {
  if (tap == nullptr) return;
  if (!staged.values.empty()) copy_rows(staged.values.rows_from(0, rows), tap->values);
  copy_rows(staged.codes, rows, tap->codes);
  copy_rows(staged.scales, rows, tap->scales);
  copy_rows(staged.residual_codes, rows, tap->residual_codes);
  copy_rows(staged.residual_scales, rows, tap->residual_scales);
  if (!staged.row_scales.empty()) std::copy_n(staged.row_scales.begin(), rows, tap->row_scales.begin());
}

/// What stays in the workspace until the end of a call; Taps is StageTaps or SharedTaps.
template <class Taps>
void copy_stages(const PassSpace& space, int64_t rows, const Taps& taps) {
  copy_staged(space.staged_x, rows, taps.staged_x);
  copy_rows(space.activation.rows_from(0, rows), taps.activation);
  copy_staged(space.staged_intermediate, rows, taps.staged_intermediate);
  copy_rows(space.z.rows_from(0, rows), taps.z);
}

template <class Taps>
KeptStages kept_for(const Taps& taps) {
  return {taps.h, taps.staged_x != nullptr, taps.staged_intermediate != nullptr};
}

/// A team's common clock: a barrier after each stage, and one thread that tells the observer.
class TeamClock {
 public:
  TeamClock(StageObserver* observer, void* stream) : observer_(observer), stream_(stream) {}

  /// By every thread of the team.
  void after(std::string_view stage) const {
#pragma omp barrier
    if (observer_ == nullptr) return;
#pragma omp master
    observer_->after(stage, stream_);
#pragma omp barrier
  }

 private:
  StageObserver* observer_;
  void* stream_;
};

class CpuLayer final : public MoeLayer {
 public:
  CpuLayer(const Kernels& kernels, const std::string& reason, const ExpertWeights& weights,
           const LayerConfig& config, const LayerOptions& options)
      : reason_(reason),
        kernels_(kernels),
        functions_(row_functions_of(kernels.isa)),
        config_(config),
        options_(options),
        routed_(weights, config, options) {
    if (!weights.shared) return;
    shared_.emplace(shared_as_layer(weights), shared_config(config),
                    shared_options(*weights.shared, options));
    read_shared_gate(*weights.shared);
  }

  const LayerConfig& config() const override { return config_; }
  const LayerOptions& options() const override { return options_; }

  LayerPlan plan(int64_t max_tokens) const override {
    validate_plan(config_, max_tokens);
    const int threads = omp_get_max_threads();
    WorkspaceCarver counter;
    carve(counter, max_tokens, threads);
    LayerPlan plan;
    plan.max_tokens = max_tokens;
    plan.workspace_bytes = counter.used();
    plan.kernel =
        fmt::format("{}: {}", to_string(kernels_.isa), describe_kernels(kernels_.isa, options_.activations));
    plan.reason = reason_;
    plan.details = std::make_shared<PlannedThreads>(PlannedThreads{threads});
    plan.arithmetic = arithmetic_of(kernels_.isa, options_.activations);
    return plan;
  }

  void forward(const LayerPlan& plan, const ForwardArgs& args) const override {
    validate(*this, plan, args);
    const int threads = threads_of(plan);
    WorkspaceCarver carver(args.workspace);
    Workspace space = carve(carver, plan.max_tokens, threads);
    const int64_t tokens = args.routing.tokens();
    const auto slots = static_cast<size_t>(tokens * config_.top_k);
    space.permutation.slot_of_row = space.permutation.slot_of_row.first(slots);
    space.permutation.row_of_slot = space.permutation.row_of_slot.first(slots);
    const int32_t status = permute_by_expert(args.routing, space.permutation);
    if (args.status) *args.status |= status;
    if (args.observer) args.observer->after("permute", args.stream);

    ExpertPass routed(routed_, kernels_, space.routed, space.permutation.group_offsets, kept_for(args.taps),
                      nullptr);
    const RowSource rows = {args.x, space.permutation.slot_of_row, space.permutation.row_of_slot,
                            args.routing.topk_weights};
    const std::array<int32_t, 2> all_tokens = {0, static_cast<int32_t>(tokens)};
    std::optional<ExpertPass> shared;
    if (shared_)
      shared.emplace(*shared_, kernels_, space.shared, all_tokens, kept_for(args.taps.shared), nullptr);
    const RowSource all_rows = {args.x, {}, {}, {}};
    WorkCounter combined;
    const TeamClock clock(args.observer, args.stream);
#pragma omp parallel num_threads(threads)
    {
      std::byte* const scratch = scratch_of_thread(space);
      run_forward(routed, rows, clock, scratch);
      if (shared) {
        run_forward(*shared, all_rows, clock, scratch);
        weigh_shared(args.x, space.shared_weights);
        clock.after("shared gate");
      }
      combine(args, space, combined, scratch);
    }
    if (args.observer) args.observer->after("combine", args.stream);
    copy_taps(args, space, tokens);
  }

  void experts(const LayerPlan& plan, const ExpertsArgs& args) const override {
    validate(*this, plan, args);
    validate_group_offsets(args.group_offsets, args.activations.rows);
    const int threads = threads_of(plan);
    WorkspaceCarver carver(args.workspace);
    Workspace space = carve(carver, plan.max_tokens, threads);
    space.routed.z = args.z;
    ExpertPass pass(routed_, kernels_, space.routed, args.group_offsets, kept_for(args.taps),
                    &args.activations);
    const TeamClock clock(nullptr, args.stream);
#pragma omp parallel num_threads(threads)
    {
      std::byte* const scratch = scratch_of_thread(space);
      pass.adopt_x(scratch);
      clock.after("stage");
      run_experts(pass, clock, scratch);
    }
    copy_stages(space.routed, args.activations.rows, args.taps);
  }

  void update_weights(const ExpertWeights& weights) override {
    validate(weights, config_, options_);
    const std::string reason = why_unsupported(weights, options_);
    if (!reason.empty()) throw Error(ErrorCode::kUnsupported, "cpu: " + reason);
    routed_.require_alike(weights);
    if (shared_) shared_->require_alike(shared_as_layer(weights));
    routed_.update(weights);
    if (!shared_) return;
    shared_->update(shared_as_layer(weights));
    read_shared_gate(*weights.shared);
  }

 private:
  static int threads_of(const LayerPlan& plan) {
    return std::min(static_cast<const PlannedThreads*>(plan.details.get())->count, omp_get_max_threads());
  }

  void read_shared_gate(const SharedExpert& shared) {
    shared_gate_.clear();
    if (!shared.gate) return;
    shared_gate_.resize(static_cast<size_t>(config_.hidden));
    decode_row(*shared.gate, 0, shared_gate_.data());
  }

  int64_t thread_scratch_bytes() const {
    int64_t bytes = ExpertPass::scratch_bytes(routed_);
    if (shared_) bytes = std::max(bytes, ExpertPass::scratch_bytes(*shared_));
    const int64_t terms = config_.top_k + 1;
    const int64_t combining =
        config_.hidden * 4 + terms * static_cast<int64_t>(sizeof(const Bf16*) + sizeof(float)) + 64;
    return round_up(std::max(bytes, combining), static_cast<int64_t>(kWorkspaceAlignment));
  }

  Workspace carve(WorkspaceCarver& carver, int64_t max_tokens, int threads) const {
    const int64_t rows = max_tokens * config_.top_k;
    Workspace space;
    space.permutation = {carver.take<int32_t>(config_.experts + 1), carver.take<int32_t>(rows),
                         carver.take<int32_t>(rows)};
    space.routed = carve_pass(carver, routed_, kernels_, rows);
    if (shared_) {
      space.shared = carve_pass(carver, *shared_, kernels_, max_tokens);
      space.shared_weights = carver.take<float>(max_tokens);
    }
    space.scratch = carver.take<std::byte>(threads * thread_scratch_bytes());
    return space;
  }

  std::byte* scratch_of_thread(const Workspace& space) const {
    return space.scratch.data() + omp_get_thread_num() * thread_scratch_bytes();
  }

  static void run_forward(ExpertPass& pass, const RowSource& rows, const TeamClock& clock,
                          std::byte* scratch) {
    if (pass.measures_x()) {
      pass.measure_x(rows, scratch);
      clock.after("measure");
    }
    pass.stage_x(rows, scratch);
    clock.after("stage");
    run_experts(pass, clock, scratch);
  }

  /// From staged rows on.
  static void run_experts(ExpertPass& pass, const TeamClock& clock, std::byte* scratch) {
    pass.multiply_up(scratch);
    clock.after("gemm1+activate");
    if (pass.measures_intermediate()) {
      pass.measure_intermediate(scratch);
      clock.after("measure");
    }
    pass.stage_intermediate(scratch);
    clock.after("restage");
    pass.multiply_down(scratch);
    clock.after("gemm2");
  }

  /// sigmoid(x . gate) of every token, or 1: the sum in float32 over ascending h, eight tokens side by side.
  void weigh_shared(MatrixView<const Bf16> x, std::span<float> weights) const {
    constexpr int64_t kTokens = 8;
#pragma omp for schedule(static) nowait
    for (int64_t first = 0; first < x.rows; first += kTokens) {
      const int64_t count = std::min(kTokens, x.rows - first);
      float logits[kTokens] = {};
      for (int64_t h = 0; h < static_cast<int64_t>(shared_gate_.size()); ++h) {
        const float gate = shared_gate_[static_cast<size_t>(h)];
        for (int64_t t = 0; t < count; ++t) logits[t] += static_cast<float>(x(first + t, h)) * gate;
      }
      for (int64_t t = 0; t < count; ++t) {
        const double sigmoid = 1.0 / (1.0 + std::exp(-double{logits[t]}));
        weights[static_cast<size_t>(first + t)] = shared_gate_.empty() ? 1.0f : static_cast<float>(sigmoid);
      }
    }
  }

  void combine(const ForwardArgs& args, const Workspace& space, WorkCounter& counter,
               std::byte* scratch) const {
    constexpr int64_t kTokensAPiece = 4;
    const int64_t tokens = args.routing.tokens();
    auto* const rows = reinterpret_cast<const Bf16**>(scratch);
    auto* const weights = reinterpret_cast<float*>(rows + config_.top_k + 1);
    const int64_t header =
        round_up((config_.top_k + 1) * static_cast<int64_t>(sizeof(*rows) + sizeof(float)), 64);
    auto* const sums = reinterpret_cast<float*>(scratch + header);
    for (int64_t piece = counter.take(); piece * kTokensAPiece < tokens; piece = counter.take()) {
      const int64_t last = std::min(tokens, (piece + 1) * kTokensAPiece);
      for (int64_t token = piece * kTokensAPiece; token < last; ++token) {
        const int64_t count = find_terms(args, space, token, rows, weights);
        if (const auto* const bf16 = std::get_if<MatrixView<Bf16>>(&args.y)) {
          functions_.combine(rows, weights, count, config_.hidden, sums);
          functions_.round_row(sums, config_.hidden, bf16->row(token));
        } else {
          functions_.combine(rows, weights, count, config_.hidden,
                             std::get<MatrixView<float>>(args.y).row(token));
        }
      }
    }
  }

  /// What a token's output is the sum of. Returns the number of terms.
  int64_t find_terms(const ForwardArgs& args, const Workspace& space, int64_t token, const Bf16** rows,
                     float* weights) const {
    for (int64_t k = 0; k < config_.top_k; ++k) {
      const int32_t row = space.permutation.row_of_slot[static_cast<size_t>(token * config_.top_k + k)];
      rows[k] = row >= 0 ? space.routed.z.row(row) : nullptr;
      weights[k] = config_.weight_on_input ? 1.0f : args.routing.topk_weights(token, k);
    }
    if (!shared_) return config_.top_k;
    rows[config_.top_k] = space.shared.z.row(token);
    weights[config_.top_k] = space.shared_weights[static_cast<size_t>(token)];
    return config_.top_k + 1;
  }

  void copy_taps(const ForwardArgs& args, const Workspace& space, int64_t tokens) const {
    const int64_t rows = space.permutation.rows();
    copy_tap<int32_t>(space.permutation.group_offsets, args.taps.group_offsets);
    copy_tap<int32_t>(space.permutation.slot_of_row.first(static_cast<size_t>(rows)), args.taps.slot_of_row);
    copy_tap<int32_t>(space.permutation.row_of_slot, args.taps.row_of_slot);
    copy_stages(space.routed, rows, args.taps);
    if (!shared_) return;
    copy_stages(space.shared, tokens, args.taps.shared);
    copy_tap<float>(space.shared_weights.first(static_cast<size_t>(tokens)), args.taps.shared.z_weight);
  }

  std::string reason_;  // why these kernels
  const Kernels& kernels_;
  const RowFunctions& functions_;
  LayerConfig config_;
  LayerOptions options_;
  PreparedExperts routed_;
  std::optional<PreparedExperts> shared_;
  std::vector<float> shared_gate_;  ///< [H]; empty where the shared expert has none
};

}  // namespace

std::string why_unsupported(const ExpertWeights& weights, const LayerOptions& options) {
  std::string reference_only = why_reference_only(options);
  if (!reference_only.empty()) return reference_only;
  const auto on_host = [](const Expert& expert) {
    for (const WeightView* weight : {&expert.gate, &expert.up, &expert.down}) {
      if (device_of(*weight).kind != Device::Kind::kHost) return false;
    }
    return true;
  };
  for (const Expert& expert : weights.experts) {
    if (!on_host(expert)) return "it reads weights in host memory alone";
    if (!is_all_nvfp4(expert)) {
      return fmt::format("routed experts in NVFP4 alone, and {} is {}", expert.name, format_name(expert.up));
    }
  }
  if (weights.shared && !on_host(weights.shared->expert)) return "it reads weights in host memory alone";
  return "";
}

std::unique_ptr<MoeLayer> make_layer(const Kernels& kernels, const std::string& reason,
                                     const ExpertWeights& weights, const LayerConfig& config,
                                     const LayerOptions& options) {
  return std::make_unique<CpuLayer>(kernels, reason, weights, config, options);
}

}  // namespace fourfold::cpu
