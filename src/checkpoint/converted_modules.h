// What the linear layers of a converted model are quantized to, by their tensors.
#pragma once

#include <map>
#include <set>
#include <string>
#include <vector>

#include "checkpoint/conversion.h"
#include "fourfold/safetensors.h"

namespace fourfold {

/// How one linear layer, or one tensor of all experts, is quantized.
struct ModuleFormat {
  TargetFormat format = TargetFormat::kNvfp4;  ///< of four bits
  WeightScheme scheme = WeightScheme::kModelOpt;
  bool has_input_scale = false;
};

/// FP8 layers by what their scales are, for which configs have different words.
struct Fp8Format {
  bool has_blocks = false;  ///< DeepSeek's: `weight_scale_inv` or `scale`, one for 128 x 128 values
  bool is_by_row = false;   ///< one scale a row
  bool has_input_scale = false;
};

struct ConvertedModules {
  std::map<std::string, ModuleFormat> four_bit;
  std::map<std::string, Fp8Format> fp8;
  std::set<std::string> plain;  ///< matrices of bf16 or wider
};

ConvertedModules modules_of(const std::vector<TensorSpec>& tensors);

}  // namespace fourfold
