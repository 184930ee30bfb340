// The activations that the GEMM's epilogue does not compute, as a pass over h.
#pragma once

#include "fourfold/moe_layer.h"

namespace fourfold::sm90 {

struct ActivateRows {
  ActivationFunction function;
  MatrixView<const Bf16> h;  ///< [max_rows, 2I] gate first, or [max_rows, I]; 16-byte aligned rows
  MatrixView<Bf16> d;        ///< [max_rows, I]; likewise
  const int32_t* rows;       ///< on the device: M, the rows that are there
};

/// Enqueues d = activation(h) in float32, rounded once to bf16. Throws Error when CUDA refuses the launch.
void launch_activate_rows(const ActivateRows& args, void* stream);

}  // namespace fourfold::sm90
