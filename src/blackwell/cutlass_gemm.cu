// One kernel of one architecture; the build names both: FOURFOLD_TARGET (Sm100, Sm103 or Sm120),
// FOURFOLD_OUTPUT (cutlass::bfloat16_t or float), and FOURFOLD_KERNEL, the function that describes it.
#include "blackwell/cutlass_gemm.cuh"

namespace fourfold::blackwell {

GemmKernel FOURFOLD_KERNEL() {
  return CutlassGemm<FOURFOLD_TARGET, FOURFOLD_OUTPUT>::describe();
}

}  // namespace fourfold::blackwell
