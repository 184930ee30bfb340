// What goes through a layer in a test: hidden states and a routing, made or read.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "fourfold/routing.h"
#include "fourfold/safetensors.h"
#include "fourfold/tensor.h"

namespace fourfold {

struct LayerInputs {
  int64_t tokens = 0;
  int64_t hidden = 0;
  int64_t top_k = 0;
  std::vector<Bf16> x;              ///< [T, H]
  std::vector<int32_t> topk_ids;    ///< [T, K]; empty until routed
  std::vector<float> topk_weights;  ///< [T, K]
  std::vector<int64_t> token_ids;   ///< [T], for routers that go by them; empty where unknown
  std::string x_origin, routing_origin;
  bool made_up = false;  ///< random, not what some calibration has seen

  MatrixView<const Bf16> x_view() const { return {x.data(), tokens, hidden}; }
  Routing routing() const;
};

/// N(0, 1) hidden states; `outliers`: heavy tails, and one channel in 64 ten to thirty times as large.
LayerInputs make_inputs(int64_t tokens, int64_t hidden, uint64_t seed, bool outliers);

/// Each token to `top_k` different experts out of `experts`, uniformly, with positive weights that sum to 1.
void route_at_random(LayerInputs& inputs, int64_t experts, int64_t top_k, uint64_t seed);

/// A file of inputs: `x` [T, H] (bf16, f16 or f32: rounded to bf16), and `topk_ids` and `topk_weights` [T,
/// K], and `token_ids` [T], where they are. That is one layer's, or of any number of layers with names that
/// say so: `layers.3.x`, `layers.3.topk_ids`, ...; `token_ids` alone then counts for every layer. Its
/// functions throw Error naming file, tensor, expected and found.
class InputFile {
 public:
  /// Refuses a file that holds inputs of both kinds.
  explicit InputFile(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return file_->path(); }
  /// Layers that the names say; empty: one layer's, and which one is for the caller to know.
  const std::set<int64_t>& layers() const { return layers_; }
  int64_t tokens(int64_t layer) const;
  /// Tokens [first, first + count) of `layer`, as far as there are.
  LayerInputs read(int64_t layer, int64_t hidden, int64_t first, int64_t count) const;

 private:
  std::string prefix(int64_t layer) const;

  std::shared_ptr<const SafetensorsFile> file_;
  std::set<int64_t> layers_;
};

/// The first `max_tokens` tokens (0: all) of `layer` in such a file.
LayerInputs read_inputs(const std::filesystem::path& path, int64_t layer, int64_t hidden, int64_t max_tokens);

/// The routing of such a file alone, `topk_ids` and `topk_weights`: x is left empty. Throws Error where the
/// file has none.
LayerInputs read_routing(const std::filesystem::path& path);

/// Writes what read_inputs reads.
void write_inputs(const std::filesystem::path& path, const LayerInputs& inputs);

}  // namespace fourfold
