// Launching one compiled shape of the grouped GEMM. Each family of shapes is a translation unit of its own.
#pragma once

#include <cuda_runtime.h>

#include "cuda/check.cuh"
#include "sm90/gemm_choice.h"
#include "sm90/gemm_kernel_args.cuh"

namespace fourfold::sm90 {

/// What the host decides for a launch besides the arguments.
struct GemmLaunch {
  GemmKernelArgs args;
  TokenMaps maps;
  int terms = 1;
  bool overlap_previous = false;
  int multiprocessors = 0;
  cudaStream_t stream = nullptr;
};

void launch_few_gemm(const GemmLaunch& launch);
void launch_narrow_gemm(const GemmLaunch& launch);
void launch_medium_gemm(const GemmLaunch& launch);
void launch_broad_gemm(const GemmLaunch& launch);
void launch_wide_gemm(const GemmLaunch& launch);

/// The traits of entry kIndex of the table.
template <int kIndex, int kTerms>
using TableTraits = GemmTraits<kGemmKernels[kIndex].row_parts, kGemmKernels[kIndex].row_blocks,
                               kGemmKernels[kIndex].depth_parts, kGemmKernels[kIndex].stage_units(kTerms),
                               kGemmKernels[kIndex].tokens, kGemmKernels[kIndex].granule, kTerms,
                               kTerms == 1 && kGemmKernels[kIndex].gathers>;

template <class Traits>
void launch_gemm_kernel(const GemmLaunch& launch,
                        void (*kernel)(const GemmKernelArgs args, const TokenMaps maps)) {
  cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes),
              "cudaFuncSetAttribute");
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(launch.multiprocessors));
  config.blockDim = dim3(Traits::kThreads);
  config.dynamicSmemBytes = Traits::kSharedBytes;
  config.stream = launch.stream;
  config.attrs = &overlap;
  config.numAttrs = launch.overlap_previous ? 1 : 0;
  cuda::check(cudaLaunchKernelEx(&config, kernel, launch.args, launch.maps), "expert_gemm_kernel");
}

}  // namespace fourfold::sm90
