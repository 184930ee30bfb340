// The GEMMs of a Backend on Hopper: weights in the checkpoint's form, packed into the workspace on every
// call. Layers pack once instead.
#pragma once

#include <cstddef>

#include "fourfold/gemm.h"

namespace fourfold::sm90 {

/// Workspace for grouped_gemm with these shapes, and for gemm with the first weight alone.
size_t grouped_gemm_workspace_bytes(const GroupedGemmArgs& args);

/// Enqueue alone, on the current device. NVFP4 weights with N of any size; throw Error for others, for
/// float64 sums and for a workspace that is too small or missing.
void grouped_gemm(const GroupedGemmArgs& args);
void gemm(const GemmArgs& args);

}  // namespace fourfold::sm90
