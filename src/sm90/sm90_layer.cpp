// The whole layer: which kernels run in which order, on which parts of the workspace.
#include "sm90/sm90_layer.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/fail.h"
#include "cuda/combine.h"
#include "cuda/device.h"
#include "cuda/permute.h"
#include "cuda/stage.h"
#include "moe/workspace.h"
#include "sm90/expert_gemm.h"
#include "sm90/prepared_weights.h"

namespace fourfold::sm90 {
namespace {

/// The workspace of a plan. Rows are those of one part.
struct Space {
  PermutationView permutation;
  std::span<std::byte> permute_scratch;
  MatrixView<Bf16> x[2];  // staged and decoded, one matrix a term
  std::span<float> x_row_scales;
  MatrixView<Bf16> activation;
  MatrixView<Bf16> intermediate[2];
  std::span<float> intermediate_row_scales;
  MatrixView<Bf16> z;       // in the memory of x[0], which is read for the last time before z is written
  std::span<float> amaxes;  // of x, of the intermediate: dynamic-tensor
  std::span<std::byte> gemm;
};

/// Which of the layer's steps a walk over all parts takes. A scale over the whole tensor has to be known
/// before its first part is staged: where there are several parts, a walk of its own finds it.
enum class Walk : uint8_t { kFindXAmax, kFindIntermediateAmax, kCompute };

/// Rows of one part on their way through the experts.
struct ExpertRows {
  MatrixView<const Bf16> tokens[2];
  const float* row_scales = nullptr;
  std::span<const int32_t> group_offsets;
  int64_t rows = 0;  // at most
};

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

/// The same memory with as many rows as the GEMM was planned for; those from M on are not touched.
MatrixView<Bf16> with_rows(MatrixView<Bf16> matrix, int64_t rows) {
  matrix.rows = rows;
  return matrix;
}

ForwardArgs part_of(const ForwardArgs& args, int64_t first, int64_t tokens) {
  ForwardArgs part = args;
  part.x = args.x.rows_from(first, tokens);
  std::visit([&](const auto& ids) { part.routing.topk_ids = ids.rows_from(first, tokens); },
             args.routing.topk_ids);
  part.routing.topk_weights = args.routing.topk_weights.rows_from(first, tokens);
  std::visit([&](const auto& y) { part.y = y.rows_from(first, tokens); }, args.y);
  return part;
}

StagedActivations part_of(const StagedActivations& staged, int64_t first, int64_t rows) {
  const auto part = [&](const auto& matrix) {
    return matrix.empty() ? matrix : matrix.rows_from(first, rows);
  };
  StagedActivations result{part(staged.values),         part(staged.codes),           part(staged.scales),
                           part(staged.residual_codes), part(staged.residual_scales), {}};
  if (!staged.row_scales.empty()) result.row_scales = staged.row_scales.subspan(static_cast<size_t>(first));
  return result;
}

class Sm90Layer final : public MoeLayer {
 public:
  Sm90Layer(const ExpertWeights& weights, const LayerConfig& config, const LayerOptions& options)
      : config_(config),
        options_(options),
        memory_(cuda::device_memory(cuda::current_device())),
        weights_(weights, config, options, memory_) {}

  const LayerConfig& config() const override { return config_; }
  const LayerOptions& options() const override { return options_; }

  LayerPlan plan(int64_t max_tokens) const override {
    validate_plan(config_, max_tokens);
    WorkspaceCarver counter;
    carve(counter, max_tokens);
    const int64_t rows = rows_at_once(max_tokens);
    return {max_tokens, counter.used(),
            fmt::format("gate/up {}; down {}", describe_kernel(gate_up_gemm(std::max<int64_t>(rows, 1))),
                        describe_kernel(down_gemm(std::max<int64_t>(rows, 1)))),
            fmt::format("for up to {} rows at once", rows), nullptr};
  }

  void forward(const LayerPlan& plan, const ForwardArgs& args) const override {
    validate(*this, plan, args);
    const cuda::DeviceScope scope(memory_.device().index);
    const int64_t tokens = args.routing.tokens(),
                  step = std::max<int64_t>(tokens_at_once(plan.max_tokens), 1);
    require_tappable(args.taps, tokens * config_.top_k);
    WorkspaceCarver carver(args.workspace);
    const Space space = carve(carver, plan.max_tokens);
    walk(space, args.stream, tokens <= step, [&](Walk which, bool whole) {
      int64_t first = 0;
      do {  // without tokens, too: taps and status are written
        const int64_t count = std::min(step, tokens - first);
        run_tokens(space, part_of(args, first, count), which, whole);
        first += step;
      } while (first < tokens);
    });
  }

  void experts(const LayerPlan& plan, const ExpertsArgs& args) const override {
    validate(*this, plan, args);
    const cuda::DeviceScope scope(memory_.device().index);
    const int64_t rows = args.activations.rows, step = std::max<int64_t>(rows_at_once(plan.max_tokens), 1);
    require_tappable(args.taps, 0);
    WorkspaceCarver carver(args.workspace);
    const Space space = carve(carver, plan.max_tokens);
    walk(space, args.stream, rows <= step, [&](Walk which, bool whole) {
      for (int64_t first = 0; first < rows; first += step) {
        run_brought_rows(space, args, first, std::min(step, rows - first), which, whole);
      }
    });
  }

  void update_weights(const ExpertWeights& weights) override {
    const cuda::DeviceScope scope(memory_.device().index);
    weights_.update(weights);
  }

 private:
  int64_t tokens_at_once(int64_t max_tokens) const {
    return std::min(max_tokens, std::max<int64_t>(kMostRowsAtOnce / config_.top_k, 1));
  }
  int64_t rows_at_once(int64_t max_tokens) const { return tokens_at_once(max_tokens) * config_.top_k; }

  bool is_dynamic_tensor(ScalePolicy policy) const {
    return is_nvfp4(options_.activations) && policy == ScalePolicy::kDynamicTensor;
  }
  bool has_two_terms() const { return options_.activations == ActivationFormat::kNvfp4x2; }
  bool restages() const { return options_.activations != ActivationFormat::kBf16; }

  Space carve(WorkspaceCarver& carver, int64_t max_tokens) const {
    const int64_t rows = rows_at_once(max_tokens);
    Space space;
    space.permutation = {carver.take<int32_t>(config_.experts + 1), carver.take<int32_t>(rows),
                         carver.take<int32_t>(rows)};
    space.permute_scratch =
        carver.take<std::byte>(static_cast<int64_t>(cuda::permute_scratch_bytes(rows, config_.experts)));
    space.x[0] = carver.take<Bf16>(rows, config_.hidden);
    if (has_two_terms()) space.x[1] = carver.take<Bf16>(rows, config_.hidden);
    space.z = space.x[0];
    space.activation = carver.take<Bf16>(rows, config_.intermediate);
    space.x_row_scales = carver.take<float>(rows);
    if (restages()) {
      space.intermediate[0] = carver.take<Bf16>(rows, config_.intermediate);
      space.intermediate_row_scales = carver.take<float>(rows);
    }
    if (has_two_terms()) space.intermediate[1] = carver.take<Bf16>(rows, config_.intermediate);
    space.amaxes = carver.take<float>(2);
    space.gemm = carver.take<std::byte>(static_cast<int64_t>(
        std::max(workspace_bytes(gate_up_gemm(rows)), workspace_bytes(down_gemm(rows)))));
    return space;
  }

  ExpertGemm gemm_of(const PreparedMatrix& matrix, int64_t max_rows) const {
    ExpertGemm gemm;
    gemm.experts = config_.experts;
    gemm.max_rows = max_rows;
    gemm.weights = matrix.shape;
    gemm.packed = matrix.packed.data();
    gemm.weight_globals = matrix.global_scales();
    gemm.bias = matrix.biases();
    return gemm;
  }
  ExpertGemm gate_up_gemm(int64_t max_rows) const {
    ExpertGemm gemm = gemm_of(weights_.gate_up(), max_rows);
    gemm.activation = config_.activation;
    return gemm;
  }
  ExpertGemm down_gemm(int64_t max_rows) const { return gemm_of(weights_.down(), max_rows); }

  /// Taps that the kernels can write. `slots` beyond one part have no place in a tap: each part permutes for
  /// itself.
  void require_tappable(const StageTaps& taps, int64_t slots) const {
    const bool any = !taps.group_offsets.empty() || !taps.slot_of_row.empty() || !taps.row_of_slot.empty() ||
                     taps.staged_x || !taps.h.empty() || !taps.activation.empty() ||
                     taps.staged_intermediate || !taps.z.empty();
    if (any && slots > kMostRowsAtOnce) {
      reject("sm90: taps", fmt::format("at most {} slots in a call", kMostRowsAtOnce), slots);
    }
    for (const auto& [what, tap] : {std::pair("h", &taps.h), std::pair("z", &taps.z)}) {
      if (!tap->empty() && !is_aligned(*tap)) {
        reject(fmt::format("sm90: tap of {}", what), "rows at multiples of 16 bytes", "others");
      }
    }
  }

  /// Calls `over_parts(walk, whole)` for every walk that is needed; `whole`: there is one part, which finds
  /// its scales on the way.
  template <class OverParts>
  void walk(const Space& space, void* stream, bool whole, const OverParts& over_parts) const {
    const bool x = is_dynamic_tensor(options_.x_scale),
               between = is_dynamic_tensor(options_.intermediate_scale);
    if (x || between) cuda::fill_async(space.amaxes.data(), 0, space.amaxes.size_bytes(), stream);
    if (!whole && x) over_parts(Walk::kFindXAmax, whole);
    if (!whole && between) over_parts(Walk::kFindIntermediateAmax, whole);
    over_parts(Walk::kCompute, whole);
  }

  void run_tokens(const Space& space, const ForwardArgs& args, Walk walk, bool whole) const {
    const StageTaps& taps = args.taps;
    const PermutationView permutation{tap_or(taps.group_offsets, space.permutation.group_offsets)
                                          .first(static_cast<size_t>(config_.experts + 1)),
                                      tap_or(taps.slot_of_row, space.permutation.slot_of_row),
                                      tap_or(taps.row_of_slot, space.permutation.row_of_slot)};
    cuda::permute({args.routing, permutation, args.status, space.permute_scratch}, args.stream);
    const int64_t slots = args.routing.tokens() * config_.top_k;
    if (slots == 0) return;

    cuda::StageArgs stage;
    stage.format = options_.activations;
    stage.policy = options_.x_scale;
    stage.source = {args.x, permutation.slot_of_row.data(), config_.top_k, {}};
    if (config_.weight_on_input) stage.source.weights = args.routing.topk_weights;
    stage.group_offsets = permutation.group_offsets;
    stage.max_rows = slots;
    stage.expert_scales = weights_.x_scales();
    stage.tensor_amax = &space.amaxes[0];
    stage.decoded = {space.x[0], space.x[1], space.x_row_scales.data()};
    if (taps.staged_x) stage.staged = *taps.staged_x;
    if (is_dynamic_tensor(options_.x_scale) && (whole || walk == Walk::kFindXAmax)) {
      cuda::find_amax(stage.source, stage.group_offsets, slots, &space.amaxes[0], args.stream);
    }
    if (walk == Walk::kFindXAmax) return;
    cuda::stage(stage, args.stream);
    const MatrixView<Bf16> z = tap_or(taps.z, space.z);
    const float* row_scales = restages() ? space.x_row_scales.data() : nullptr;
    run_experts(space, {{space.x[0], space.x[1]}, row_scales, permutation.group_offsets, slots}, taps, z,
                walk, whole, args.stream);
    if (walk != Walk::kCompute) return;
    cuda::combine(
        {z, permutation.row_of_slot.data(), args.routing.topk_weights, config_.weight_on_input, args.y},
        args.stream);
  }

  /// Rows [first, first + rows) of what the caller of experts() brought.
  void run_brought_rows(const Space& space, const ExpertsArgs& args, int64_t first, int64_t rows, Walk walk,
                        bool whole) const {
    if (walk == Walk::kFindXAmax) return;  // x is staged already
    std::span<const int32_t> group_offsets = args.group_offsets;
    if (!whole) {
      cuda::slice_group_offsets(args.group_offsets, first, rows, space.permutation.group_offsets,
                                args.stream);
      group_offsets = space.permutation.group_offsets;
    }
    cuda::decode_staged(args.activations, args.group_offsets, first, rows,
                        {space.x[0], space.x[1], space.x_row_scales.data()}, args.stream);
    StageTaps taps = args.taps;
    for (MatrixView<Bf16>* tap : {&taps.h, &taps.activation}) {
      if (!tap->empty()) *tap = tap->rows_from(first, rows);
    }
    StagedActivations staged;
    if (taps.staged_intermediate) {
      staged = part_of(*taps.staged_intermediate, first, rows);
      taps.staged_intermediate = &staged;
    }
    const MatrixView<Bf16> wanted = args.z.rows_from(first, rows);
    const MatrixView<Bf16> z = is_aligned(wanted) ? wanted : space.z;
    const ActivationView& a = args.activations;
    const bool scaled = restages() || !a.row_scales.empty() || !a.group_scales.empty();
    const float* row_scales = scaled ? space.x_row_scales.data() : nullptr;
    run_experts(space, {{space.x[0], space.x[1]}, row_scales, group_offsets, rows}, taps, z, walk, whole,
                args.stream);
    if (walk != Walk::kCompute) return;
    const auto copy_rows = [&](const MatrixView<Bf16>& to) {
      constexpr auto kBytes = static_cast<int64_t>(sizeof(Bf16));
      cuda::copy_rows_async(to.data, to.stride * kBytes, z.data, z.stride * kBytes, z.cols * kBytes, rows,
                            args.stream);
    };
    if (!is_aligned(wanted)) copy_rows(wanted);
    if (!taps.z.empty()) copy_rows(taps.z.rows_from(first, rows));
  }

  /// Both GEMMs and what lies between.
  void run_experts(const Space& space, const ExpertRows& rows, const StageTaps& taps,
                   const MatrixView<Bf16>& z, Walk walk, bool whole, void* stream) const {
    if (config_.experts == 0) return;
    const int64_t planned_rows = space.activation.rows;
    ExpertGemm gemm = gate_up_gemm(planned_rows);
    std::copy_n(rows.tokens, 2, gemm.tokens);
    gemm.row_scales = rows.row_scales;
    gemm.group_offsets = rows.group_offsets.data();
    gemm.d = space.activation;
    if (!taps.h.empty()) gemm.h = with_rows(taps.h, planned_rows);
    gemm.workspace = space.gemm;
    gemm.overlap_previous = true;  // after a kernel that staged or decoded x
    launch_expert_gemm(gemm, stream);

    cuda::StageArgs stage;
    stage.format = options_.activations;
    stage.policy = options_.intermediate_scale;
    stage.source.rows = space.activation;
    stage.group_offsets = rows.group_offsets;
    stage.max_rows = rows.rows;
    stage.expert_scales = weights_.intermediate_scales();
    stage.tensor_amax = &space.amaxes[1];
    stage.decoded = {space.intermediate[0], space.intermediate[1], space.intermediate_row_scales.data()};
    if (taps.staged_intermediate) stage.staged = *taps.staged_intermediate;
    if (is_dynamic_tensor(options_.intermediate_scale) && (whole || walk == Walk::kFindIntermediateAmax)) {
      cuda::find_amax(stage.source, stage.group_offsets, stage.max_rows, &space.amaxes[1], stream);
    }
    if (walk == Walk::kFindIntermediateAmax) return;
    if (!taps.activation.empty()) copy_rows_to(taps.activation, stage, stream);
    if (restages() || taps.staged_intermediate) cuda::stage(stage, stream);

    ExpertGemm down = down_gemm(planned_rows);
    down.tokens[0] = restages() ? space.intermediate[0] : space.activation;
    down.tokens[1] = space.intermediate[1];
    down.row_scales = restages() ? space.intermediate_row_scales.data() : nullptr;
    down.group_offsets = rows.group_offsets.data();
    down.d = with_rows(z, planned_rows);
    down.workspace = space.gemm;
    down.overlap_previous = true;  // after the first GEMM or a staging kernel
    launch_expert_gemm(down, stream);
  }

  /// The rows that `stage` reads, as they are: a GEMM reads as many rows as were planned for, and a tap may
  /// have fewer.
  static void copy_rows_to(const MatrixView<Bf16>& tap, cuda::StageArgs stage, void* stream) {
    stage.format = ActivationFormat::kBf16;
    stage.decoded = {};
    stage.staged = {};
    stage.staged.values = tap;
    cuda::stage(stage, stream);
  }

  LayerConfig config_;
  LayerOptions options_;
  const Memory& memory_;
  PreparedWeights weights_;
};

}  // namespace

std::unique_ptr<MoeLayer> make_layer(const ExpertWeights& weights, const LayerConfig& config,
                                     const LayerOptions& options) {
  return std::make_unique<Sm90Layer>(weights, config, options);
}

}  // namespace fourfold::sm90
