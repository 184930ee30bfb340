#include "checkpoint/conversion_config.h"

#include <algorithm>
#include <array>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <system_error>

#include "base/fail.h"
#include "base/files.h"
#include "checkpoint/conversion_names.h"
#include "checkpoint/model_directory.h"
#include "checkpoint/strict_json.h"

namespace fourfold {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kMaxConfigBytes = 100'000'000;
constexpr const char* kConfig = "config.json";
constexpr const char* kModelOptConfig = "hf_quant_config.json";
constexpr const char* kQuantization = "quantization_config";

/// What loaders of ModelOpt's checkpoints look for, and who wrote it.
const Json kProducer = {{"name", "modelopt"}, {"version", "written by fourfold convert"}};

/// Keys by which a config says that experts are NVFP4 beside FP8; docs/formats.md, section 3b.
constexpr std::array<const char*, 3> kMixedKeys = {"quant_algo", "moe_quant_algo", "group_size"};

/// Empty where the entry has none, or something that is no name.
std::string method_of(const Json& quantization) {
  const auto method = quantization.is_object() ? quantization.find("quant_method") : quantization.end();
  return method != quantization.end() && method->is_string() ? method->get<std::string>() : "";
}

std::string module_of(const std::string& tensor) {
  return tensor.substr(0, tensor.rfind('.'));
}

/// What the tensors of the model to be are, by linear layer.
struct Modules {
  std::set<std::string> four_bit, fp8, plain;  ///< plain: matrices of bf16 or wider
};

Modules modules_of(const std::vector<TensorSpec>& tensors) {
  Modules modules;
  for (const TensorSpec& tensor : tensors) {
    const bool is_weight = tensor.name.ends_with(".weight"),
               is_pair = tensor.dtype == DType::kU8 || tensor.dtype == DType::kI8;
    const std::string module = module_of(tensor.name);
    const bool is_lookup = module.ends_with("embed_tokens");
    // Tensors of all experts have no ".weight".
    if (tensor.name.ends_with("experts.gate_up_proj") || tensor.name.ends_with("experts.down_proj")) {
      (is_pair ? modules.four_bit : modules.plain).insert(tensor.name);
    }
    if (tensor.name.ends_with(".weight_packed") || (is_weight && is_pair)) modules.four_bit.insert(module);
    if (is_weight && tensor.dtype == DType::kF8E4m3) modules.fp8.insert(module);
    if (is_weight && !is_pair && tensor.dtype != DType::kF8E4m3 && tensor.shape.size() == 2 && !is_lookup) {
      modules.plain.insert(module);
    }
  }
  return modules;
}

class ConfigRewriter {
 public:
  explicit ConfigRewriter(const ConvertedModel& model) : model_(model), modules_(modules_of(model.tensors)) {}

  std::vector<PlannedFile> rewrite() {
    std::vector<PlannedFile> files;
    std::error_code error;
    const bool has_config = std::filesystem::exists(model_.source / kConfig, error);
    Json config = Json::object();
    if (has_config) {
      require_no_way_out(model_.source, kConfig, model_.source.string());
      const std::string text = read_file(model_.source / kConfig, kMaxConfigBytes);
      static_cast<void>(parse_strict_json(text, (model_.source / kConfig).string()));
      config = Json::parse(text);
    }
    const Json before = config.contains(kQuantization) ? config[kQuantization] : Json();
    config.erase(kQuantization);
    const Json quantization = describe(before);
    if (!quantization.is_null()) config[kQuantization] = quantization;
    if (has_config) files.push_back({kConfig, "", config.dump(2) + "\n"});
    if (method_of(quantization) == "modelopt") {
      files.push_back({kModelOptConfig, "", modelopt_file(quantization).dump(2) + "\n"});
    }
    return files;
  }

 private:
  bool is_four_bit() const { return model_.to != TargetFormat::kBf16; }

  Json describe(const Json& before) const {
    const bool keeps_fp8 = !modules_.fp8.empty() || model_.is_deepseek_v4;
    if (is_four_bit() && model_.scheme == WeightScheme::kCompressedTensors) {
      require_no_fp8();
      return compressed_tensors();
    }
    if (model_.has_blocks && model_.to == TargetFormat::kMxfp4) return gpt_oss();
    if (!is_four_bit()) return keeps_what_is_left(before);
    return keeps_fp8 ? beside_fp8(before) : modelopt();
  }

  void require_no_fp8() const {
    if (modules_.fp8.empty()) return;
    fail(ErrorCode::kUnsupported,
         "{}: --scheme compressed-tensors: expected nothing but experts to be quantized, found FP8 in '{}', "
         "whose scales compressed-tensors does not read; use --scheme modelopt",
         model_.source.string(), *modules_.fp8.begin());
  }

  /// Linear layers that are not in the target's format, one by one.
  std::vector<std::string> ignored_modules() const {
    std::set<std::string> ignored = modules_.plain;
    if (!modules_.four_bit.contains("lm_head") && !modules_.fp8.contains("lm_head"))
      ignored.insert("lm_head");
    // Beside bf16, the experts that are left are what the entry describes.
    if (model_.to == TargetFormat::kBf16) return {ignored.begin(), ignored.end()};
    for (const std::string& prefix : model_.left_experts) {
      for (const std::string& module : modules_.four_bit) {
        if (module.starts_with(prefix)) ignored.insert(module);
      }
    }
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
    const bool is_nvfp4 = model_.to == TargetFormat::kNvfp4;
    Json quantization = Json::object();
    if (is_nvfp4) {
      const Json values = {{"dynamic", false}, {"num_bits", 4}, {"type", "float"}, {"group_size", 16}};
      Json group = Json::object();
      if (model_.has_input_scales) group["input_activations"] = values;
      group["weights"] = values;
      group["targets"] = {"Linear"};
      quantization["config_groups"] = {{"group_0", group}};
    }
    quantization["ignore"] = excluded_modules();
    quantization["quant_algo"] = !is_nvfp4 ? "MXFP4" : model_.has_input_scales ? "NVFP4" : "W4A16_NVFP4";
    quantization["producer"] = kProducer;
    quantization["quant_method"] = "modelopt";
    return quantization;
  }

  static Json modelopt_file(const Json& quantization) {
    Json inner = {{"quant_algo", quantization.value("quant_algo", Json())}, {"kv_cache_quant_algo", nullptr}};
    if (quantization.contains("config_groups")) inner["group_size"] = 16;
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
  Json beside_fp8(const Json& before) const {
    Json quantization = before.is_object() ? before : Json({{"quant_method", "fp8"}});
    if (method_of(quantization) != "fp8") quantization = {{"quant_method", "fp8"}};
    for (const char* key : kMixedKeys) quantization.erase(key);
    if (model_.to == TargetFormat::kNvfp4) {
      quantization["quant_algo"] = "MIXED_PRECISION";
      quantization["moe_quant_algo"] = "NVFP4";
      quantization["group_size"] = 16;
    } else if (!model_.is_deepseek_v4) {
      quantization["quant_algo"] = "MIXED_PRECISION";
      quantization["moe_quant_algo"] = "MXFP4";
      quantization["group_size"] = 32;
    }
    if (!model_.left_experts.empty()) quantization["modules_to_not_convert"] = excluded_modules();
    return quantization;
  }

  /// Of a model whose experts, or some of them, became bf16: nothing, or what the rest is quantized to.
  Json keeps_what_is_left(const Json& before) const {
    const bool has_others = !modules_.fp8.empty() || model_.has_blocks;
    if (!has_others && !modules_.four_bit.empty()) return ConfigRewriter(what_is_left()).describe(before);
    if (!has_others || !before.is_object()) return nullptr;
    Json quantization = before;
    const std::string method = method_of(quantization);
    // ModelOpt's keys of these names describe what is left.
    if (method == "fp8" && modules_.four_bit.empty() && !model_.has_blocks) {
      for (const char* key : kMixedKeys) quantization.erase(key);
    }
    const bool has_ignore = method == "modelopt" || method == "compressed-tensors";
    quantization[has_ignore ? "ignore" : "modules_to_not_convert"] = ignored_modules();
    return quantization;
  }

  /// The model as one in the format of the layers that are still quantized.
  ConvertedModel what_is_left() const {
    ConvertedModel left = model_;
    left.to = TargetFormat::kMxfp4;
    left.scheme = WeightScheme::kModelOpt;
    left.left_experts.clear();
    for (const TensorSpec& tensor : model_.tensors) {
      if (tensor.dtype == DType::kF8E4m3) left.to = TargetFormat::kNvfp4;  // block scales
      if (tensor.name.ends_with(".weight_packed")) left.scheme = WeightScheme::kCompressedTensors;
      left.has_input_scales |=
          tensor.name.ends_with("input_scale") || tensor.name.ends_with(".input_global_scale");
    }
    return left;
  }

  const ConvertedModel& model_;
  Modules modules_;
};

/// Formats of weights, which a converted model would hold twice.
bool is_weights(const std::filesystem::path& file) {
  constexpr std::array<const char*, 8> kSuffixes = {".safetensors", ".bin", ".pth",     ".pt",
                                                    ".gguf",        ".h5",  ".msgpack", ".onnx"};
  return std::find(kSuffixes.begin(), kSuffixes.end(), file.extension()) != kSuffixes.end();
}

}  // namespace

std::vector<PlannedFile> converted_configs(const ConvertedModel& model) {
  return ConfigRewriter(model).rewrite();
}

std::vector<PlannedFile> other_files(const std::filesystem::path& source, std::vector<std::string>& notes) {
  std::vector<PlannedFile> files;
  for (const auto& entry : std::filesystem::directory_iterator(source)) {
    const std::string name = entry.path().filename().string();
    std::error_code error;
    if (name == kConfig || name == kModelOptConfig || name.ends_with(".safetensors") ||
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
