// How converted experts are stored: names, types and shapes of their tensors.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/conversion.h"

namespace fourfold {

/// Where experts of a layer go.
enum class ExpertLayout : uint8_t {
  kSeparate,         ///< one by one: a linear layer each
  kFusedTransposed,  ///< all experts in a tensor, (E, in, out): Llama-4, gpt-oss; NVFP4 as ModelOpt exports
                     ///< it
  kFusedBlocks,      ///< gpt-oss's MXFP4: blocks and scales
};

/// Names and types of a linear layer's tensors, for one scheme. Empty names: there is none.
struct LinearNames {
  std::string_view weight, scales, global, input_scale;  ///< suffixes
  DType weight_type = DType::kU8, scale_type = DType::kU8;
  bool divides = false;         ///< global and input scales are divisors
  std::vector<int64_t> scalar;  ///< shape of these
};

/// `is_deepseek_v4`: MXFP4 as that family stores it.
LinearNames linear_names(TargetFormat format, WeightScheme scheme, bool is_deepseek_v4);
/// The same for fused tensors; suffixes of "...experts.gate_up_proj".
LinearNames fused_names(TargetFormat format);

/// Specs of one linear's weight [rows, cols] and block scales.
std::vector<TensorSpec> matrix_specs(const std::string& name, TargetFormat format, const LinearNames& names,
                                     int64_t rows, int64_t cols);
/// Of all experts' [experts, rows, cols] in one tensor.
std::vector<TensorSpec> fused_specs(const std::string& name, TargetFormat format, ExpertLayout layout,
                                    int64_t experts, int64_t rows, int64_t cols);

/// Values with one scale: 16 or 32; 0 for bf16.
int block_of(TargetFormat format);

}  // namespace fourfold
