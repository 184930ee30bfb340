// The table of kernels that are compiled in. The build names their architectures: FOURFOLD_SM_100A and so on.
#include <array>

#include "blackwell/grouped_gemm.h"

namespace fourfold::blackwell {

// One translation unit each, src/blackwell/cutlass_gemm.cu.
OutputKernels sm_100a();
OutputKernels sm_103a();
OutputKernels sm_120f();

namespace {

constexpr std::string_view kTensorMemoryMultiply =
    "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16";
constexpr std::string_view kWarpMultiply = "mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X";

}  // namespace

std::string GemmKernels::capability() const {
  const std::string first = std::to_string(major) + "." + std::to_string(minor);
  return is_family() ? first + " and later of " + std::to_string(major) : first;
}

std::span<const GemmKernels> compiled_kernels() {
  static const std::array list = {
#if defined(FOURFOLD_SM_100A)
    GemmKernels{sm_100a(), "sm_100a", 10, 0, kTensorMemoryMultiply},
#endif
#if defined(FOURFOLD_SM_103A)
    GemmKernels{sm_103a(), "sm_103a", 10, 3, kTensorMemoryMultiply},
#endif
#if defined(FOURFOLD_SM_120F)
    GemmKernels{sm_120f(), "sm_120f", 12, 0, kWarpMultiply},
#endif
  };
  return list;
}

const GemmKernels* kernels_of(int major, int minor) {
  for (const GemmKernels& kernels : compiled_kernels()) {
    if (kernels.runs_on(major, minor)) return &kernels;
  }
  return nullptr;
}

}  // namespace fourfold::blackwell
