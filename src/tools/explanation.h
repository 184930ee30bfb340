// What the matcher of src/diagnosis says, for reports; and of a backend that layertest found at fault.
#pragma once

#include <vector>

#include "diagnosis/matcher.h"
#include "tools/layer_trace.h"
#include "tools/layertest.h"

namespace fourfold {

/// The best explanation, those that do the same on these data, the runner-up, and the layer as it should be;
/// of what is fine, that alone.
std::vector<ReportedExplanation> reported_explanations(const diagnosis::Diagnosis& diagnosis);

/// Which known fault makes what the backend computed in `run`. Empty where the layer's activations are staged
/// in a way that the replay has not: nvfp4x2, two policies, a scale by tensor.
std::vector<ReportedExplanation> explain_backend(const LayertestRequest& request, const LayerTrace& run);

}  // namespace fourfold
