// The compiled kernels of one entry of the table in sm90/gemm_choice.h. Each entry is a translation unit of
// its own: wide takes half a minute of compilation.
#pragma once

#include "sm90/gemm_kernel.cuh"
#include "sm90/gemm_launch.cuh"

namespace fourfold::sm90 {

template <int kIndex>
void launch_table_entry(const GemmLaunch& launch) {
  const auto with = [&]<int kTerms> {
    using Traits = TableTraits<kIndex, kTerms>;
    launch_gemm_kernel<Traits>(launch, expert_gemm_kernel<Traits>);
  };
  launch.terms == 1 ? with.template operator()<1>() : with.template operator()<2>();
}

}  // namespace fourfold::sm90
