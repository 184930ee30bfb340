// Every stage of the layer as a plain loop: the specification in code, and the oracle of all backends.
//
// Rounding points are those of docs/formats.md, section 7. Sums run over k in ascending order, each product
// and each addition rounded to the accumulator's type, so that results do not depend on threads or blocking.
// OpenMP inside. Its GEMMs allocate their scratch: of all backends, only this one allocates in a call.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "fourfold/export.h"
#include "fourfold/moe_layer.h"

namespace FOURFOLD_EXPORT fourfold {
namespace reference {

/// Dense scaled GEMM. nvfp4x2 adds both terms of an element before going on to the next k.
void gemm(const GemmArgs& args);
/// Grouped scaled GEMM, 2Dx3D.
void grouped_gemm(const GroupedGemmArgs& args);

/// Global scale of every row by policy. `rows` [M, cols] is what will be staged, `expert_scales` [E] the
/// checkpoint's (used by the static policies), `global` [M] the result.
void activation_scales(ScalePolicy policy, MatrixView<const Bf16> rows,
                       std::span<const int32_t> group_offsets, std::span<const float> expert_scales,
                       std::span<float> global);

/// Quantizes `rows` [M, cols] into `out`. NVFP4 reads out.row_scales [M]; fp8 writes them; bf16 copies.
/// `rule` is nvfp4's.
void stage(ActivationFormat format, MatrixView<const Bf16> rows, const StagedActivations& out,
           ScaleRule rule = ScaleRule::kAmax);

/// x in permuted order [M, H]; weighted where the routing weight goes on the input.
void permute_rows(MatrixView<const Bf16> x, std::span<const int32_t> slot_of_row,
                  MatrixView<const float> topk_weights, const LayerConfig& config, MatrixView<Bf16> rows);

/// First GEMM with both halves: h [M, 2I] = bf16(alpha * acc + bias), gate in columns [0, I), up in [I, 2I).
/// Without a gate h is [M, I].
void gate_up(const ActivationView& a, std::span<const int32_t> group_offsets, const ExpertWeights& weights,
             const LayerOptions& options, MatrixView<Bf16> h);

/// h [M, 2I] or [M, I] -> [M, I], computed in float64 from bf16 and rounded through float32 to bf16.
void activate(const ActivationFunction& function, MatrixView<const Bf16> h, MatrixView<Bf16> activation);

/// Second GEMM: z [M, H] = bf16(alpha * acc + bias).
void down(const ActivationView& a, std::span<const int32_t> group_offsets, const ExpertWeights& weights,
          const LayerOptions& options, MatrixView<Bf16> z);

/// What the shared expert's output is multiplied by: sigmoid(x . gate), the sum in float32 over ascending h,
/// the sigmoid rounded to float32; 1 where it has no gate. `x` [T, H], `weights` [T].
void weigh_shared(MatrixView<const Bf16> x, const SharedExpert& shared, std::span<float> weights);

/// The shared expert's part of a sum; both empty where the layer has none.
struct SharedOutput {
  MatrixView<const Bf16> z;         ///< [T, H]
  std::span<const float> z_weight;  ///< [T]
};

/// y[t] = sum over k, in order, of topk_weights[t,k] * z[row_of_slot[t*K+k]], then of the shared expert's
/// weight * z; float32, rounded once. Where the routing weight is on the input, it is 1 here.
void combine(MatrixView<const Bf16> z, std::span<const int32_t> row_of_slot,
             MatrixView<const float> topk_weights, const LayerConfig& config, const SharedOutput& shared,
             const OutputView& y);

}  // namespace reference
}  // namespace fourfold
