// Launching kernels so that the next one starts while the previous one ends (programmatic dependent launch).
//
// Rule of this room: a kernel launched here calls start_after_previous() before it reads or writes anything,
// in every thread. It then sees all that earlier kernels of the stream wrote, however long their chain; what
// it saves is the time of its launch. Exceptions say so: sm90/fused_layer.cu and the GEMMs of sm90, what they
// read before, and that launches after the first of a layer's GEMMs wait at their end
// (sm90/gemm_kernel_args.cuh), combine_few_rows, where it reads what was complete before the previous kernel,
// permute_handful (cuda/permute.cu), what it has written before it lets the next one be launched, and staging
// (cuda/stage.h), which may begin beside the kernel before it, and then waits for it at its end.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "cuda/check.cuh"

namespace fourfold::cuda {

/// Waits until the previous kernel of the stream has ended and its writes are visible, then lets the next
/// one be launched. Does nothing in a plain launch.
__device__ inline void start_after_previous() {
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
}

/// Launches a kernel that begins with start_after_previous(). Throws Error naming it when CUDA refuses.
template <class... Parameters, class... Arguments>
void launch_after_previous(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                           size_t shared_bytes, void* stream, Arguments&&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = as_stream(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
}

}  // namespace fourfold::cuda
