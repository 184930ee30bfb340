// The configs of a converted model, as its loaders expect them.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "checkpoint/conversion.h"
#include "fourfold/safetensors.h"

namespace fourfold {

/// What the configs have to say.
struct ConvertedModel {
  std::filesystem::path source;  ///< the model directory whose config.json is rewritten
  TargetFormat to = TargetFormat::kNvfp4;
  WeightScheme scheme = WeightScheme::kModelOpt;
  bool is_deepseek_v4 = false;
  bool has_blocks = false;  ///< gpt-oss's MXFP4
  bool has_input_scales = false;
  std::vector<std::string> left_experts;  ///< prefixes of experts that are in another format than `to`
  std::vector<TensorSpec> tensors;        ///< of the whole model to be
};

/// config.json, and hf_quant_config.json where the scheme has one: everything but the quantization is as in
/// the source. Throws Error for a model that the scheme's config can't describe; what it says less of than
/// the source goes to `notes`.
std::vector<PlannedFile> converted_configs(const ConvertedModel& model, std::vector<std::string>& notes);

/// The other files of the directory, to be copied: tokenizer, chat template, licence. Weights and configs of
/// quantizers are left out, and named in `notes`, as are folders.
std::vector<PlannedFile> other_files(const std::filesystem::path& source, std::vector<std::string>& notes);

}  // namespace fourfold
