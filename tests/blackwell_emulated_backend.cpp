// The backend "blackwell" on Hopper, with the emulated sm_120 kernels (blackwell_emulation.cuh): what the
// layer tests beside it run. Everything but the multiply instruction is what runs on the chip.
#include <memory>

#include "blackwell/blackwell_backend.h"
#include "cuda_support.h"
#include "tested_backend.h"

namespace fourfold {
namespace blackwell {

OutputKernels emulated_sm_120();  // blackwell_emulated_kernels.cu

}  // namespace blackwell

const Backend& tested_backend() {
  static const blackwell::GemmKernels kernels{blackwell::emulated_sm_120(), "sm_120 emulated on sm_90a", 9, 0,
                                              "plain code"};
  static const std::unique_ptr<Backend> backend = blackwell::make_backend(kernels);
  return *backend;
}

std::string why_not_on_this_gpu() {
  return tested_backend().why_unavailable();
}

}  // namespace fourfold
