// Fuzzes config.json, or hf_quant_config.json where the first byte is a '2', beside a sound layer: what it
// says of the model, the rules that follow, and its comparison with the tensors.
#include <array>
#include <filesystem>
#include <string>
#include <vector>

#include "fourfold/model_family.h"
#include "fuzz_target.h"
#include "json_mutator.h"

namespace fourfold {
namespace {

const std::filesystem::path& model_directory() {
  static const std::filesystem::path directory = [] {
    const auto& path = fuzz::scratch_directory();
    static const std::array<std::byte, 16 * 8> bytes = {};
    const std::string prefix = "model.layers.0.mlp.experts.0.";
    std::vector<TensorData> tensors;
    const std::span<const std::byte> all(bytes);
    for (const char* linear : {"gate_proj", "up_proj", "down_proj"}) {
      tensors.push_back({{prefix + linear + ".weight", DType::kU8, {16, 8}}, all});
      tensors.push_back({{prefix + linear + ".weight_scale", DType::kF8E4m3, {16, 1}}, all.first(16)});
      tensors.push_back({{prefix + linear + ".weight_scale_2", DType::kF32, {}}, all.first(4)});
    }
    tensors.push_back({{"model.layers.0.mlp.gate.weight", DType::kF32, {1, 16}}, all.first(64)});
    write_safetensors(path / "model.safetensors", tensors);
    return path;
  }();
  return directory;
}

/// Calls that any of the commands makes. Each may refuse.
void read_model(const std::filesystem::path& directory) {
  const auto checkpoint = Checkpoint::open(directory);
  const ExpertLayer layer = load_experts(checkpoint, 0);
  for (const std::string& note : layer.notes) fuzz::require(!note.empty(), "notes say something");
  static_cast<void>(identity(checkpoint->config()));
  static_cast<void>(fused_gate_up_order(checkpoint->config()));
  const LayerRules rules = rules_of(checkpoint->config());
  const LayerConfig config = layer_config(layer, rules);
  fuzz::require(config.experts == 1 && config.hidden == 16, "the tensors decide");
  if (!rules.router) return;
  static_cast<void>(describe_router(rules));
  std::string why_not;
  static_cast<void>(load_router(*checkpoint, 0, 1, 16, *rules.router, rules.router_bias, why_not));
}

}  // namespace
}  // namespace fourfold

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace fourfold;
  const std::filesystem::path& directory = model_directory();
  const bool is_second = size > 0 && data[0] == '2';
  const std::string_view text(reinterpret_cast<const char*>(data) + is_second, size - is_second);
  fuzz::write_in_place(directory / "config.json", is_second ? R"({"model_type":"qwen3_moe"})" : text);
  fuzz::write_in_place(directory / "hf_quant_config.json", is_second ? text : "{}");
  try {
    read_model(directory);
  } catch (const Error&) {
  }
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned int seed) {
  if (size == 0 || data[0] != '2' || max_size < 2) {
    return fourfold::fuzz::mutate_json_input(data, size, max_size, seed);
  }
  return 1 + fourfold::fuzz::mutate_json_input(data + 1, size - 1, max_size - 1, seed);
}
