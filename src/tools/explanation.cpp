#include "tools/explanation.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>

namespace fourfold {
namespace {

/// A whole model may have many layers with a finding.
constexpr double kBackendWork = 3e10;

std::optional<diagnosis::Staging> staging_of(const LayerOptions& options) {
  diagnosis::Staging staging{options.activations, ScalePolicy::kDynamicToken};
  if (options.activations == ActivationFormat::kNvfp4x2 || options.activation_rule != ScaleRule::kAmax) {
    return std::nullopt;
  }
  if (options.activations != ActivationFormat::kNvfp4) return staging;
  staging.policy = options.x_scale;
  const bool is_replayed =
      options.x_scale == options.intermediate_scale && options.x_scale != ScalePolicy::kDynamicTensor;
  return is_replayed ? std::optional(staging) : std::nullopt;
}

/// Rows of a trace lie by expert, those of a candidate by slot.
std::vector<float> by_slot(MatrixView<const Bf16> rows, const Permutation& permutation) {
  const auto cols = static_cast<size_t>(rows.cols);
  std::vector<float> slots(permutation.row_of_slot.size() * cols);
  for (int64_t row = 0; row < rows.rows; ++row) {
    const auto slot = static_cast<size_t>(permutation.slot_of_row[static_cast<size_t>(row)]);
    for (size_t col = 0; col < cols; ++col)
      slots[slot * cols + col] = static_cast<float>(rows(row, static_cast<int64_t>(col)));
  }
  return slots;
}

}  // namespace

std::vector<ReportedExplanation> reported_explanations(const diagnosis::Diagnosis& diagnosis) {
  std::vector<ReportedExplanation> reported;
  const auto add = [&](const char* rank, const diagnosis::Explanation& one) {
    reported.push_back(
        {one.faults.empty() ? "no fault: the engine computes what is specified"
                            : fmt::format("{}: {}", one.id(), one.sentence()),
         one.distance,
         fmt::format("{}; {:.2e} off, where engines that round differently are {:.2e} apart (explained up to "
                     "{:.2e}); activations: {}",
                     rank, one.distance, one.noise, one.limit, describe(one.staging))});
  };
  const bool is_explained = diagnosis.verdict == diagnosis::Verdict::kExplained;
  if (diagnosis.verdict == diagnosis::Verdict::kFine) {
    add("as it should be", diagnosis.sound);
    return reported;
  }
  if (diagnosis.best) add(is_explained ? "the best" : "the best, and not near", *diagnosis.best);
  for (const auto& same : diagnosis.alike) add("does the same on these data", same);
  if (diagnosis.runner_up) add("the runner-up", *diagnosis.runner_up);
  add("as it should be", diagnosis.sound);
  return reported;
}

std::vector<ReportedExplanation> explain_backend(const LayertestRequest& request, const LayerTrace& run) {
  const std::optional<diagnosis::Staging> staging = staging_of(request.options);
  if (!staging) return {};
  const LayerInputs& inputs = *request.inputs;
  diagnosis::Subject subject;
  subject.weights = request.nvfp4;
  subject.config = request.config;
  subject.routing_given = true;
  subject.tokens = inputs.tokens;
  subject.top_k = inputs.top_k;
  subject.x = inputs.x;
  subject.topk_ids = inputs.topk_ids;
  subject.topk_weights = inputs.topk_weights;
  diagnosis::Candidate candidate;
  candidate.output = {run.y.begin(), run.y.end()};
  candidate.h = by_slot(run.h_view(), run.permutation);
  candidate.activation = by_slot(run.activation_view(), run.permutation);
  diagnosis::MatcherOptions options;
  options.stagings = {*staging};
  options.work = kBackendWork;
  options.progress = request.progress;
  return reported_explanations(diagnose(subject, candidate, options));
}

}  // namespace fourfold
