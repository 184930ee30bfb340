// GEMMs outside a layer, whose weights come as a checkpoint stores them: every call packs what it reads.
#pragma once

#include "cpu/kernels.h"
#include "fourfold/gemm.h"

namespace fourfold::cpu {

size_t gemm_workspace_bytes(const Kernels& kernels, const GroupedGemmArgs& args);

/// Throws Error for arguments that do not fit each other, a workspace that is too small, and float64 sums.
void gemm(const Kernels& kernels, const GemmArgs& args);
void grouped_gemm(const Kernels& kernels, const GroupedGemmArgs& args);

}  // namespace fourfold::cpu
