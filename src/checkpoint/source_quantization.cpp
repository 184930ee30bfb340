#include "checkpoint/source_quantization.h"

#include <system_error>

#include "base/files.h"
#include "checkpoint/model_directory.h"
#include "checkpoint/strict_json.h"

namespace fourfold {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kMaxConfigBytes = 100'000'000;

/// Null where there is no such file.
Json read_config(const std::filesystem::path& directory, const char* name) {
  std::error_code error;
  if (!std::filesystem::exists(directory / name, error)) return nullptr;
  require_no_way_out(directory, name, directory.string());
  const std::string text = read_file(directory / name, kMaxConfigBytes);
  static_cast<void>(parse_strict_json(text, (directory / name).string()));
  return Json::parse(text);
}

/// The member of `object`; null where there is none, and where `object` is something else.
Json member(const Json& object, const char* key) {
  return object.is_object() ? object.value(key, Json()) : Json();
}

/// hf_quant_config.json's `quantization` as an entry of config.json.
Json as_entry(const Json& file) {
  const Json quantization = member(file, "quantization");
  if (!quantization.is_object()) return nullptr;
  Json entry = Json::object();
  for (const auto& [key, value] : quantization.items()) {
    if (key == "exclude_modules") {
      entry["ignore"] = value;
    } else if (key != "kv_cache_quant_algo") {
      entry[key] = value;
    }
  }
  if (const Json producer = member(file, "producer"); !producer.is_null()) entry["producer"] = producer;
  entry["quant_method"] = "modelopt";
  return entry;
}

std::string kv_cache_of(const Json& entry, const Json& file) {
  const Json scheme = member(entry, "kv_cache_scheme");
  if (scheme.is_string()) return scheme.get<std::string>();
  if (scheme.is_object()) {
    const bool is_fp8 = scheme.value("num_bits", Json()) == 8 && scheme.value("type", Json()) == "float";
    return is_fp8 ? "FP8" : scheme.dump();
  }
  const Json algorithm = member(member(file, "quantization"), "kv_cache_quant_algo");
  return algorithm.is_string() ? algorithm.get<std::string>() : "";
}

}  // namespace

SourceQuantization read_source_quantization(const std::filesystem::path& directory) {
  SourceQuantization source;
  source.config = read_config(directory, kConfigName);
  const Json file = read_config(directory, kModelOptConfigName);
  source.entry = member(source.config, "quantization_config");
  if (source.config.is_object()) source.config.erase("quantization_config");
  if (source.entry.is_null()) source.entry = as_entry(file);
  source.kv_cache = kv_cache_of(source.entry, file);
  return source;
}

std::string quantization_method(const nlohmann::ordered_json& entry) {
  const Json method = member(entry, "quant_method");
  return method.is_string() ? method.get<std::string>() : "";
}

}  // namespace fourfold
