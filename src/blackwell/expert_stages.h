// A set of experts on Blackwell, from the rows of their input to z: stage, GEMM, activate and restage, GEMM.
// A layer has one for its routed experts, and one for its shared expert.
#pragma once

#include <span>
#include <string>

#include "blackwell/block_weights.h"
#include "blackwell/finish_sums.h"
#include "blackwell/group_arrays.h"
#include "blackwell/grouped_gemm.h"
#include "cuda/expert_steps.h"
#include "cuda/prepared_weights.h"
#include "cuda/stage.h"
#include "fourfold/moe_layer.h"
#include "moe/workspace.h"

namespace fourfold::blackwell {

using cuda::ExpertRows;
using cuda::ExpertTaps;
using cuda::Step;
using cuda::Walk;

/// Rows in the layout of the GEMMs.
struct StackedSpace {
  std::span<uint8_t> codes, scales;
  std::span<float> row_scales;
};

/// Part of a workspace for a number of rows at once.
struct ExpertSpace {
  int64_t rows = 0;                ///< that it was carved for
  std::span<std::byte> arrays[2];  ///< of gate/up's groups and of down's
  std::span<cuda::RowPlace> places;
  StackedSpace x, intermediate;
  std::span<std::byte> result;  ///< of gate/up, then of down
  MatrixView<Bf16> z;
  std::span<float> amaxes;  ///< of x, of the intermediate: dynamic-tensor
  std::span<std::byte> gemm;
};

/// Every call enqueues alone, update() excepted.
///
/// A GEMM writes bf16 with alpha in it where alpha is one number a group and nothing else goes into a value:
/// one term, scales known before, no bias. Else it writes float32 sums, and the kernel behind it does the
/// rest: the rounding points of docs/formats.md are the same either way.
class ExpertStages {
 public:
  using Space = ExpertSpace;
  static constexpr const char* kBackend = "blackwell";
  static constexpr bool kCanFuse = false;

  ExpertStages(const ExpertWeights& weights, const LayerConfig& config, const LayerOptions& options,
               const Memory& memory, const GemmKernels& kernels);

  ExpertSpace carve(WorkspaceCarver& carver, int64_t rows) const;
  /// The kernels of both GEMMs, for reports.
  std::string describe_kernels(int64_t rows) const;
  /// Whether there is anything to find in such a walk.
  bool needs(Walk walk) const;
  /// To be called before the first walk.
  void clear_amaxes(const ExpertSpace& space, void* stream) const;

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
  /// One of the two GEMMs.
  struct Gemm {
    const cuda::PreparedMatrix& weights;
    BlockShape shape;  ///< of one matrix
    int32_t halves;
    bool to_bf16;
  };
  /// What is common to the stages of one walk over one part.
  struct Pass {
    const ExpertSpace& space;
    const ExpertRows& rows;
    const ExpertTaps& taps;
    MatrixView<Bf16> z;
    const Step& step;
    bool known_scales;  ///< of x, one an expert
  };

  int32_t terms() const { return options_.activations == ActivationFormat::kNvfp4x2 ? 2 : 1; }
  static bool is_known_before(ScalePolicy policy) {
    return policy == ScalePolicy::kStatic || policy == ScalePolicy::kMaxOverExperts;
  }
  Gemm gate_up_gemm(bool known_scales) const;
  Gemm down_gemm() const;
  const GemmKernel& kernel_of(const Gemm& gemm) const {
    return gemm.to_bf16 ? kernels_.to_bf16 : kernels_.to_float32;
  }

  cuda::StackedRows stacked(const ExpertSpace& space, const StackedSpace& rows, int64_t depth) const;
  GemmResult gate_up_result(const Pass& pass) const;
  GemmResult down_result(const Pass& pass) const;
  StackedGemm stacked_gemm(const Gemm& gemm, const GemmResult& result, const StackedSpace& a,
                           const float* scales) const;
  /// Group arrays, places, and zeros where padding of the scales is.
  void build(const Pass& pass) const;
  void multiply(const Pass& pass, const Gemm& gemm, int which) const;
  ActivateRows activation_of(const Pass& pass) const;
  /// After x lies in space.x.
  void run_stacked(const Pass& pass) const;

  LayerConfig config_;
  LayerOptions options_;
  const GemmKernels& kernels_;
  BlockShape gate_up_shape_, down_shape_;
  cuda::PreparedWeights weights_;
};

}  // namespace fourfold::blackwell
