// A small serving engine with a bug: what the self-test of layertest diagnoses.
//
// It shares no code with the replay of src/diagnosis: weights are stacked into flat arrays as an engine
// stacks them, decoded by tables of its own, multiplied in another order of sums, and every fault is a wrong
// index, a wrong table or a missing step here.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "diagnosis/faults.h"
#include "diagnosis/subject.h"

namespace fourfold {

/// How sound engines differ.
struct EngineStyle {
  diagnosis::Staging staging;
  bool fused = false;                ///< h and the intermediate are not rounded to bf16
  bool bf16_sums = false;            ///< experts are summed in bf16, in descending order of k
  bool reciprocal_multiply = false;  ///< the quantizer multiplies by reciprocals instead of dividing
  bool keeps_stages = false;         ///< gives h and the activation too
};

/// Runs the layer of `subject` with `faults` in it.
diagnosis::Candidate run_planted_engine(const diagnosis::Subject& subject, const EngineStyle& style,
                                        const std::vector<diagnosis::Fault>& faults);

}  // namespace fourfold
