#include "checkpoint/conversion_config.h"

#include <algorithm>
#include <array>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <system_error>

#include "base/fail.h"
#include "checkpoint/conversion_names.h"
#include "checkpoint/converted_modules.h"
#include "checkpoint/model_directory.h"
#include "checkpoint/source_quantization.h"

namespace fourfold {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kQuantization = "quantization_config";
constexpr const char* kMixed = "MIXED_PRECISION";
constexpr const char* kFp8ByRow = "FP8_PER_CHANNEL_PER_TOKEN";

/// What loaders of ModelOpt's checkpoints look for, and who wrote it.
const Json kProducer = {{"name", "modelopt"}, {"version", "written by fourfold convert"}};

/// Keys by which a config says that experts are NVFP4 beside FP8; docs/formats.md, section 3b.
constexpr std::array<const char*, 3> kMixedKeys = {"quant_algo", "moe_quant_algo", "group_size"};

/// ModelOpt's name for NVFP4 or MXFP4 weights.
std::string algorithm_of(TargetFormat format, bool has_input_scales) {
  if (format == TargetFormat::kMxfp4) return "MXFP4";
  return has_input_scales ? "NVFP4" : "W4A16_NVFP4";
}

/// How ModelOpt's groups describe numbers. `group_size`: values with one scale; 0: it is not said.
Json float_values(int bits, int group_size) {
  Json values = {{"dynamic", false}, {"num_bits", bits}, {"type", "float"}};
  if (group_size != 0) values["group_size"] = group_size;
  return values;
}

class ConfigRewriter {
 public:
  ConfigRewriter(const ConvertedModel& model, const SourceQuantization& source)
      : model_(model), source_(source), modules_(modules_of(model.tensors)) {}

  std::vector<PlannedFile> rewrite(std::vector<std::string>& notes) const {
    Json quantization = describe();
    describe_kv_cache(quantization, notes);
    if (const size_t others = other_linears().size(); others > 0) {
      notes.push_back(
          fmt::format("{} four-bit linears outside the experts stay in another format, as --layers converts "
                      "experts alone; "
                      "loaders that want one format for all refuse such a model",
                      others));
    }
    std::vector<PlannedFile> files;
    if (source_.config.is_object()) {
      Json config = source_.config;
      if (!quantization.is_null()) config[kQuantization] = quantization;
      files.push_back({kConfigName, "", config.dump(2) + "\n"});
    }
    if (quantization_method(quantization) == "modelopt") {
      files.push_back({kModelOptConfigName, "", modelopt_file(quantization).dump(2) + "\n"});
    }
    return files;
  }

 private:
  bool is_four_bit() const { return model_.to != TargetFormat::kBf16; }

  Json describe() const {
    if (is_four_bit() && model_.scheme == WeightScheme::kCompressedTensors) {
      require_no_fp8();
      return compressed_tensors();
    }
    if (model_.has_blocks && model_.to == TargetFormat::kMxfp4) return gpt_oss();
    if (!is_four_bit()) return keeps_what_is_left();
    const bool is_deepseek = std::any_of(modules_.fp8.begin(), modules_.fp8.end(),
                                         [](const auto& module) { return module.second.has_blocks; });
    if (model_.is_deepseek_v4 || is_deepseek) return beside_fp8();
    return modules_.fp8.empty() ? modelopt() : mixed_modelopt();
  }

  void require_no_fp8() const {
    if (modules_.fp8.empty()) return;
    fail(ErrorCode::kUnsupported,
         "{}: --scheme compressed-tensors: expected nothing but experts to be quantized, found FP8 in '{}', "
         "which its config would have to describe beside them; use --scheme modelopt",
         model_.source.string(), modules_.fp8.begin()->first);
  }

  /// What the source says of keys and values holds for the result: their scales are carried.
  void describe_kv_cache(Json& quantization, std::vector<std::string>& notes) const {
    if (source_.kv_cache.empty()) return;
    const std::string method = quantization_method(quantization);
    const std::string source_method = quantization_method(source_.entry);
    const bool is_fp8 = source_.kv_cache == "FP8";
    if (method == "modelopt" && (is_fp8 || source_method == "modelopt")) {
      quantization["kv_cache_scheme"] = is_fp8 ? float_values(8, 0) : Json(source_.kv_cache);
    } else if (method == "compressed-tensors" && source_method == method) {
      quantization["kv_cache_scheme"] = source_.entry["kv_cache_scheme"];
    } else if (method == "compressed-tensors" && is_fp8) {
      quantization["kv_cache_scheme"] = float_values(8, 0);
      quantization["kv_cache_scheme"]["strategy"] = "tensor";
      quantization["kv_cache_scheme"]["symmetric"] = true;
    } else {
      notes.push_back(fmt::format(
          "the source's KV cache is {}: its scales are carried, but the new config has no words for it",
          source_.kv_cache));
    }
  }

  /// Linears of four bits, not of experts, that are in another format or scheme than the target's.
  std::vector<std::string> other_linears() const {
    std::vector<std::string> others;
    for (const auto& [module, found] : modules_.four_bit) {
      const bool is_same = found.format == model_.to && found.scheme == model_.scheme;
      if (is_four_bit() && !is_same && module.find("experts") == std::string::npos) others.push_back(module);
    }
    return others;
  }

  /// Linear layers that are not in the target's format, one by one.
  std::vector<std::string> ignored_modules() const {
    std::set<std::string> ignored = modules_.plain;
    if (!modules_.four_bit.contains("lm_head") && !modules_.fp8.contains("lm_head"))
      ignored.insert("lm_head");
    // Beside bf16, the experts that are left are what the entry describes.
    if (model_.to == TargetFormat::kBf16) return {ignored.begin(), ignored.end()};
    for (const std::string& prefix : model_.left_experts) {
      for (const auto& [module, format] : modules_.four_bit) {
        if (module.starts_with(prefix)) ignored.insert(module);
      }
    }
    for (std::string& module : other_linears()) ignored.insert(std::move(module));
    return {ignored.begin(), ignored.end()};
  }

  /// The same with one pattern for the experts of a layer.
  std::vector<std::string> excluded_modules() const {
    std::set<std::string> excluded;
    for (const std::string& module : ignored_modules()) {
      const auto prefix = std::find_if(model_.left_experts.begin(), model_.left_experts.end(),
                                       [&](const std::string& left) { return module.starts_with(left); });
      excluded.insert(prefix == model_.left_experts.end() ? module
                                                          : prefix->substr(0, prefix->size() - 1) + "*");
    }
    for (const std::string& left : model_.left_experts)
      excluded.insert(left.substr(0, left.size() - 1) + "*");
    return {excluded.begin(), excluded.end()};
  }

  Json modelopt() const {
    Json quantization = Json::object();
    if (model_.to == TargetFormat::kNvfp4) {
      Json group = Json::object();
      if (model_.has_input_scales) group["input_activations"] = float_values(4, 16);
      group["weights"] = float_values(4, 16);
      group["targets"] = {"Linear"};
      quantization["config_groups"] = {{"group_0", group}};
    }
    return finish_modelopt(std::move(quantization), algorithm_of(model_.to, model_.has_input_scales));
  }

  /// Of a model that is FP8 beside its experts: an algorithm for every layer, and a group for every
  /// algorithm.
  Json mixed_modelopt() const {
    const std::vector<std::string> ignored = ignored_modules();
    Json layers = Json::object(), groups = Json::object();
    std::map<Json, std::vector<std::string>> modules_of_algorithm;
    const auto describe_layer = [&](const std::string& module, const Json& algorithm) {
      if (std::binary_search(ignored.begin(), ignored.end(), module)) return;
      layers[module] = algorithm;
      modules_of_algorithm[algorithm].push_back(module);
    };
    for (const auto& [module, found] : modules_.four_bit) {
      describe_layer(module, {{"quant_algo", algorithm_of(found.format, found.has_input_scale)},
                              {"group_size", block_of(found.format)}});
    }
    for (const auto& [module, found] : modules_.fp8) describe_layer(module, fp8_algorithm(module, found));
    for (const auto& [algorithm, modules] : modules_of_algorithm) {
      const int group_size = algorithm.value("group_size", 0), bits = group_size == 0 ? 8 : 4;
      Json group = Json::object();
      if (algorithm["quant_algo"] != "W4A16_NVFP4" && algorithm["quant_algo"] != "MXFP4") {
        group["input_activations"] = float_values(bits, group_size);
      }
      group["weights"] = float_values(bits, group_size);
      if (algorithm["quant_algo"] == kFp8ByRow) group["weights"]["strategy"] = "channel";
      group["targets"] = modules;
      groups[fmt::format("group_{}", groups.size())] = group;
    }
    return finish_modelopt({{"config_groups", groups}, {"quantized_layers", layers}}, kMixed);
  }

  Json fp8_algorithm(const std::string& module, const Fp8Format& found) const {
    if (found.is_by_row) return {{"quant_algo", kFp8ByRow}};
    if (found.has_input_scale) return {{"quant_algo", "FP8"}};
    fail(ErrorCode::kUnsupported,
         "{}: expected an input scale beside the FP8 weights of '{}', without which ModelOpt's configs can't "
         "describe them, found none; convert a source whose other layers are bf16",
         model_.source.string(), module);
  }

  Json finish_modelopt(Json quantization, const std::string& algorithm) const {
    quantization["ignore"] = excluded_modules();
    quantization["quant_algo"] = algorithm;
    quantization["producer"] = kProducer;
    quantization["quant_method"] = "modelopt";
    return quantization;
  }

  static Json modelopt_file(const Json& quantization) {
    const Json algorithm = quantization.value("quant_algo", Json());
    const Json kv_cache = quantization.value("kv_cache_scheme", Json());
    Json inner = {{"quant_algo", algorithm},
                  {"kv_cache_quant_algo", kv_cache.is_object() ? Json("FP8") : kv_cache}};
    if (quantization.contains("quantized_layers")) {
      inner["quantized_layers"] = quantization["quantized_layers"];
    } else if (quantization.contains("config_groups")) {
      inner["group_size"] = 16;
    }
    inner["exclude_modules"] = quantization.value("ignore", Json::array());
    return {{"producer", quantization.value("producer", Json(kProducer))}, {"quantization", inner}};
  }

  Json compressed_tensors() const {
    const bool is_nvfp4 = model_.to == TargetFormat::kNvfp4;
    const std::string format = is_nvfp4 ? "nvfp4-pack-quantized" : "mxfp4-pack-quantized";
    Json weights = {{"dynamic", false},
                    {"group_size", block_of(model_.to)},
                    {"num_bits", 4},
                    {"scale_dtype", is_nvfp4 ? "torch.float8_e4m3fn" : "torch.uint8"},
                    {"strategy", is_nvfp4 ? "tensor_group" : "group"},
                    {"symmetric", true},
                    {"type", "float"}};
    Json inputs = nullptr;  // activations stay bf16
    if (is_nvfp4 && model_.has_input_scales) {
      inputs = weights;
      inputs["dynamic"] = "local";
    }
    const Json group = {{"format", format},
                        {"input_activations", inputs},
                        {"output_activations", nullptr},
                        {"targets", {"Linear"}},
                        {"weights", weights}};
    return {{"config_groups", {{"group_0", group}}},
            {"format", format},
            {"global_compression_ratio", nullptr},
            {"ignore", ignored_modules()},
            {"kv_cache_scheme", nullptr},
            {"quant_method", "compressed-tensors"},
            {"quantization_status", "compressed"}};
  }

  Json gpt_oss() const {
    Json plain = {"model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"};
    for (const std::string& left : model_.left_experts) plain.push_back(left.substr(0, left.size() - 1));
    return {{"quant_method", "mxfp4"}, {"modules_to_not_convert", plain}};
  }

  /// The source's FP8 entry, with what DeepSeek-V4's has for NVFP4 experts; MXFP4 ones go without saying.
  Json beside_fp8() const {
    Json quantization = source_.entry;
    if (quantization_method(quantization) != "fp8") quantization = {{"quant_method", "fp8"}};
    for (const char* key : kMixedKeys) quantization.erase(key);
    if (model_.to == TargetFormat::kNvfp4) {
      quantization["quant_algo"] = kMixed;
      quantization["moe_quant_algo"] = "NVFP4";
      quantization["group_size"] = 16;
    } else if (!model_.is_deepseek_v4) {
      quantization["quant_algo"] = kMixed;
      quantization["moe_quant_algo"] = "MXFP4";
      quantization["group_size"] = 32;
    }
    if (!model_.left_experts.empty()) quantization["modules_to_not_convert"] = excluded_modules();
    return quantization;
  }

  /// Of a model whose experts, or some of them, became bf16: nothing, or what the rest is quantized to.
  Json keeps_what_is_left() const {
    const bool has_others = !modules_.fp8.empty() || model_.has_blocks;
    if (!has_others && !modules_.four_bit.empty()) {
      const ConvertedModel left = what_is_left();
      return ConfigRewriter(left, source_).describe();
    }
    if (!has_others || !source_.entry.is_object()) return nullptr;
    Json quantization = source_.entry;
    const std::string method = quantization_method(quantization);
    // ModelOpt's keys of these names describe what is left.
    if (method == "fp8" && modules_.four_bit.empty() && !model_.has_blocks) {
      for (const char* key : kMixedKeys) quantization.erase(key);
    }
    if (method == "modelopt") drop_plain_layers(quantization);
    const bool has_ignore = method == "modelopt" || method == "compressed-tensors";
    quantization[has_ignore ? "ignore" : "modules_to_not_convert"] = ignored_modules();
    return quantization;
  }

  /// From the lists of ModelOpt's mixed entry.
  void drop_plain_layers(Json& quantization) const {
    if (const auto layers = quantization.find("quantized_layers");
        layers != quantization.end() && layers->is_object()) {
      for (const std::string& module : modules_.plain) layers->erase(module);
    }
    const auto groups = quantization.find("config_groups");
    if (groups == quantization.end() || !groups->is_object()) return;
    Json kept = Json::object();
    for (const auto& [name, group] : groups->items()) {
      Json rest = group;
      if (const Json targets = group.is_object() ? group.value("targets", Json()) : Json();
          targets.is_array()) {
        rest["targets"] = Json::array();
        for (const Json& target : targets) {
          if (!target.is_string() || !modules_.plain.contains(target)) rest["targets"].push_back(target);
        }
        if (rest["targets"].empty()) continue;
      }
      kept[name] = std::move(rest);
    }
    *groups = std::move(kept);
  }

  /// The model as one in the format of the layers that are still quantized.
  ConvertedModel what_is_left() const {
    ConvertedModel left = model_;
    left.left_experts.clear();
    const ModuleFormat& first = modules_.four_bit.begin()->second;
    left.to = first.format;
    left.scheme = first.scheme;
    left.has_input_scales = std::any_of(modules_.four_bit.begin(), modules_.four_bit.end(),
                                        [](const auto& module) { return module.second.has_input_scale; });
    return left;
  }

  const ConvertedModel& model_;
  const SourceQuantization& source_;
  ConvertedModules modules_;
};

/// Formats of weights, which a converted model would hold twice.
bool is_weights(const std::filesystem::path& file) {
  constexpr std::array<const char*, 8> kSuffixes = {".safetensors", ".bin", ".pth",     ".pt",
                                                    ".gguf",        ".h5",  ".msgpack", ".onnx"};
  return std::find(kSuffixes.begin(), kSuffixes.end(), file.extension()) != kSuffixes.end();
}

}  // namespace

std::vector<PlannedFile> converted_configs(const ConvertedModel& model, std::vector<std::string>& notes) {
  const SourceQuantization source = read_source_quantization(model.source);
  return ConfigRewriter(model, source).rewrite(notes);
}

std::vector<PlannedFile> other_files(const std::filesystem::path& source, std::vector<std::string>& notes) {
  std::vector<PlannedFile> files;
  for (const auto& entry : std::filesystem::directory_iterator(source)) {
    const std::string name = entry.path().filename().string();
    std::error_code error;
    if (name == kConfigName || name == kModelOptConfigName || name.ends_with(".safetensors") ||
        name.ends_with(".index.json")) {
      continue;
    }
    if (is_weights(name) || !std::filesystem::is_regular_file(entry.path(), error)) {
      notes.push_back(name + ": not copied");
      continue;
    }
    require_no_way_out(source, name, source.string());
    files.push_back({name, entry.path(), ""});
  }
  std::sort(files.begin(), files.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
  std::sort(notes.begin(), notes.end());
  return files;
}

}  // namespace fourfold
