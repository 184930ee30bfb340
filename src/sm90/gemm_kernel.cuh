// Grouped GEMM for Hopper: d[m,c] = alpha(m,c) * sum_k tokens[m,k] * w[e,c,k], e = group of row m.
//
// - shapes: tokens [M,K] bf16, one or two terms; w packed (sm90/packed_layout.h); group_offsets [E+1];
//   d [M,C]
// - needs: K and C multiples of 16; groups may be empty or ragged
// - numerics: weights decode exactly to bf16; float32 accumulation by WGMMA; alpha, bias and activation at
//   the rounding points of docs/formats.md, section 7
// - oracle: a float64 kernel in tests/sm90_gemm_test.cu
//
// One persistent CTA an SM: warpgroup 0 produces (three warps of it work; all four where they gather token
// rows), the others consume. The weights are the register operand of WGMMA, so the tile is rows of weights by
// columns of tokens. docs/hopper.md has a picture and times, docs/hopper-tried.md why it is built this way.
#pragma once

#include "sm90/gemm_consumer.cuh"
#include "sm90/gemm_kernel_args.cuh"
#include "sm90/gemm_producer.cuh"
#include "sm90/ptx.cuh"

namespace fourfold::sm90 {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    expert_gemm_kernel(const __grid_constant__ GemmKernelArgs args, const __grid_constant__ TokenMaps maps) {
  extern __shared__ uint8_t raw_shared[];
  const uint32_t shared = (ptx::shared_address(raw_shared) + 1023u) & ~1023u;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      // Weights and tokens.
      ptx::mbarrier_init(shared + Traits::kFullOffset + stage * 8,
                         1 + (gathers<Traits>(args) ? Traits::kGatherThreads : 1));
      ptx::mbarrier_init(shared + Traits::kEmptyOffset + stage * 8, Traits::kConsumers * 128);
    }
    for (int n = 0; n < Traits::kQueuedTiles; ++n) {
      ptx::mbarrier_init(shared + Traits::kQueuedOffset + n * 8, 1);
      ptx::mbarrier_init(shared + Traits::kReadyOffset + n * 8, 1);
    }
    ptx::mbarrier_init(shared + Traits::kAskedOffset, 1);
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(shared + Traits::kWrittenOffset + i * 8, Traits::kConsumers * 128);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  if (warpgroup == 0) {
    if constexpr (Traits::kManyRegisters) ptx::setmaxnreg_dec<Traits::kProducerRegisters>();
    const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
    if (gathers<Traits>(args) && !args.waits_at_end) {
      // The kernel before this one may be the permutation, which writes what the producers look up first.
      ptx::griddepcontrol_wait();
    }
    const bool leads = threadIdx.x % 32 == 0;
    Producer<Traits> producer(args, maps, shared);
    if (warp == 0 && leads) producer.run_weights();
    if (warp == 1) producer.run_schedule();
    if (gathers<Traits>(args) ? warp > 1 : warp == 2 && leads) producer.run_tokens();
  } else {
    if constexpr (Traits::kManyRegisters) ptx::setmaxnreg_inc<Traits::kConsumerRegisters>();
    if (!args.waits_at_end) ptx::griddepcontrol_wait();
    Consumer<Traits>(args, shared, warpgroup - 1).run();
    if (args.waits_at_end && blockIdx.x == 0) ptx::griddepcontrol_wait();
  }
}

}  // namespace fourfold::sm90
