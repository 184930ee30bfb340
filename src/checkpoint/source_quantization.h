// What the configs of a model say of its quantization, in one form.
#pragma once

#include <nlohmann/json.hpp>

#include <filesystem>
#include <string>

namespace fourfold {

inline constexpr const char* kConfigName = "config.json";
inline constexpr const char* kModelOptConfigName = "hf_quant_config.json";

struct SourceQuantization {
  /// config.json without its `quantization_config`; null where the model has no such file.
  nlohmann::ordered_json config;
  /// `quantization_config`; where there is none, what hf_quant_config.json says, under the names that
  /// ModelOpt gives it in config.json; null where there is neither.
  nlohmann::ordered_json entry;
  /// What keys and values are cached as, as ModelOpt calls it ("FP8", "NVFP4"); of another writer's scheme
  /// that ModelOpt has no name for, the scheme as JSON. Empty: the configs say nothing.
  std::string kv_cache;
};

/// Reads both configs of a model directory. Throws Error for what is no JSON, or leads out of the directory.
SourceQuantization read_source_quantization(const std::filesystem::path& directory);

/// `quant_method` of an entry; empty where it has none, or something that is no name.
std::string quantization_method(const nlohmann::ordered_json& entry);

}  // namespace fourfold
