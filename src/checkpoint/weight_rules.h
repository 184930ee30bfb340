// The rules that judge what was counted. Each looks at one matrix, or at the matrices of one layer.
#pragma once

#include <vector>

#include "checkpoint/layer_survey.h"
#include "fourfold/inspection.h"

namespace fourfold {

/// What was counted of one slice of a matrix.
struct SliceCounts {
  ScaleCounts scales;
  CodeCounts codes;
  ValueCounts values;
};

/// Whether a global scale looks like the reciprocal of one: with block scales up to `largest_scale`, weights
/// would exceed 1000, and be ordinary, at most 100, by its reciprocal. Weights of trained models hardly
/// exceed 100; scales of ours would have to be 27 or more.
bool looks_reciprocal_global(float multiplier, float largest_scale);

/// The same of an input scale (amax / 2688), beside the median of its kind in the layer; `into_down`: of the
/// intermediate, which knows larger outliers than a normalised hidden state.
bool looks_reciprocal_input(float scale, float median, bool into_down);

/// `counts`: one a slice of `matrix`.
void judge_matrix(const SurveyedMatrix& matrix, const std::vector<SliceCounts>& counts, int64_t layer,
                  std::vector<Finding>& findings);

/// Input scales of a layer's NVFP4 matrices: all have one, or none.
void judge_input_scales(const LayerSurvey& survey, std::vector<Finding>& findings);

}  // namespace fourfold
