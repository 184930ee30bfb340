// The bf16 matrix rate of the current device, by cuBLAS.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "fourfold/memory.h"

namespace fourfold::cuda {

struct MeasuredPeak {
  std::optional<double> operations_per_second;
  std::string note;  ///< how it was measured, or why it was not
};

/// A large GEMM in bf16, sustained, on operands that are data of a case: a chip that its power limits is
/// faster on data of low entropy. `codes` [count/2] and `scales` [count/16] are NVFP4 weights in the memory
/// of the device, decoded without their global scales; `activations` decoded values on the host. Both are
/// repeated as often as it takes. cuBLAS is looked for when the program runs, so that programs start where
/// there is none.
MeasuredPeak measure_bf16_peak(const Memory& memory, const uint8_t* codes, const uint8_t* scales,
                               int64_t count, std::span<const Bf16> activations);

}  // namespace fourfold::cuda
