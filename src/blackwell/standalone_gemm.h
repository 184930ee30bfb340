// The GEMMs of a Backend on Blackwell: weights in the checkpoint's form, prepared in the workspace on every
// call. Layers prepare once instead.
#pragma once

#include <cstddef>

#include "blackwell/grouped_gemm.h"
#include "fourfold/gemm.h"

namespace fourfold::blackwell {

/// Workspace for grouped_gemm with these shapes, and for gemm with the first weight alone.
size_t grouped_gemm_workspace_bytes(const GemmKernels& kernels, const GroupedGemmArgs& args);

/// Enqueue alone, on the current device. NVFP4 weights with N of any size, nvfp4 and nvfp4x2 activations;
/// throw Error for others, for float64 sums and for a workspace that is too small or missing.
void grouped_gemm(const GemmKernels& kernels, const GroupedGemmArgs& args);
void gemm(const GemmKernels& kernels, const GemmArgs& args);

}  // namespace fourfold::blackwell
