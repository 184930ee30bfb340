// One run of a layer with every stage tapped.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "fourfold/moe_layer.h"
#include "tools/layer_inputs.h"

namespace fourfold {

/// Owned staged activations.
struct StagedBuffers {
  std::vector<Bf16> values;
  std::vector<uint8_t> codes, scales, residual_codes, residual_scales;
  std::vector<float> row_scales;
  StagedActivations views;

  /// Forgets all but the first `rows` rows.
  void trim(int64_t rows);

  StagedBuffers() = default;
  StagedBuffers(ActivationFormat format, int64_t rows, int64_t cols);
  StagedBuffers(StagedBuffers&&) = default;
  StagedBuffers& operator=(StagedBuffers&&) = default;

  /// Whether both are the same, bit for bit; row scales as floats: NaN is not even itself.
  bool operator==(const StagedBuffers& other) const {
    return values == other.values && codes == other.codes && scales == other.scales &&
           residual_codes == other.residual_codes && residual_scales == other.residual_scales &&
           row_scales == other.row_scales;
  }
};

/// Outputs of the shared expert's stages, a row a token.
struct SharedTrace {
  int64_t intermediate = 0, h_columns = 0;
  StagedBuffers staged_x, staged_intermediate;
  std::vector<Bf16> h, activation, z;
  std::vector<float> z_weight;
};

/// Outputs of all stages, rows in permuted order.
struct LayerTrace {
  int64_t rows = 0, tokens = 0, hidden = 0, intermediate = 0, h_columns = 0;
  Permutation permutation;
  StagedBuffers staged_x, staged_intermediate;
  std::vector<Bf16> h, activation, z, y;

  MatrixView<const Bf16> h_view() const { return {h.data(), rows, h_columns}; }
  MatrixView<const Bf16> activation_view() const { return {activation.data(), rows, intermediate}; }
  MatrixView<const Bf16> z_view() const { return {z.data(), rows, hidden}; }
  MatrixView<const Bf16> y_view() const { return {y.data(), tokens, hidden}; }

  std::optional<SharedTrace> shared;  ///< where the layer has a shared expert
  MatrixView<const Bf16> shared_h_view() const { return {shared->h.data(), tokens, shared->h_columns}; }
  MatrixView<const Bf16> shared_activation_view() const {
    return {shared->activation.data(), tokens, shared->intermediate};
  }
  MatrixView<const Bf16> shared_z_view() const { return {shared->z.data(), tokens, hidden}; }
};

/// Runs `layer`, which computes in `memory`, on `inputs`. `shared`: its shared expert, which is traced too.
LayerTrace trace(const MoeLayer& layer, const LayerInputs& inputs, const SharedExpert* shared = nullptr,
                 const Memory& memory = host_memory());

/// A workspace for a plan, aligned as layers want it.
class AlignedWorkspace {
 public:
  explicit AlignedWorkspace(size_t bytes, const Memory& memory = host_memory())
      : buffer_(memory.allocate(bytes)) {}
  std::span<std::byte> span() const { return {buffer_.data(), buffer_.bytes()}; }

 private:
  static_assert(kMemoryAlignment % kWorkspaceAlignment == 0);
  Buffer buffer_;
};

}  // namespace fourfold
