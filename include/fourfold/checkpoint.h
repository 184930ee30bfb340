// Checkpoints: a model directory, and the expert weights of one of its layers.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "fourfold/expert_weights.h"
#include "fourfold/export.h"
#include "fourfold/router.h"
#include "fourfold/safetensors.h"

namespace FOURFOLD_EXPORT fourfold {

/// What a config claims of the quantization; empty members claim nothing.
struct QuantizationClaim {
  std::string text;                  ///< as it spells method and algorithm, e.g. "modelopt NVFP4"
  std::set<std::string> formats;     ///< of four bits: "nvfp4", "mxfp4"
  std::set<uint64_t> group_sizes;    ///< codes that share a scale
  std::vector<std::string> ignored;  ///< modules left out: names, globs, or "re:" and a regular expression
};

/// What `config.json` says of the layer; absent members are unknown. Tensors are the truth, this is compared.
struct ModelConfig {
  std::string file;  ///< where config.json is, or would be, for messages
  std::string model_type;
  std::string architecture;
  std::optional<int64_t> hidden, intermediate, experts, top_k, layers;
  std::string hidden_act;                 ///< e.g. "silu"; empty when it says none
  std::optional<float> swiglu_limit;      ///< the clamp of DeepSeek-V4 and gpt-oss
  std::optional<float> swiglu_alpha;      ///< gpt-oss: the factor in its sigmoid
  std::string scoring_func;               ///< the router's scores, where it says: "sigmoid", "sqrtsoftplus"
  std::optional<int64_t> shared_experts;  ///< n_shared_experts
  std::optional<int64_t> shared_intermediate;  ///< its size, where the config gives it apart
  std::optional<bool> renormalise;             ///< norm_topk_prob
  std::optional<float> routed_scaling_factor;  ///< multiplies routing weights: DeepSeek
  std::optional<int64_t> groups, top_groups;   ///< n_group, topk_group: DeepSeek-V3
  std::string quantization;                    ///< e.g. "modelopt NVFP4"; empty when it claims none
  QuantizationClaim claim;                     ///< the same in detail
};

/// What keeps a part of a model directory from being read.
struct CheckpointDamage {
  std::string file;
  std::string tensor;   ///< empty: the whole file
  std::string message;  ///< of the Error that stands for it
};

/// An opened model directory: `config.json`, and `model.safetensors` or shards with an index. Mapped, not
/// copied.
class Checkpoint {
 public:
  /// Throws Error naming the file and what is wrong with it. `path` may also be one .safetensors file.
  static std::shared_ptr<const Checkpoint> open(const std::filesystem::path& path);
  /// For those who look for damage: files and index entries that open() would refuse are added to `damage`
  /// and left out. Throws Error where nothing is left to look at: no directory, no index, no readable file.
  static std::shared_ptr<const Checkpoint> open(const std::filesystem::path& path,
                                                std::vector<CheckpointDamage>& damage);
  /// Of tensors in memory that outlives it, each `bytes` as long as type and shape say. Throws Error for a
  /// name that is there twice.
  static std::shared_ptr<const Checkpoint> from_tensors(std::vector<Tensor> tensors, ModelConfig config);

  const std::filesystem::path& path() const { return path_; }
  /// Names that the index promises and no readable file holds. Empty for those opened without damage.
  const std::set<std::string, std::less<>>& lost() const { return lost_; }
  const ModelConfig& config() const { return config_; }
  const Tensor* find(std::string_view name) const;
  /// All tensors by name.
  const std::map<std::string, const Tensor*, std::less<>>& tensors() const { return tensors_; }
  /// Throws Error where one of the files was truncated, or could not be read, while mapped.
  void require_intact() const;
  /// Gives the pages that were read back to the system, for those who go through a model layer by layer.
  void drop_pages() const;

 private:
  Checkpoint() = default;
  static std::shared_ptr<const Checkpoint> open_any(const std::filesystem::path& path,
                                                    std::vector<CheckpointDamage>* damage);
  void open_shards(const std::filesystem::path& index_path);
  void add_file(const std::filesystem::path& path);
  void read_config();
  /// Runs `read`; its Error goes into damage_ where that is wanted.
  void attempt(const std::string& file, const std::string& tensor, const std::function<void()>& read);

  std::filesystem::path path_;
  ModelConfig config_;
  std::vector<std::shared_ptr<const SafetensorsFile>> files_;
  std::vector<Tensor> in_memory_;
  std::map<std::string, const Tensor*, std::less<>> tensors_;
  std::set<std::string, std::less<>> lost_;
  std::vector<CheckpointDamage>* damage_ = nullptr;  // while opening
};

/// Order of gate's and up's rows where a checkpoint stores them as one tensor.
enum class GateUpOrder : uint8_t { kGateFirst, kUpFirst, kInterleaved };

std::string_view to_string(GateUpOrder order);  ///< "gate-first", "up-first" or "interleaved"
/// nullopt for an unknown name.
std::optional<GateUpOrder> parse_gate_up_order(std::string_view name);

/// The order of the family that `config` names; nullopt where it is not known.
std::optional<GateUpOrder> fused_gate_up_order(const ModelConfig& config);

/// How codes of four bits are scaled. Names and dtypes tell; a caller may know better.
enum class WeightScheme : uint8_t {
  kModelOpt,           ///< NVFP4, global scales multiply
  kCompressedTensors,  ///< NVFP4, global scales divide
  kMxfp4,              ///< blocks of 32, e8m0 scales, no global scale
};

std::string_view to_string(WeightScheme scheme);  ///< "modelopt", "compressed-tensors" or "mxfp4"
/// nullopt for an unknown name.
std::optional<WeightScheme> parse_weight_scheme(std::string_view name);

/// The experts of one layer, and how they were found.
struct ExpertLayer {
  ExpertWeights weights;            ///< keeps the checkpoint mapped
  std::vector<int64_t> expert_ids;  ///< number of each expert in the checkpoint
  int64_t experts_in_checkpoint = 0;
  /// "nvfp4", "nvfp4 (compressed-tensors)", "mxfp4", "bf16", "bf16 (fused)", "mixed: ..."
  std::string scheme;
  std::string naming;         ///< e.g. "layers.3.ffn.experts.E.{w1,w3,w2}"
  std::string shared_scheme;  ///< the same of the shared expert; empty where there is none
  std::string shared_naming;
  std::vector<std::string> notes;  ///< disagreements between config and tensors
};

/// Reads the experts of `layer`: all of them, or those in `experts` (ascending, unique), and its shared
/// expert. The scheme follows from tensor names and dtypes, matrix by matrix: expert by expert NVFP4
/// (ModelOpt, DeepSeek-V4, compressed-tensors), MXFP4 (DeepSeek-V4, compressed-tensors, ModelOpt), FP8 with
/// block scales, bf16, f16 or f32; or fused (E, 2I, H) in NVFP4, in gpt-oss's MXFP4, or dense. `scheme`
/// replaces what they say of codes of four bits. Fused tensors stored transposed, (E, H, 2I), are repacked
/// into memory of their own. The order of gate and up in fused tensors is the family's, or `order`. Throws
/// Error naming file, tensor, expected and found, also for tensors beside the experts that nothing here
/// reads, and for a `scheme` where no codes of four bits are.
ExpertLayer load_experts(std::shared_ptr<const Checkpoint> checkpoint, int64_t layer,
                         const std::vector<int64_t>& experts = {}, std::optional<GateUpOrder> order = {},
                         std::optional<WeightScheme> scheme = {});

/// A layer's router. `weights` view the checkpoint's mapped files, and `hash_table`.
struct CheckpointRouter {
  RouterConfig config;
  RouterWeights weights;
  std::string name;                                        ///< e.g. "model.layers.3.mlp.gate"
  std::shared_ptr<const std::vector<int64_t>> hash_table;  ///< [vocabulary, K]; null: not hash-routed
};

/// What a bias beside a router's weight is added to.
enum class RouterBias : uint8_t {
  kNone,        ///< the family has none
  kLogits,      ///< gpt-oss
  kCorrection,  ///< the scores, for selection alone: DeepSeek
  kByName,      ///< nobody says: "bias" is the logits', "e_score_correction_bias" the scores'
};

/// The router of `layer` [experts, hidden], computed as `config` says, with the bias that `bias` says: a
/// layer without hash table must have the correction bias of kCorrection. nullopt, with the reason in
/// `why_not`, where there is none. Throws Error for tensors that do not fit, and for any that would be left
/// out.
std::optional<CheckpointRouter> load_router(const Checkpoint& checkpoint, int64_t layer, int64_t experts,
                                            int64_t hidden, const RouterConfig& config, RouterBias bias,
                                            std::string& why_not);

/// Layers that hold experts, ascending.
std::vector<int64_t> layers_with_experts(const Checkpoint& checkpoint);

/// A model's layers, ascending, by its tensors' names: those that the index promises count, also where the
/// file that should hold them can't be read.
struct CheckpointLayers {
  std::vector<int64_t> with_experts;
  std::vector<int64_t> dense;
};
CheckpointLayers list_layers(const Checkpoint& checkpoint);

}  // namespace fourfold
