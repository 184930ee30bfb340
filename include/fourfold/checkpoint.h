// Checkpoints: a model directory, and the expert weights of one of its layers.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "fourfold/expert_weights.h"
#include "fourfold/moe_layer.h"
#include "fourfold/router.h"
#include "fourfold/safetensors.h"

namespace fourfold {

/// What `config.json` says of the layer; absent members are unknown. Tensors are the truth, this is compared.
struct ModelConfig {
  std::string file;  ///< path of config.json, for messages; empty where there is none
  std::string model_type;
  std::string architecture;
  std::optional<int64_t> hidden, intermediate, experts, top_k, layers;
  std::string hidden_act;                      ///< e.g. "silu"; empty when it says none
  std::optional<float> swiglu_limit;           ///< the clamp of DeepSeek-V4 and gpt-oss
  std::optional<bool> renormalise;             ///< norm_topk_prob
  std::optional<float> routed_scaling_factor;  ///< multiplies routing weights: DeepSeek
  std::optional<int64_t> groups, top_groups;   ///< n_group, topk_group: DeepSeek-V3
  std::string quantization;                    ///< e.g. "modelopt NVFP4"; empty when it claims none
};

/// The activation that a config names: silu, gelu or gelu_pytorch_tanh with a gate, DeepSeek-V4's clamp,
/// gpt-oss's variant. Throws Error for any other.
ActivationFunction activation_of(const ModelConfig& config);

/// An opened model directory: `config.json`, and `model.safetensors` or shards with an index. Mapped, not
/// copied.
class Checkpoint {
 public:
  /// Throws Error naming the file and what is wrong with it. `path` may also be one .safetensors file.
  static std::shared_ptr<const Checkpoint> open(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return path_; }
  const ModelConfig& config() const { return config_; }
  const Tensor* find(std::string_view name) const;
  /// All tensors by name.
  const std::map<std::string, const Tensor*, std::less<>>& tensors() const { return tensors_; }

 private:
  Checkpoint() = default;
  void open_shards(const std::filesystem::path& index_path);
  void add_file(const std::filesystem::path& path);
  void read_config();

  std::filesystem::path path_;
  ModelConfig config_;
  std::vector<std::shared_ptr<const SafetensorsFile>> files_;
  std::map<std::string, const Tensor*, std::less<>> tensors_;
};

/// The experts of one layer, and how they were found.
struct ExpertLayer {
  ExpertWeights weights;            ///< keeps the checkpoint mapped
  std::vector<int64_t> expert_ids;  ///< number of each expert in the checkpoint
  int64_t experts_in_checkpoint = 0;
  std::string scheme;              ///< "nvfp4", "mxfp4", "bf16", "bf16 (fused)", "mixed: ..."
  std::string naming;              ///< e.g. "layers.3.ffn.experts.E.{w1,w3,w2}"
  std::vector<std::string> notes;  ///< disagreements between config and tensors
};

/// Reads the experts of `layer`: all of them, or those in `experts` (ascending, unique). The scheme follows
/// from tensor names and dtypes: ModelOpt NVFP4, DeepSeek-V4 NVFP4 and MXFP4, and bf16/f16/f32 per expert or
/// fused (E, 2I, H). Throws Error naming file, tensor, expected and found.
ExpertLayer load_experts(std::shared_ptr<const Checkpoint> checkpoint, int64_t layer,
                         const std::vector<int64_t>& experts = {});

/// A layer's router. `weights` view the checkpoint's mapped files.
struct CheckpointRouter {
  RouterConfig config;
  RouterWeights weights;
  std::string description;  ///< its name and rule, for reports
};

/// The router of `layer` for the families that are known (Mixtral, Qwen3-MoE, DeepSeek-V3 and V4). nullopt,
/// with the reason in `why_not`, where the family is another one, the tensor is not there, or ids come from
/// token ids. Throws Error for tensors that do not fit.
std::optional<CheckpointRouter> load_router(const Checkpoint& checkpoint, int64_t layer, int64_t experts,
                                            int64_t hidden, std::string& why_not);

/// Layers that hold experts, ascending.
std::vector<int64_t> layers_with_experts(const Checkpoint& checkpoint);

}  // namespace fourfold
