// Comparing two runs of a layer stage by stage.
#pragma once

#include <vector>

#include "tools/layer_trace.h"
#include "tools/layertest.h"

namespace fourfold {

/// l1, activation, l2, the shared expert's where the layer has one, and out, of two runs with the same
/// routing.
std::vector<StageReport> compare_traces(const LayerTrace& reference, const LayerTrace& candidate,
                                        const LayertestRequest& request);

/// What the specification makes of each stage of `run` when fed with the run's own output of the stage before
/// ("teacher-forced"). Of the staged arrays, the intermediate's; x is staged from the input. `emulation` is
/// the specification's own run: a GEMM that was fed with the same rows there is not computed again.
LayerTrace expected_stages(const LayerTrace& run, const LayerTrace& emulation,
                           const LayertestRequest& request);

}  // namespace fourfold
