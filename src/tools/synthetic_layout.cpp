// Names and configs as the real checkpoints have them; docs/formats.md, section 3.
#include "tools/synthetic_layout.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

namespace fourfold {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::array<std::string_view, 3> kProjections = {"gate_proj", "up_proj", "down_proj"};
constexpr std::array<std::string_view, 3> kNumbered = {"w1", "w3", "w2"};
constexpr TileScaleType kE8m0 = TileScaleType::kE8m0, kF32 = TileScaleType::kF32;

constexpr std::array<SyntheticFamily, 6> kFamilies = {{
    {"deepseek-v4", "deepseek_v4", "DeepseekV4ForCausalLM", StoredAs::kMxfp4, "layers.", ".ffn.", kNumbered,
     "gate", ".bias", "shared_experts", false, true, false, kE8m0},
    {"deepseek-v3", "deepseek_v3", "DeepseekV3ForCausalLM", StoredAs::kFp8, "model.layers.", ".mlp.",
     kProjections, "gate", ".e_score_correction_bias", "shared_experts", false, false, false, kF32},
    {"qwen3-moe", "qwen3_moe", "Qwen3MoeForCausalLM", StoredAs::kBf16, "model.layers.", ".mlp.", kProjections,
     "gate", "", "", false, false, false, kF32},
    {"qwen2-moe", "qwen2_moe", "Qwen2MoeForCausalLM", StoredAs::kBf16, "model.layers.", ".mlp.", kProjections,
     "gate", "", "shared_expert", true, false, false, kF32},
    {"mixtral", "mixtral", "MixtralForCausalLM", StoredAs::kBf16, "model.layers.", ".block_sparse_moe.",
     kNumbered, "gate", "", "", false, false, false, kF32},
    {"gpt-oss", "gpt_oss", "GptOssForCausalLM", StoredAs::kMxfp4, "model.layers.", ".mlp.", kProjections,
     "router", ".bias", "", false, false, true, kF32},
}};

int64_t tiles(int64_t extent) {
  constexpr int64_t kTile = 128;
  return (extent + kTile - 1) / kTile;
}

}  // namespace

const SyntheticFamily* find_synthetic_family(std::string_view name) {
  const auto it = std::find_if(kFamilies.begin(), kFamilies.end(),
                               [&](const SyntheticFamily& family) { return family.name == name; });
  return it == kFamilies.end() ? nullptr : &*it;
}

std::vector<std::string> synthetic_family_names() {
  std::vector<std::string> names;
  for (const SyntheticFamily& family : kFamilies) names.emplace_back(family.name);
  return names;
}

SyntheticLayout::SyntheticLayout(const SynthesizeRequest& request, const SyntheticFamily& family,
                                 StoredAs experts)
    : request_(request), family_(family), experts_(experts) {}

StoredAs SyntheticLayout::shared_stored_as() const {
  if (family_.shared_stays_fp8) return StoredAs::kFp8;
  return experts_ == StoredAs::kMxfp4 ? StoredAs::kBf16 : experts_;
}

bool SyntheticLayout::is_hashed(int64_t layer) const {
  constexpr int64_t kHashLayers = 3;  // of DeepSeek-V4
  return request_.whole_family && family_.name == "deepseek-v4" &&
         layer < std::min(kHashLayers, request_.layers - 1);
}

int64_t SyntheticLayout::shared_intermediate() const {
  return family_.shared_gate ? 2 * request_.intermediate : request_.intermediate;
}

/// The most groups, up to DeepSeek-V3's 8, of which the better half still holds top-k experts.
int64_t SyntheticLayout::groups() const {
  if (family_.name != "deepseek-v3") return 1;
  for (const int64_t groups : {8, 4, 2}) {
    if (request_.experts % groups == 0 && request_.experts / groups >= 2 &&
        request_.experts / 2 >= request_.top_k) {
      return groups;
    }
  }
  return 1;
}

std::string SyntheticLayout::block(int64_t layer) const {
  return fmt::format("{}{}{}", family_.before_layer, layer, family_.block);
}

std::string SyntheticLayout::router(int64_t layer) const {
  return block(layer) + std::string(family_.router);
}

std::string SyntheticLayout::linear(int64_t layer, int64_t expert, Matrix matrix) const {
  return fmt::format("{}experts.{}.{}", block(layer), expert, family_.linears[static_cast<size_t>(matrix)]);
}

std::string SyntheticLayout::shared_linear(int64_t layer, Matrix matrix) const {
  return fmt::format("{}{}.{}", block(layer), family_.shared, family_.linears[static_cast<size_t>(matrix)]);
}

std::string SyntheticLayout::fused(int64_t layer, bool is_down) const {
  return fmt::format("{}experts.{}", block(layer), is_down ? "down_proj" : "gate_up_proj");
}

void SyntheticLayout::add_linear(std::vector<TensorSpec>& specs, const std::string& name, StoredAs stored,
                                 int64_t rows, int64_t cols) const {
  switch (stored) {
    case StoredAs::kBf16:
      specs.push_back({name + ".weight", DType::kBf16, {rows, cols}});
      return;
    case StoredAs::kMxfp4:
      specs.push_back({name + ".weight", DType::kI8, {rows, cols / 2}});
      specs.push_back({name + ".scale", DType::kF8E8m0, {rows, cols / 32}});
      return;
    case StoredAs::kFp8:
      specs.push_back({name + ".weight", DType::kF8E4m3, {rows, cols}});
      specs.push_back({name + (family_.fp8_scales == kE8m0 ? ".scale" : ".weight_scale_inv"),
                       family_.fp8_scales == kE8m0 ? DType::kF8E8m0 : DType::kF32,
                       {tiles(rows), tiles(cols)}});
      return;
    case StoredAs::kNvfp4:
      specs.push_back({name + ".weight", DType::kU8, {rows, cols / 2}});
      specs.push_back({name + ".weight_scale", DType::kF8E4m3, {rows, cols / 16}});
      specs.push_back({name + ".weight_scale_2", DType::kF32, {}});
      specs.push_back({name + ".input_scale", DType::kF32, {}});
      return;
  }
}

/// gpt-oss: MXFP4 in blocks; bf16 and ModelOpt's NVFP4 transposed.
void SyntheticLayout::add_fused(std::vector<TensorSpec>& specs, const std::string& name, int64_t rows,
                                int64_t cols) const {
  const int64_t experts = request_.experts;
  specs.push_back({name + "_bias", DType::kBf16, {experts, rows}});
  if (experts_ == StoredAs::kMxfp4) {
    specs.push_back({name + "_blocks", DType::kU8, {experts, rows, cols / 32, 16}});
    specs.push_back({name + "_scales", DType::kU8, {experts, rows, cols / 32}});
  } else if (experts_ == StoredAs::kBf16) {
    specs.push_back({name, DType::kBf16, {experts, cols, rows}});
  } else {
    specs.push_back({name, DType::kU8, {experts, cols / 2, rows}});
    specs.push_back({name + "_weight_scale", DType::kF8E4m3, {experts, cols / 16, rows}});
    specs.push_back({name + "_weight_scale_2", DType::kF32, {}});
    specs.push_back({name + "_input_scale", DType::kF32, {}});
  }
}

void SyntheticLayout::add_router(std::vector<TensorSpec>& specs, int64_t layer) const {
  specs.push_back({router(layer) + ".weight", DType::kBf16, {request_.experts, request_.hidden}});
  if (is_hashed(layer)) {
    specs.push_back({router(layer) + ".tid2eid", DType::kI64, {kVocabulary, request_.top_k}});
  } else if (!family_.router_bias.empty()) {
    const DType type = family_.is_fused ? DType::kBf16 : DType::kF32;
    specs.push_back({router(layer) + std::string(family_.router_bias), type, {request_.experts}});
  }
}

std::vector<TensorSpec> SyntheticLayout::specs() const {
  const int64_t hidden = request_.hidden, inner = request_.intermediate;
  std::vector<TensorSpec> specs;
  for (int64_t layer = 0; layer < request_.layers; ++layer) {
    add_router(specs, layer);
    const auto add = [&](const auto& name_of, StoredAs stored, int64_t intermediate) {
      for (const Matrix matrix : kMatrices) {
        const bool is_down = matrix == Matrix::kDown;
        add_linear(specs, name_of(matrix), stored, is_down ? hidden : intermediate,
                   is_down ? intermediate : hidden);
      }
    };
    if (family_.is_fused) {
      add_fused(specs, fused(layer, false), 2 * inner, hidden);
      add_fused(specs, fused(layer, true), hidden, inner);
    } else {
      for (int64_t expert = 0; expert < request_.experts; ++expert) {
        add([&](Matrix matrix) { return linear(layer, expert, matrix); }, experts_, inner);
      }
    }
    if (!has_shared()) continue;
    add([&](Matrix matrix) { return shared_linear(layer, matrix); }, shared_stored_as(),
        shared_intermediate());
    if (family_.shared_gate) {
      specs.push_back({block(layer) + "shared_expert_gate.weight", DType::kBf16, {1, hidden}});
    }
  }
  return specs;
}

Json SyntheticLayout::config() const {
  Json json;
  const bool is_deepseek = family_.name.starts_with("deepseek");
  const bool is_local =
      family_.name == "mixtral" || family_.is_fused;  // num_local_experts, intermediate_size
  json["architectures"] = {family_.architecture};
  json["model_type"] = family_.model_type;
  json["hidden_size"] = request_.hidden;
  json[is_local ? "intermediate_size" : "moe_intermediate_size"] = request_.intermediate;
  json["num_hidden_layers"] = request_.layers;
  json[is_deepseek ? "n_routed_experts" : is_local ? "num_local_experts" : "num_experts"] = request_.experts;
  json["num_experts_per_tok"] = request_.top_k;
  if (!is_local) json["norm_topk_prob"] = true;
  json["hidden_act"] = "silu";
  json["torch_dtype"] = "bfloat16";
  if (family_.is_fused) json["swiglu_limit"] = 7.0;
  if (family_.shared_gate && has_shared()) json["shared_expert_intermediate_size"] = shared_intermediate();
  if (is_deepseek && request_.whole_family) json["n_shared_experts"] = has_shared() ? 1 : 0;
  if (family_.name == "deepseek-v4") {
    json["swiglu_limit"] = 10.0;
    json["scoring_func"] = "sqrtsoftplus";
    json["routed_scaling_factor"] = 1.5;
    if (is_hashed(0)) {
      json["num_hash_layers"] = std::min<int64_t>(3, request_.layers - 1);
      json["vocab_size"] = kVocabulary;
    }
  } else if (is_deepseek) {
    json["scoring_func"] = "sigmoid";
    json["topk_method"] = "noaux_tc";
    json["routed_scaling_factor"] = 2.5;
    json["n_group"] = groups();
    json["topk_group"] = top_groups();
  }
  add_quantization(json);
  json["fourfold_synthetic"] = {
      {"seed", request_.seed},
      {"profile", request_.profile == WeightProfile::kGaussian ? "gaussian" : "realistic"}};
  return json;
}

void SyntheticLayout::add_quantization(Json& json) const {
  if (family_.name == "deepseek-v4") {
    json["quantization_config"] = {{"quant_method", "fp8"}};
    if (experts_ == StoredAs::kNvfp4) {
      json["quantization_config"]["quant_algo"] = "MIXED_PRECISION";
      json["quantization_config"]["moe_quant_algo"] = "NVFP4";
      json["quantization_config"]["group_size"] = 16;
    }
  } else if (experts_ == StoredAs::kFp8) {
    json["quantization_config"] = {
        {"quant_method", "fp8"}, {"fmt", "e4m3"}, {"weight_block_size", {128, 128}}};
  } else if (experts_ == StoredAs::kMxfp4) {
    json["quantization_config"] = {{"quant_method", "mxfp4"}};
  }
}

Json SyntheticLayout::modelopt_config() const {
  Json json;
  json["producer"] = {{"name", "fourfold synthesize"}, {"version", FOURFOLD_VERSION}};
  json["quantization"] = {
      {"quant_algo", "NVFP4"},
      {"group_size", 16},
      {"kv_cache_quant_algo", nullptr},
      {"exclude_modules", {fmt::format("{}*{}{}", family_.before_layer, family_.block, family_.router)}}};
  return json;
}

}  // namespace fourfold
