// One layer's weights on the GPU, in the form that a backend's grouped GEMM reads.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "fourfold/memory.h"
#include "fourfold/moe_layer.h"

namespace fourfold::cuda {

/// How a backend lays out one expert's NVFP4 matrices. Views lie on the device, codes and scales at any
/// address and stride, scales row-major or swizzled; their global scales are not looked at. Packing is
/// enqueued on the default stream and writes every byte.
class WeightPacker {
 public:
  virtual ~WeightPacker() = default;

  virtual int64_t gate_up_bytes() const = 0;
  virtual int64_t down_bytes() const = 0;
  /// `gate` is null where the activation has none.
  virtual void pack_gate_up(const BlockScaledView* gate, const BlockScaledView& up,
                            std::byte* packed) const = 0;
  virtual void pack_down(const BlockScaledView& down, std::byte* packed) const = 0;
};

/// The weights of one GEMM for all experts.
struct PreparedMatrix {
  Buffer packed;   ///< E times the packer's bytes
  Buffer globals;  ///< float32 [E, halves], multipliers
  Buffer bias;     ///< float32 [E, halves * channels]; no bytes where no expert has one

  const float* global_scales() const { return reinterpret_cast<const float*>(globals.data()); }
  const float* biases() const { return reinterpret_cast<const float*>(bias.data()); }
};

/// Why weights other than these can't be prepared on device `device`: formats other than NVFP4, or on another
/// device; names the first expert and tensor. Empty when they can.
std::string why_unpreparable(std::string_view backend, const ExpertWeights& weights, int device);

/// One row in float32, from host or device memory. Waits for the copy.
std::vector<float> decode_to_host(const DenseView& row);

/// Packs weights from host memory (a mapped checkpoint, say) or from the device. Host weights go through a
/// staging buffer for one matrix pair of one expert, so that at its peak preparation holds the packed weights
/// and that buffer.
class PreparedWeights {
 public:
  /// Returns when the weights are on the device. Throws Error for weights that why_unpreparable names.
  PreparedWeights(std::string_view backend, const ExpertWeights& weights, const LayerConfig& config,
                  const LayerOptions& options, const Memory& memory,
                  std::unique_ptr<const WeightPacker> packer);

  /// Throws Error unless shapes, formats and the matrices that have a bias are what they were.
  void require_replaceable_by(const ExpertWeights& weights) const;
  /// Replaces them, by weights that they can be replaced by, at the same addresses. Waits for the device
  /// first and last.
  void update(const ExpertWeights& weights);

  const PreparedMatrix& gate_up() const { return gate_up_; }
  const PreparedMatrix& down() const { return down_; }
  /// Static scales [E] by the layer's policies: an expert's own, or the maximum for all.
  const float* x_scales() const { return reinterpret_cast<const float*>(x_scales_.data()); }
  const float* intermediate_scales() const {
    return reinterpret_cast<const float*>(intermediate_scales_.data());
  }

 private:
  void fill(const ExpertWeights& weights);
  void pack(const ExpertWeights& weights);

  std::string backend_;
  LayerConfig config_;
  LayerOptions options_;
  const Memory& memory_;
  std::unique_ptr<const WeightPacker> packer_;
  ExpertWeights described_;  ///< shapes and formats; its pointers are not followed
  PreparedMatrix gate_up_, down_;
  Buffer x_scales_, intermediate_scales_;
};

}  // namespace fourfold::cuda
