// How synthetic models are laid out: names, dtypes, shapes and configs of real families.
#pragma once

#include <array>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "fourfold/block_scaled.h"
#include "fourfold/moe_layer.h"
#include "fourfold/safetensors.h"
#include "tools/synthesize.h"

namespace fourfold {

enum class Matrix : uint8_t { kGate, kUp, kDown };
inline constexpr std::array<Matrix, 3> kMatrices = {Matrix::kGate, Matrix::kUp, Matrix::kDown};

/// Format of a stored matrix.
enum class StoredAs : uint8_t { kBf16, kMxfp4, kFp8, kNvfp4 };

/// What distinguishes a family's checkpoints.
struct SyntheticFamily {
  std::string_view name;  ///< as fourfold/model_family.h calls it
  std::string_view model_type, architecture;
  StoredAs original;                        ///< what its originals are stored as
  std::string_view before_layer, block;     ///< "model.layers." L ".mlp."
  std::array<std::string_view, 3> linears;  ///< gate, up, down
  std::string_view router;                  ///< "gate" or "router"
  std::string_view router_bias;             ///< its suffix, or empty
  std::string_view shared;                  ///< name of the shared expert, or empty
  bool shared_gate;                         ///< its output has a gate
  bool shared_stays_fp8;                    ///< the NVFP4 model keeps it as it was
  bool is_fused;                            ///< gpt-oss: all experts in one tensor, with biases
  TileScaleType fp8_scales;                 ///< of matrices stored as FP8
};

/// nullptr for an unknown name.
const SyntheticFamily* find_synthetic_family(std::string_view name);
std::vector<std::string> synthetic_family_names();

/// One model directory: the original, or its NVFP4 conversion.
class SyntheticLayout {
 public:
  SyntheticLayout(const SynthesizeRequest& request, const SyntheticFamily& family, StoredAs experts);

  const SyntheticFamily& family() const { return family_; }
  StoredAs experts_stored_as() const { return experts_; }
  StoredAs shared_stored_as() const;
  bool has_shared() const { return !family_.shared.empty() && request_.whole_family; }
  /// Whether layer `layer` routes by token id: the first ones of DeepSeek-V4, never the last.
  bool is_hashed(int64_t layer) const;
  int64_t shared_intermediate() const;
  int64_t groups() const;  ///< of its router
  int64_t top_groups() const { return std::max<int64_t>(1, groups() / 2); }

  std::string block(int64_t layer) const;  ///< e.g. "model.layers.3.mlp."
  std::string router(int64_t layer) const;
  std::string linear(int64_t layer, int64_t expert, Matrix matrix) const;
  std::string shared_linear(int64_t layer, Matrix matrix) const;
  /// Of a fused layer: "...experts.gate_up_proj" or "...experts.down_proj".
  std::string fused(int64_t layer, bool is_down) const;

  std::vector<TensorSpec> specs() const;
  nlohmann::ordered_json config() const;
  /// Of ModelOpt, beside NVFP4 models but DeepSeek-V4's.
  nlohmann::ordered_json modelopt_config() const;

  static constexpr int64_t kVocabulary = 512;  // of token ids, where a router goes by them

 private:
  void add_linear(std::vector<TensorSpec>& specs, const std::string& name, StoredAs stored, int64_t rows,
                  int64_t cols) const;
  void add_fused(std::vector<TensorSpec>& specs, const std::string& name, int64_t rows, int64_t cols) const;
  void add_router(std::vector<TensorSpec>& specs, int64_t layer) const;
  void add_quantization(nlohmann::ordered_json& json) const;

  const SynthesizeRequest& request_;
  const SyntheticFamily& family_;
  StoredAs experts_;
};

}  // namespace fourfold
