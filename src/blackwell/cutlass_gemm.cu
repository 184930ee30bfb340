// The kernels of one architecture; the build names both: FOURFOLD_TARGET (Sm100, Sm103 or Sm120) and
// FOURFOLD_KERNELS, the function that describes them. Both outputs in one unit: the second adds a twelfth to
// the time of the first.
#include "blackwell/cutlass_gemm.cuh"

namespace fourfold::blackwell {

OutputKernels FOURFOLD_KERNELS() {
  return describe_kernels<FOURFOLD_TARGET>();
}

}  // namespace fourfold::blackwell
