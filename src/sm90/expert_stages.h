// A set of experts on Hopper, from the rows of their input to z: stage, GEMM with activation, restage, GEMM.
// A layer has one for its routed experts, and one for its shared expert.
#pragma once

#include <span>
#include <string>

#include "cuda/expert_steps.h"
#include "cuda/prepared_weights.h"
#include "cuda/stage.h"
#include "fourfold/moe_layer.h"
#include "moe/workspace.h"
#include "sm90/expert_gemm.h"
#include "sm90/fused_layer.h"

namespace fourfold::sm90 {

using cuda::ExpertRows;
using cuda::ExpertTaps;
using cuda::Step;
using cuda::Walk;

/// Part of a workspace for a number of rows at once.
struct ExpertSpace {
  MatrixView<Bf16> x[2];  ///< staged and decoded, one matrix a term
  std::span<float> x_row_scales;
  MatrixView<Bf16> activation;
  MatrixView<Bf16> intermediate[2];
  std::span<float> intermediate_row_scales;
  MatrixView<Bf16> z;       ///< in the memory of x[0]: row m is written when no expert reads row m of x[0]
  std::span<float> amaxes;  ///< of x, of the intermediate: dynamic-tensor
  std::span<std::byte> gemm;
  std::span<int32_t> counters;  ///< kGemmTickets of each GEMM, then [E] the progress of the first
  MatrixView<Bf16> token_x;     ///< [rows / top_k] tokens staged once, apart from z; empty: they are in x[0]
  MatrixView<Bf16> fused_x;     ///< staged and decoded, apart from z: the fused kernel writes z meanwhile
  std::span<int32_t> fused_counters;  ///< empty: the layer does not fuse
};

/// Every call enqueues alone, update() excepted.
class ExpertStages {
 public:
  using Space = ExpertSpace;
  static constexpr const char* kBackend = "sm90";
  static constexpr bool kCanFuse = true;

  ExpertStages(const ExpertWeights& weights, const LayerConfig& config, const LayerOptions& options,
               const Memory& memory);

  const LayerOptions& options() const { return options_; }
  ExpertSpace carve(WorkspaceCarver& carver, int64_t rows) const;
  /// The kernels of both GEMMs, for reports.
  std::string describe_kernels(int64_t rows) const;
  /// The kernel of run_fused().
  std::string describe_fused() const { return describe_fused_layer(); }
  /// Whether there is anything to find in such a walk.
  bool needs(Walk walk) const;
  /// To be called before the first walk.
  void clear_amaxes(const ExpertSpace& space, void* stream) const;

  /// Whether so many slots go through run_fused().
  bool fuses(int64_t slots) const;
  /// What carve() does, for run_fused().
  void carve_fused(WorkspaceCarver& carver, int64_t slots, ExpertSpace& space) const;
  /// Whether run_fused() stages x beside the permutation, and sets space.fused_counters to zero itself.
  bool stages_beside(int64_t slots, const MatrixView<const Bf16>& x, const ExpertTaps& taps) const;
  /// All stages and combine, for as many slots as the space was carved for or fewer. The kernel that permuted
  /// has set space.fused_counters to zero, unless stages_beside().
  void run_fused(const ExpertSpace& space, const cuda::RowSource& source, const ExpertRows& rows,
                 const ForwardArgs& args, const ExpertTaps& taps, MatrixView<Bf16> z, const Step& step) const;

  /// All stages of bf16 rows -> z. The result is not there before the walk kCompute.
  void run(const ExpertSpace& space, const cuda::RowSource& source, const ExpertRows& rows,
           const ExpertTaps& taps, MatrixView<Bf16> z, const Step& step) const;
  /// The same for rows [first_row, first_row + rows.rows) of what a caller staged. `all_offsets`: of all of
  /// `staged`.
  void run_staged(const ExpertSpace& space, const ActivationView& staged,
                  std::span<const int32_t> all_offsets, int64_t first_row, const ExpertRows& rows,
                  const ExpertTaps& taps, MatrixView<Bf16> z, const Step& step) const;

  /// As those of PreparedWeights.
  void require_replaceable_by(const ExpertWeights& weights) const {
    weights_.require_replaceable_by(weights);
  }
  void update(const ExpertWeights& weights) { weights_.update(weights); }

 private:
  bool is_dynamic_tensor(ScalePolicy policy) const {
    return is_nvfp4(options_.activations) && policy == ScalePolicy::kDynamicTensor;
  }
  bool has_two_terms() const { return options_.activations == ActivationFormat::kNvfp4x2; }
  bool restages() const { return options_.activations != ActivationFormat::kBf16; }

  /// Says where the fused kernel finds x, and brings it there.
  void stage_fused_x(const ExpertSpace& space, const cuda::RowSource& source, const ExpertRows& rows,
                     const ExpertTaps& taps, FusedLayer& layer, const Step& step) const;
  /// The same where stages_beside(): every token once, or where its experts' scales differ every slot.
  void stage_beside(const ExpertSpace& space, const cuda::RowSource& source, const ExpertRows& rows,
                    FusedLayer& layer, const Step& step) const;
  /// What staging a stage's bf16 rows takes, but for where the result goes.
  cuda::StageArgs stage_x(const cuda::RowSource& source, const ExpertRows& rows,
                          const ExpertSpace& space) const;
  cuda::StageArgs stage_intermediate(const ExpertRows& rows, const ExpertSpace& space) const;
  void copy_activation(const ExpertRows& rows, const ExpertSpace& space, MatrixView<Bf16> to,
                       void* stream) const;

  ExpertGemm gate_up_gemm(int64_t max_rows) const;
  ExpertGemm down_gemm(int64_t max_rows) const;
  /// After x is staged and decoded in space.x. `row_scales` may be null: 1.
  void run_decoded(const ExpertSpace& space, const float* row_scales, const ExpertRows& rows,
                   const ExpertTaps& taps, const MatrixView<Bf16>& z, const Step& step) const;
  /// Both GEMMs, once `gate_up` says where its tokens are.
  void run_gemms(const ExpertSpace& space, ExpertGemm gate_up, const ExpertRows& rows, const ExpertTaps& taps,
                 const MatrixView<Bf16>& z, const Step& step) const;
  /// Whether a token's rows are staged alike, whichever experts they go to.
  bool stages_by_token() const;
  /// Whether the first GEMM reads rows of tokens, by the permutation.
  bool gathers_x(const ExpertGemm& gate_up, const cuda::RowSource& source, const ExpertTaps& taps) const;
  /// Tells that GEMM where they are: x itself, or each token staged, once.
  void gather_x(const ExpertSpace& space, const cuda::RowSource& source, ExpertGemm& gate_up,
                const Step& step) const;
  bool knows_intermediate_scale() const {
    return options_.intermediate_scale == ScalePolicy::kStatic ||
           options_.intermediate_scale == ScalePolicy::kMaxOverExperts;
  }
  /// Whether tokens that are staged once each lie apart from z, so that z may be written while they are
  /// gathered. Not where a token has one slot: that would double the room.
  bool keeps_tokens_apart(int64_t rows) const;
  /// Whether the first GEMM stages its own output, so that restage() has nothing to do.
  bool restages_in_epilogue(const ExpertGemm& gate_up, const ExpertTaps& taps) const;
  /// Whether launch_expert_gemms() runs both GEMMs: no kernel comes between, z is where it may be, and nobody
  /// asks when the first ends.
  bool run_closely(const ExpertSpace& space, const ExpertGemm& gate_up, const ExpertTaps& taps,
                   const Step& step) const;
  /// Staging of the activation's output; false where the walk ends before it.
  bool restage(const ExpertSpace& space, const ExpertRows& rows, const ExpertTaps& taps,
               const Step& step) const;

  LayerConfig config_;
  LayerOptions options_;
  PackedShape gate_up_shape_, down_shape_;  ///< of one expert
  cuda::PreparedWeights weights_;
};

}  // namespace fourfold::sm90
