// The narrow shapes of the grouped GEMM (sm90/gemm_choice.h).
#include "sm90/gemm_kernel.cuh"
#include "sm90/gemm_launch.cuh"

namespace fourfold::sm90 {
namespace {

template <int kTerms, bool kPaired>
void launch_shape(const GemmLaunch& launch) {
  using Traits = TableTraits<0, kTerms, kPaired>;
  launch_gemm_kernel<Traits>(launch, expert_gemm_kernel<Traits>);
}

}  // namespace

void launch_narrow_gemm(const GemmLaunch& launch) {
  if (launch.terms == 1) {
    launch.paired ? launch_shape<1, true>(launch) : launch_shape<1, false>(launch);
  } else {
    launch.paired ? launch_shape<2, true>(launch) : launch_shape<2, false>(launch);
  }
}

}  // namespace fourfold::sm90
