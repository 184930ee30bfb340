#include "tools/layertest.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <optional>
#include <type_traits>

#include "base/fail.h"
#include "fourfold/reference.h"
#include "fourfold/weight_statistics.h"
#include "tools/exit_codes.h"
#include "tools/expert_matrices.h"
#include "tools/explanation.h"
#include "tools/input_scale_check.h"
#include "tools/layer_trace.h"
#include "tools/stage_comparison.h"
#include "tools/weight_comparison.h"

namespace fourfold {
namespace {

// Limits of the kernel comparison, on relative L2. Both sides compute the same real number and round it to
// bf16; where their sums differ in the last bits of float32, a result may fall to the neighbouring bf16. If
// every element did, the error would be one ulp each: 2^-8 of the element at most, 2.8e-3 in the mean over
// mantissas; in a sound kernel few do. A single token has few elements and may cancel: 2^-7 for the worst
// one.
constexpr double kKernelWorstTokenLimit = 0x1p-7;

// Staging with a scale of the checkpoint may have twice the error of staging by token on the same rows. Block
// scales follow the data either way: a calibrated scale measures 1.0 to 1.1 in the median row, and on data
// that calibration has not seen a few values saturate, which adds less than the noise that is there. Four
// times the noise power is no longer that.
constexpr double kInputScaleLimit = 2.0;

constexpr size_t kShownFindings = 8;

bool exceeds(const StageReport& stage) {
  return stage.limit && !(stage.rel_l2 <= *stage.limit);
}

/// NaN of any kind, and everything else by value.
bool is_same(float a, float b) {
  return a == b || (std::isnan(a) && std::isnan(b));
}

/// Where both sides are NaN or the same infinity, a kernel did what its input and its weights demand: such
/// elements become zero on both sides, so that the others can be compared.
void settle_nonfinite(std::vector<Bf16>& expected, std::vector<Bf16>& found) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const auto a = static_cast<float>(expected[i]), b = static_cast<float>(found[i]);
    if (!std::isfinite(a) && is_same(a, b)) expected[i] = found[i] = Bf16{};
  }
}

void settle_nonfinite(LayerTrace& expected, LayerTrace& found) {
  settle_nonfinite(expected.h, found.h);
  settle_nonfinite(expected.activation, found.activation);
  settle_nonfinite(expected.z, found.z);
  settle_nonfinite(expected.y, found.y);
  if (!found.shared) return;
  settle_nonfinite(expected.shared->h, found.shared->h);
  settle_nonfinite(expected.shared->activation, found.shared->activation);
  settle_nonfinite(expected.shared->z, found.shared->z);
}

class Layertest {
 public:
  explicit Layertest(const LayertestRequest& request) : request_(request) {}

  LayertestReport run() {
    report_.backend = request_.backend->name();
    LayerOptions dequantized = with_bf16_activations(request_.options);
    dequantized.dequantize_weights = true;
    dequantized_ =
        run_reference("the reference in the dequantized NVFP4 weights", *request_.nvfp4, dequantized);
    emulation_ = run_reference("the emulation", *request_.nvfp4, request_.options);
    if (emulation_.rows == 0)
      reject("layertest", "at least one token that goes to an expert under test", "none");
    judge_scale_bytes();
    report_.charts.block_scales = block_scale_histograms(*request_.nvfp4);
    compare_checkpoint(dequantized);
    compare_activations();
    compare_kernel();
    if (!report_.charts.worst_token || first_culprit_ == "activations") {
      chart_worst_token(dequantized_, "dequantized reference", emulation_,
                        "emulation, quantized activations");
    }
    report_.verdict = report_.findings.empty() ? "fine" : first_culprit_;
    return std::move(report_);
  }

 private:
  /// Errors of `candidate` by expert and by token.
  void chart(const std::string& comparison, const LayerTrace& reference, const LayerTrace& candidate) {
    report_.charts.expert_errors.push_back(
        expert_errors(comparison, reference, candidate, request_.expert_ids));
    report_.charts.errors.push_back(token_errors(comparison, reference, candidate));
  }

  void chart_worst_token(const LayerTrace& reference, const std::string& reference_name,
                         const LayerTrace& candidate, const std::string& candidate_name) {
    TokenScatter& scatter = report_.charts.worst_token.emplace(worst_token(reference, candidate));
    scatter.reference_name = reference_name;
    scatter.candidate_name = candidate_name;
  }

  LayerTrace run_reference(const std::string& what, const ExpertWeights& weights,
                           const LayerOptions& options) const {
    request_.progress(what);
    return trace(*reference_backend().make_layer(weights, request_.config, options), *request_.inputs,
                 weights.shared ? &*weights.shared : nullptr);
  }

  /// Kernel findings come first in the verdict: they hold whatever the checkpoint is like.
  void add_finding(const std::string& culprit, const std::string& text) {
    if (report_.findings.empty() || culprit == "kernel") first_culprit_ = culprit;
    report_.findings.push_back(fmt::format("{}: {}", culprit, text));
  }

  /// Findings of stages over their limit, or not finite.
  void judge(const std::string& culprit, const std::vector<StageReport>& stages) {
    for (const StageReport& stage : stages) {
      const std::string_view name = kStageNames[static_cast<size_t>(stage.stage)];
      const std::string where = fmt::format(
          "{}{}", stage.worst_token >= 0 ? fmt::format(", worst token {}", stage.worst_token) : "",
          stage.worst_expert >= 0 ? fmt::format(", worst expert {}", stage.worst_expert) : "");
      if (exceeds(stage)) {
        add_finding(culprit, fmt::format("{}: relative L2 {:.3g} above {:.3g} (norm ratio {:.4g}{})", name,
                                         stage.rel_l2, *stage.limit, stage.norm_ratio, where));
      } else if (!std::isfinite(stage.rel_l2)) {
        add_finding(culprit, fmt::format("{}: NaN or infinity{}", name, where));
      }
    }
  }

  void compare_checkpoint(const LayerOptions& dequantized) {
    ComparisonReport& checkpoint = report_.checkpoint;
    if (request_.original == nullptr) {
      checkpoint.left_out = "no --original: what the checkpoint lost is not known";
      judge_finite(dequantized_);
      return;
    }
    request_.progress("the weights against the original");
    const WeightComparison weights = compare_weights(*request_.original, *request_.nvfp4);
    checkpoint.limit_origin =
        "1.1 x what our own conversion of this original loses (from MXFP4: the exact cast), for all and each "
        "matrix";
    checkpoint.stages.push_back(weights_stage(weights));
    if (weights.has_blocks) report_.exact_blocks = weights.blocks;
    judge_matrices(weights);

    std::optional<LayerTrace> run;  // nothing where it would be dequantized_ again
    if (!weights.identical) {
      run = run_reference("the reference in the original weights", *request_.original, dequantized);
    }
    const LayerTrace& original = run ? *run : dequantized_;
    const std::vector<StageReport> stages = compare_traces(original, dequantized_, request_);
    judge("checkpoint", stages);
    chart("checkpoint", original, dequantized_);
    checkpoint.stages.insert(checkpoint.stages.end(), stages.begin(), stages.end());
  }

  /// Block scales that are NaN or negative: no writer means them, and tensor cores that read scales without a
  /// sign would compute something else.
  void judge_scale_bytes() {
    std::vector<const Expert*> experts;
    for (const Expert& expert : request_.nvfp4->experts) experts.push_back(&expert);
    if (request_.nvfp4->shared) experts.push_back(&request_.nvfp4->shared->expert);
    constexpr size_t kEach = kExpertMatrices.size();
    std::vector<ScaleCounts> counts(experts.size() * kEach);
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < counts.size(); ++i) {
      const WeightView& weight = experts[i / kEach]->*kExpertMatrices[i % kEach].member;
      if (is_stored_as(weight, QuantFormat::kNvfp4))
        counts[i] = count_scales(std::get<BlockScaledView>(weight));
    }
    size_t bad_matrices = 0;
    for (size_t i = 0; i < counts.size(); ++i) {
      const int64_t bad = counts[i].nan() + counts[i].negative();
      if (bad > 0 && ++bad_matrices <= kShownFindings) {
        add_finding("checkpoint", fmt::format("weights: {} {}: {} of {} block scales are NaN or negative",
                                              experts[i / kEach]->name, kExpertMatrices[i % kEach].name, bad,
                                              counts[i].total()));
      }
    }
    add_rest(bad_matrices);
  }

  /// Says how many matrices with findings are not listed.
  void add_rest(size_t bad_matrices) {
    if (bad_matrices <= kShownFindings) return;
    add_finding("checkpoint", fmt::format("weights: and in {} more matrices", bad_matrices - kShownFindings));
  }

  StageReport weights_stage(const WeightComparison& weights) const {
    std::map<int64_t, ErrorSums> by_expert;
    for (const MatrixLoss& matrix : weights.matrices) {
      if (matrix.expert != kSharedExpert) by_expert[matrix.expert] += matrix.sums;
    }
    WorstPart worst;
    for (const auto& [expert, sums] : by_expert) worst.offer(expert, sums.relative_l2());
    const ErrorSums& total = weights.total;
    return {Stage::kWeights,
            total.cosine(),
            total.norm_ratio(),
            total.relative_l2(),
            -1,
            worst.index < 0 ? -1 : request_.expert_ids[static_cast<size_t>(worst.index)],
            weights.limit};
  }

  void judge_matrices(const WeightComparison& weights) {
    size_t bad = 0;
    for (const MatrixLoss& matrix : weights.matrices) {
      const double loss = matrix.sums.relative_l2();
      if (loss <= matrix.limit) continue;
      if (++bad > kShownFindings) continue;
      add_finding(
          "checkpoint",
          fmt::format("weights: {}: relative L2 {:.3g} above {:.3g} (cosine {:.5f}, norm ratio {:.4g})",
                      matrix.name, loss, matrix.limit, matrix.sums.cosine(), matrix.sums.norm_ratio()));
    }
    add_rest(bad);
  }

  /// Without an original, NaN in the dequantized layer is all that can be said of the weights.
  void judge_finite(const LayerTrace& run) {
    const Comparison self = compare(run.y_view(), run.y_view());
    if (!std::isfinite(self.rel_l2)) {
      add_finding("checkpoint",
                  fmt::format("out: NaN or infinity in the dequantized layer, token {}", self.worst_row));
    }
  }

  void compare_activations() {
    ComparisonReport& activations = report_.activations;
    activations.stages = compare_traces(dequantized_, emulation_, request_);
    judge("activations", activations.stages);
    chart("activations", dequantized_, emulation_);
    if (is_nvfp4(request_.options.activations)) judge_input_scales();
    if (emulation_.shared &&
        is_nvfp4(shared_options(*request_.nvfp4->shared, request_.options).activations)) {
      judge_shared_input_scales();
    }
  }

  void judge_input_scales() {
    const std::span<const int32_t> offsets = emulation_.permutation.group_offsets;
    if (request_.options.x_scale != ScalePolicy::kDynamicToken) {
      std::vector<Bf16> x(static_cast<size_t>(emulation_.rows * emulation_.hidden));
      const MatrixView<Bf16> rows(x.data(), emulation_.rows, emulation_.hidden);
      reference::permute_rows(request_.inputs->x_view(), emulation_.permutation.slot_of_row,
                              request_.inputs->routing().topk_weights, request_.config, rows);
      report_.x_scale = judge_input_scale("x (gate's and up's)", rows, emulation_.staged_x, offsets);
    }
    if (request_.options.intermediate_scale != ScalePolicy::kDynamicToken) {
      report_.intermediate_scale = judge_input_scale(
          "the intermediate (down's)", emulation_.activation_view(), emulation_.staged_intermediate, offsets);
    }
  }

  void judge_shared_input_scales() {
    const SharedTrace& shared = *emulation_.shared;
    const std::array<int32_t, 2> all_tokens = {0, static_cast<int32_t>(emulation_.tokens)};
    if (request_.options.x_scale != ScalePolicy::kDynamicToken) {
      report_.shared_x_scale =
          judge_input_scale("x of the shared expert", request_.inputs->x_view(), shared.staged_x, all_tokens);
    }
    if (request_.options.intermediate_scale != ScalePolicy::kDynamicToken) {
      report_.shared_intermediate_scale =
          judge_input_scale("the intermediate of the shared expert", emulation_.shared_activation_view(),
                            shared.staged_intermediate, all_tokens);
    }
  }

  /// Rows in groups by expert; a single group of all tokens is the shared expert's.
  InputScaleReport judge_input_scale(const std::string& what, MatrixView<const Bf16> rows,
                                     const StagedBuffers& staged, std::span<const int32_t> group_offsets) {
    const ScaleLoss loss = worst_scale_loss(rows, staged, request_.options, group_offsets);
    const bool is_shared = group_offsets.data() != emulation_.permutation.group_offsets.data();
    const int64_t expert =
        loss.expert < 0 || is_shared ? -1 : request_.expert_ids[static_cast<size_t>(loss.expert)];
    if (!(loss.severity() <= kInputScaleLimit)) {
      add_finding(
          "activations",
          fmt::format(
              "input_scale of {}: {}a median row loses {:.3g} x what a scale by token loses, and "
              "what saturates is {:.3g} x its noise: is the scale too small, too large or a reciprocal?{}",
              what, is_shared ? "" : fmt::format("expert {}: ", expert), loss.median_ratio,
              loss.clipped_over_noise,
              request_.inputs->made_up ? " (x is made up; real hidden states, as --input, decide)" : ""));
    }
    return {expert, loss.severity(), kInputScaleLimit};
  }

  void compare_kernel() {
    ComparisonReport& kernel = report_.kernel_stages;
    request_.progress(fmt::format("the weights, made ready for the backend {}", request_.backend->name()));
    const auto layer = request_.backend->make_layer(*request_.nvfp4, request_.config, request_.options);
    const LayerPlan plan = layer->plan(request_.inputs->tokens);
    report_.kernel = fmt::format("{} ({})", plan.kernel, plan.reason);
    if (request_.backend == &reference_backend()) {
      kernel.left_out = "not applicable: the backend is the reference, which is the emulation";
      return;
    }
    request_.progress(fmt::format("the backend {}", request_.backend->name()));
    const auto& shared = request_.nvfp4->shared;
    LayerTrace run = trace(*layer, *request_.inputs, shared ? &*shared : nullptr, request_.backend->memory());
    kernel.limit_origin = "one bf16 ulp an element; each stage fed with the backend's own previous output";
    if (!judge_permutation(run)) return;
    report_.kernel_end_to_end = compare_traces(emulation_, run, request_);
    chart_worst_token(emulation_, "reference (emulation)", run,
                      fmt::format("backend {}", request_.backend->name()));
    request_.progress("the emulation, fed with the backend's stages");
    kernel.stages = teacher_forced(run);
    judge("kernel", kernel.stages);
    if (first_culprit_ == "kernel" && request_.explains)
      report_.explanations = explain_backend(request_, run);
  }

  /// Stages can be compared only if rows mean the same on both sides.
  bool judge_permutation(const LayerTrace& run) {
    const Permutation &expected = emulation_.permutation, &found = run.permutation;
    if (expected.group_offsets == found.group_offsets && expected.slot_of_row == found.slot_of_row &&
        expected.row_of_slot == found.row_of_slot) {
      return true;
    }
    report_.kernel_stages.left_out = "the backend permutes rows differently: stages can't be paired";
    add_finding("kernel", "permutation: group offsets or the order of rows differ from the specification");
    return false;
  }

  std::vector<StageReport> teacher_forced(LayerTrace& run) {
    LayerTrace expected = expected_stages(run, emulation_, request_);
    judge_staging(expected, run);
    settle_nonfinite(expected, run);
    std::vector<StageReport> stages = compare_traces(expected, run, request_);
    for (StageReport& stage : stages) stage.limit = kKernelLimit;
    chart("kernel", expected, run);
    judge_worst_tokens(expected, run);
    return stages;
  }

  /// Staging is specified bit for bit: x from the input, the intermediate from the backend's own activation.
  void judge_staging(const LayerTrace& expected, const LayerTrace& run) {
    StagingReport staging;
    const auto count = [](const StagedBuffers& due, const StagedBuffers& found, int64_t& values,
                          int64_t& different) {
      const auto add = [&](const auto& a, const auto& b) {
        values += static_cast<int64_t>(a.size());
        for (size_t i = 0; i < a.size(); ++i) {
          if constexpr (std::is_same_v<std::decay_t<decltype(a[i])>, float>) {
            different += !is_same(a[i], b[i]);
          } else {
            different += !(a[i] == b[i]);
          }
        }
      };
      add(due.values, found.values);
      add(due.codes, found.codes);
      add(due.scales, found.scales);
      add(due.residual_codes, found.residual_codes);
      add(due.residual_scales, found.residual_scales);
      add(due.row_scales, found.row_scales);
    };
    count(emulation_.staged_x, run.staged_x, staging.x_values, staging.x_different);
    count(expected.staged_intermediate, run.staged_intermediate, staging.intermediate_values,
          staging.intermediate_different);
    if (run.shared) {
      count(emulation_.shared->staged_x, run.shared->staged_x, staging.x_values, staging.x_different);
      count(expected.shared->staged_intermediate, run.shared->staged_intermediate,
            staging.intermediate_values, staging.intermediate_different);
    }
    report_.staging = staging;
    const auto judge_one = [&](const char* what, int64_t different, int64_t values) {
      if (different > 0) {
        add_finding(
            "kernel",
            fmt::format("staging of {}: {} of {} codes and scales differ from the specification, which "
                        "is bit for bit",
                        what, different, values));
      }
    };
    judge_one("x", staging.x_different, staging.x_values);
    judge_one("the intermediate", staging.intermediate_different, staging.intermediate_values);
  }

  void judge_worst_tokens(const LayerTrace& expected, const LayerTrace& run) {
    const auto judge_one = [&](Stage stage, MatrixView<const Bf16> a, MatrixView<const Bf16> b) {
      const Comparison comparison = compare(a, b);
      if (comparison.rel_l2 <= kKernelLimit && !(comparison.worst_row_rel_l2 <= kKernelWorstTokenLimit)) {
        add_finding("kernel", fmt::format("{}: row {} alone has relative L2 {:.3g}, above {:.3g}",
                                          kStageNames[static_cast<size_t>(stage)], comparison.worst_row,
                                          comparison.worst_row_rel_l2, kKernelWorstTokenLimit));
      }
    };
    judge_one(Stage::kL1, expected.h_view(), run.h_view());
    judge_one(Stage::kActivation, expected.activation_view(), run.activation_view());
    judge_one(Stage::kL2, expected.z_view(), run.z_view());
    if (run.shared) {
      judge_one(Stage::kSharedL1, expected.shared_h_view(), run.shared_h_view());
      judge_one(Stage::kSharedActivation, expected.shared_activation_view(), run.shared_activation_view());
      judge_one(Stage::kSharedL2, expected.shared_z_view(), run.shared_z_view());
    }
    judge_one(Stage::kOut, expected.y_view(), run.y_view());
  }

  const LayertestRequest& request_;
  LayertestReport report_;
  LayerTrace dequantized_, emulation_;
  std::string first_culprit_;
};

}  // namespace

int exit_code_of(const LayertestReport& report) {
  return report.verdict == "fine" ? kExitFine : kExitFinding;
}

LayertestReport run_layertest(const LayertestRequest& request) {
  return Layertest(request).run();
}

}  // namespace fourfold
