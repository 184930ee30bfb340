#include "checkpoint/weight_rules.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "base/fail.h"
#include "checkpoint/finding_text.h"

namespace fourfold {
namespace {

double part_of(int64_t part, int64_t whole) {
  return whole == 0 ? 0.0 : static_cast<double>(part) / static_cast<double>(whole);
}

float median_of(std::vector<float> values) {
  if (values.empty()) return 0.0f;
  const auto middle = values.begin() + static_cast<int64_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

/// Judges one matrix, slice by slice.
class MatrixJudge {
 public:
  MatrixJudge(const SurveyedMatrix& matrix, const std::vector<SliceCounts>& counts, int64_t layer,
              std::vector<Finding>& findings)
      : matrix_(matrix), counts_(counts), layer_(layer), findings_(findings) {}

  void run() {
    for (size_t slice = 0; slice < counts_.size(); ++slice) {
      judge_scales(slice);
      judge_values(slice);
      judge_zeros(slice);
    }
    judge_globals();
  }

 private:
  void add(FindingKind kind, const Tensor* tensor, const std::string& found, const std::string& remedy) {
    findings_.push_back(
        {kind, layer_, tensor ? tensor->name : matrix_.name, tensor ? tensor->file : "", found, remedy});
  }

  /// "expert 3: " where one tensor holds all experts.
  std::string whose(size_t slice) const {
    return matrix_.slices.size() > 1 ? fmt::format("expert {}: ", slice) : "";
  }

  void judge_scales(size_t index) {
    const MatrixSlice& slice = matrix_.slices[index];
    const ScaleCounts& scales = counts_[index].scales;
    const int64_t total = scales.total();
    if (total == 0) return;
    if (scales.nan() > 0) {
      const auto [row, block] = *find_scale(slice.scale_type, slice.scales, is_nan_scale);
      add(FindingKind::kNanScale, matrix_.scales,
          whose(index) + nan_scales_text(scales.nan(), total, slice.is_transposed ? block : row,
                                         slice.is_transposed ? row : block),
          fmt::format("the values of these blocks are NaN: {}", kConvertAgain));
    }
    if (scales.negative() > 0) {
      const auto [row, block] = *find_scale(slice.scale_type, slice.scales, is_negative_scale);
      add(FindingKind::kNegativeScale, matrix_.scales,
          fmt::format("{}{} negative scale{} of {}, the first at row {}, block {}", whose(index),
                      scales.negative(), scales.negative() == 1 ? "" : "s", total,
                      slice.is_transposed ? block : row, slice.is_transposed ? row : block),
          fmt::format("no converter writes a negative scale, so bytes are damaged: {}", kConvertAgain));
    }
    judge_amount(
        FindingKind::kSaturatedScales, index, scales.saturated(), total, kMostSaturated, "448, the largest",
        "the global scale is too small and large weights were clipped: convert again, with amax of the "
        "whole matrix");
    judge_amount(
        FindingKind::kSubnormalScales, index, scales.subnormal(), total, kMostSubnormal,
        "subnormal (below 2^-6), which have 3 bits or fewer",
        "the global scale is too large for this matrix, as when one is shared with a matrix of larger "
        "weights: convert again, with a global scale of its own");
  }

  void judge_amount(FindingKind kind, size_t index, int64_t part, int64_t total, double limit,
                    const char* what, const char* remedy) {
    if (part_of(part, total) <= limit) return;
    add(kind, matrix_.scales,
        fmt::format("{}{} of {} block scales are {}: {:.0f}%, expected at most {:.0f}%", whose(index), part,
                    total, what, 100.0 * part_of(part, total), 100.0 * limit),
        remedy);
  }

  void judge_values(size_t index) {
    const ValueCounts& values = counts_[index].values;
    if (values.non_finite == 0) return;
    add(FindingKind::kNonFiniteWeights, matrix_.weight,
        fmt::format("{}{} of {} values that were read are NaN or infinite", whose(index), values.non_finite,
                    values.values),
        kConvertAgain);
  }

  void judge_zeros(size_t index) {
    const SliceCounts& counts = counts_[index];
    const char* remedy =
        "an unfinished download leaves zeros, and so does a failed write: compare the file's "
        "checksum";
    if (counts.scales.total() > 0 && counts.scales.zero() == counts.scales.total()) {
      add(FindingKind::kZeroWeights, matrix_.scales,
          fmt::format("{}all {} block scales are zero", whose(index), counts.scales.total()), remedy);
    } else if (counts.codes.blocks > 0 && counts.codes.zero_blocks == counts.codes.blocks) {
      add(FindingKind::kZeroWeights, matrix_.weight,
          fmt::format("{}all codes of {} blocks are zero", whose(index), counts.codes.blocks), remedy);
    } else if (counts.values.values > 0 && counts.values.zeros == counts.values.values) {
      add(FindingKind::kZeroWeights, matrix_.weight,
          fmt::format("{}all {} values are zero", whose(index), counts.values.values), remedy);
    }
  }

  /// Bad globals are the survey's: here they have sensible values.
  void judge_globals() {
    for (size_t i = 0; i < matrix_.globals.size() && !counts_.empty(); ++i) {
      ScaleCounts scales = counts_[std::min(i, counts_.size() - 1)].scales;
      if (matrix_.globals.size() == 1) {  // one for all slices
        for (size_t other = 1; other < counts_.size(); ++other) scales.add(counts_[other].scales);
      }
      const float largest = scales.quantile(1.0).value_or(0.0f);
      if (!looks_reciprocal_global(matrix_.globals[i], largest)) continue;
      add(FindingKind::kReciprocalGlobal, matrix_.global,
          fmt::format(
              "{}multiplies by {:.6g}, so that the largest weight would be {:.3g}; by its reciprocal it "
              "would be {:.3g}",
              matrix_.globals.size() > 1 ? whose(i) : "", matrix_.globals[i],
              kE2m1Max * largest * matrix_.globals[i], kE2m1Max * largest / matrix_.globals[i]),
          "`weight_scale_2` (ModelOpt) multiplies, `weight_global_scale` (compressed-tensors) divides: store "
          "1/x, or name it as what it is");
    }
  }

  const SurveyedMatrix& matrix_;
  const std::vector<SliceCounts>& counts_;
  int64_t layer_;
  std::vector<Finding>& findings_;
};

std::string input_scale_name(const SurveyedMatrix& matrix, bool is_fused) {
  if (is_fused && !matrix.is_shared) return matrix.name + "_input_scale";
  const bool divides = matrix.global != nullptr && matrix.global->name.ends_with("weight_global_scale");
  return matrix.name + (divides ? ".input_global_scale" : ".input_scale");
}

}  // namespace

bool looks_reciprocal_global(float multiplier, float largest_scale) {
  constexpr float kEnormous = 1000.0f, kOrdinary = 100.0f;
  const float largest = kE2m1Max * largest_scale;
  return largest * multiplier > kEnormous && largest / multiplier <= kOrdinary;
}

bool looks_reciprocal_input(float scale, float median, bool into_down) {
  // amax of 21,504 for a hidden state after its norm, 172,032 for an intermediate.
  if (scale >= (into_down ? 64.0f : 8.0f)) return true;
  // Or one that stands out, and would not by its reciprocal.
  const float product = scale * median;
  return scale >= 1.0f && scale > 100.0f * median && product > 0.25f && product < 4.0f;
}

void judge_matrix(const SurveyedMatrix& matrix, const std::vector<SliceCounts>& counts, int64_t layer,
                  std::vector<Finding>& findings) {
  MatrixJudge(matrix, counts, layer, findings).run();
}

void judge_input_scales(const LayerSurvey& survey, std::vector<Finding>& findings) {
  const auto& matrices = survey.matrices;
  const bool any = std::any_of(matrices.begin(), matrices.end(),
                               [](const SurveyedMatrix& m) { return m.input_scale != nullptr; });
  if (!any) return;
  std::map<std::string, std::vector<float>> usable;
  for (const SurveyedMatrix& matrix : matrices) {
    for (const float scale : matrix.input_scales) {
      if (is_usable_input_scale(scale)) usable[matrix.role].push_back(scale);
    }
  }
  const auto add = [&](FindingKind kind, const SurveyedMatrix& matrix, std::string found,
                       const char* remedy) {
    const Tensor* tensor = matrix.input_scale;
    findings.push_back({kind, survey.layer, tensor ? tensor->name : input_scale_name(matrix, survey.is_fused),
                        tensor ? tensor->file : "", std::move(found), remedy});
  };
  for (const SurveyedMatrix& matrix : matrices) {
    if (matrix.is_nvfp4() && matrix.input_scale == nullptr) {
      add(FindingKind::kMissingInputScale, matrix, "none, while others of the layer have one",
          "calibrate again with more tokens (this expert saw none), or run with dynamic activation scales");
    }
    const bool into_down = matrix.role.ends_with("down");
    for (size_t i = 0; i < matrix.input_scales.size(); ++i) {
      const float scale = matrix.input_scales[i];
      const std::string whose = matrix.input_scales.size() > 1 ? fmt::format("expert {}: ", i) : "";
      if (!is_usable_input_scale(scale)) {
        add(FindingKind::kBadInputScale, matrix,
            fmt::format("{}{}, expected a positive finite number (amax / 2688)", whose, scale),
            "calibrate again with more tokens: engines turn it into inf, then NaN, for the prompts that "
            "reach "
            "this expert");
      } else if (looks_reciprocal_input(scale, median_of(usable[matrix.role]), into_down)) {
        add(FindingKind::kReciprocalInputScale, matrix,
            fmt::format(
                "{}{:.6g}, which stands for activations up to {:.3g}; its reciprocal stands for {:.3g}",
                whose, scale, scale * kNvfp4Range, kNvfp4Range / scale),
            "`input_scale` (ModelOpt) multiplies, `input_global_scale` (compressed-tensors) divides: store "
            "1/x");
      }
    }
  }
}

}  // namespace fourfold
