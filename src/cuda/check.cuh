// Turning a failed CUDA call into fourfold::Error.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <string_view>

#include "fourfold/error.h"

namespace fourfold::cuda {

/// Throws Error naming `call` and the file and line of the caller unless `error` is success. Forgets the
/// error, so that the next call does not report it again.
inline void check(cudaError_t error, const char* call, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  const std::string_view path = file;
  const std::string_view name = path.substr(path.rfind('/') + 1);
  throw Error(ErrorCode::kDevice, std::string(name) + ":" + std::to_string(line) + ": " + call + ": " +
                                      cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

/// After a launch of `kernel`.
inline void check_launch(const char* kernel, const char* file = __builtin_FILE(),
                         int line = __builtin_LINE()) {
  check(cudaGetLastError(), kernel, file, line);
}

}  // namespace fourfold::cuda
