// The backend "blackwell" with kernels of the caller's choice: tests run it with emulated ones.
#pragma once

#include <memory>

#include "blackwell/grouped_gemm.h"
#include "fourfold/moe_layer.h"

namespace fourfold::blackwell {

/// Runs `kernels`, which live as long as it, on GPUs of their compute capability.
std::unique_ptr<Backend> make_backend(const GemmKernels& kernels);

}  // namespace fourfold::blackwell
