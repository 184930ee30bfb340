// The compiled kernels of one entry of the table in sm90/gemm_choice.h. Each entry is a translation unit of
// its own: they take a minute of compilation.
#pragma once

#include "sm90/gemm_kernel.cuh"
#include "sm90/gemm_launch.cuh"

namespace fourfold::sm90 {

template <int kIndex>
void launch_table_entry(const GemmLaunch& launch) {
  const auto with = [&]<int kTerms, bool kPaired, bool kGathered = false> {
    using Traits = TableTraits<kIndex, kTerms, kPaired, kGathered>;
    launch_gemm_kernel<Traits>(launch, expert_gemm_kernel<Traits>);
  };
  if constexpr (kGemmKernels[kIndex].gathers) {
    if (launch.gathered) return with.template operator()<1, true, true>();
  }
  if (launch.terms == 1) {
    launch.paired ? with.template operator()<1, true>() : with.template operator()<1, false>();
  } else {
    launch.paired ? with.template operator()<2, true>() : with.template operator()<2, false>();
  }
}

}  // namespace fourfold::sm90
