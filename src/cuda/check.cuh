// Turning a failed CUDA call into fourfold::Error, and other things that all who call CUDA need.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
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

/// Throws Error for an argument: "`what`: expected `expected`, found `found`".
[[noreturn]] inline void reject(const std::string& what, const std::string& expected, int64_t found) {
  throw Error(ErrorCode::kInvalidArgument,
              what + ": expected " + expected + ", found " + std::to_string(found));
}

/// Public headers know streams as void*.
inline cudaStream_t as_stream(void* stream) {
  return static_cast<cudaStream_t>(stream);
}

}  // namespace fourfold::cuda
