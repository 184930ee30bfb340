// FOURFOLD_KERNEL describes the sm_120 kernel with output FOURFOLD_OUTPUT, made to run on Hopper.
// clang-format off: the emulation comes before CUTLASS
#include "blackwell/cutlass_gemm.cuh"
#include "blackwell_emulation.cuh"
// clang-format on

namespace fourfold::blackwell {

struct EmulatedSm120 : Sm120 {};

GemmKernel FOURFOLD_KERNEL() {
  return CutlassGemm<EmulatedSm120, FOURFOLD_OUTPUT>::describe();
}

}  // namespace fourfold::blackwell
