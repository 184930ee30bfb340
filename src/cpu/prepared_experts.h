// The weights of a layer's experts in panels, with everything else that a call needs of them.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "cpu/group_multiply.h"
#include "cpu/huge_buffer.h"
#include "fourfold/moe_layer.h"

namespace fourfold::cpu {

class PreparedExperts {
 public:
  /// Packs in parallel; throws std::bad_alloc. The arguments fit each other, and weights lie on the host.
  PreparedExperts(const ExpertWeights& weights, const LayerConfig& config, const LayerOptions& options);

  /// Throws Error unless weights have the shapes and formats of those that are here.
  void require_alike(const ExpertWeights& weights) const;
  /// Replaces the weights by such ones, in place.
  void update(const ExpertWeights& weights);

  const LayerConfig& config() const { return config_; }
  const LayerOptions& options() const { return options_; }
  int64_t count() const { return static_cast<int64_t>(up_.size()); }

  /// Gate and up, or up alone: h = x . up^T.
  const ExpertMatrix& up(int64_t expert) const { return up_[static_cast<size_t>(expert)]; }
  const ExpertMatrix& down(int64_t expert) const { return down_[static_cast<size_t>(expert)]; }
  /// Whether some matrix is not NVFP4, so that operands are floats.
  bool needs_floats() const { return needs_floats_; }
  /// Whether some pair takes irregular_multiply.h, which reads staged rows.
  bool has_irregular_pairs() const { return has_irregular_pairs_; }

  /// Static scales [E], as the scale policies want them.
  std::span<const float> x_scales() const { return x_scales_; }
  std::span<const float> intermediate_scales() const { return intermediate_scales_; }

 private:
  struct Packing;
  void lay_out(const ExpertWeights& weights);
  void pack(const ExpertWeights& weights);
  void read_scales(const ExpertWeights& weights);
  void read_biases(const ExpertWeights& weights);

  LayerConfig config_;
  LayerOptions options_;
  HugeBuffer buffer_;
  std::vector<uint8_t> irregular_;
  bool has_irregular_pairs_ = false;
  std::vector<float> biases_;
  std::vector<ExpertMatrix> up_, down_;
  std::vector<float> x_scales_, intermediate_scales_;
  bool needs_floats_ = false;
};

}  // namespace fourfold::cpu
