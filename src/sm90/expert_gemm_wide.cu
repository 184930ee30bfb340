// The wide shapes of the grouped GEMM (sm90/gemm_choice.h).
#include "sm90/gemm_instances.cuh"

namespace fourfold::sm90 {

void launch_wide_gemm(const GemmLaunch& launch) {
  launch_table_entry<4>(launch);
}

}  // namespace fourfold::sm90
