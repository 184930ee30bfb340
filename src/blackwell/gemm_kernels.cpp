// The table of kernels that are compiled in. The build names their architectures: FOURFOLD_SM_100A and so on.
#include <array>

#include "blackwell/grouped_gemm.h"

namespace fourfold::blackwell {

// One translation unit each, src/blackwell/cutlass_gemm.cu.
GemmKernel sm_100a_bf16();
GemmKernel sm_100a_float32();
GemmKernel sm_103a_bf16();
GemmKernel sm_103a_float32();
GemmKernel sm_120a_bf16();
GemmKernel sm_120a_float32();
GemmKernel sm_121a_bf16();
GemmKernel sm_121a_float32();

namespace {

constexpr std::string_view kTensorMemoryMultiply =
    "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16";
constexpr std::string_view kWarpMultiply = "mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X";

#if defined(FOURFOLD_SM_100A)
const GemmKernels* sm_100a() {
  static const GemmKernels kernels{"sm_100a",        10, 0, kTensorMemoryMultiply, sm_100a_bf16(),
                                   sm_100a_float32()};
  return &kernels;
}
#endif
#if defined(FOURFOLD_SM_103A)
const GemmKernels* sm_103a() {
  static const GemmKernels kernels{"sm_103a",        10, 3, kTensorMemoryMultiply, sm_103a_bf16(),
                                   sm_103a_float32()};
  return &kernels;
}
#endif
#if defined(FOURFOLD_SM_120A)
const GemmKernels* sm_120a() {
  static const GemmKernels kernels{"sm_120a", 12, 0, kWarpMultiply, sm_120a_bf16(), sm_120a_float32()};
  return &kernels;
}
#endif
#if defined(FOURFOLD_SM_121A)
const GemmKernels* sm_121a() {
  static const GemmKernels kernels{"sm_121a", 12, 1, kWarpMultiply, sm_121a_bf16(), sm_121a_float32()};
  return &kernels;
}
#endif

}  // namespace

std::span<const GemmKernels* const> compiled_kernels() {
  static const std::array list = {
#if defined(FOURFOLD_SM_100A)
    sm_100a(),
#endif
#if defined(FOURFOLD_SM_103A)
    sm_103a(),
#endif
#if defined(FOURFOLD_SM_120A)
    sm_120a(),
#endif
#if defined(FOURFOLD_SM_121A)
    sm_121a(),
#endif
  };
  return list;
}

const GemmKernels* kernels_of(int major, int minor) {
  for (const GemmKernels* kernels : compiled_kernels()) {
    if (kernels->major == major && kernels->minor == minor) return kernels;
  }
  return nullptr;
}

}  // namespace fourfold::blackwell
