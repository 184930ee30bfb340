// `fourfold doctor --self-test`: every kernel of the GPU's backend against the reference, and NVFP4 against
// cuBLASLt.
#pragma once

#include <functional>
#include <string_view>
#include <vector>

#include "tools/doctor.h"

namespace fourfold {

/// Of every backend that runs on the GPU that is here; empty where there is none. Layers in the activation
/// formats and scale policies that lead to other kernels, GEMMs alone in several shapes, and where the
/// backend multiplies FP4 natively its dense GEMM against cuBLASLt's (left out, with a note, where the
/// library has none). Never throws Error.
std::vector<SelfTest> run_gpu_self_tests(const std::function<void(std::string_view)>& progress);

}  // namespace fourfold
