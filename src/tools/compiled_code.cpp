#include "tools/compiled_code.h"

#include <fmt/format.h>

#if FOURFOLD_HAS_BLACKWELL
#include "blackwell/grouped_gemm.h"
#endif

namespace fourfold {

std::vector<std::string> describe_compiled_code() {
  std::vector<std::string> lines;
#if FOURFOLD_HAS_CUDA
  lines.push_back("sm_90a   wgmma.mma_async on decoded bf16 (compute capability 9.0)");
#endif
#if FOURFOLD_HAS_BLACKWELL
  for (const blackwell::GemmKernels& kernels : blackwell::compiled_kernels()) {
    lines.push_back(fmt::format("{:<8} {} (compute capability {})", kernels.architecture, kernels.instruction,
                                kernels.capability()));
  }
#endif
  return lines;
}

}  // namespace fourfold
