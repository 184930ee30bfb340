// One call of the experts, stage by stage, by a team of threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>

#include "cpu/prepared_experts.h"
#include "cpu/staged_rows.h"
#include "fourfold/moe_layer.h"
#include "moe/workspace.h"

namespace fourfold::cpu {

/// Workspace of a pass, sized for a plan's rows.
struct PassSpace {
  StagedActivations staged_x, staged_intermediate;
  MatrixView<Bf16> activation, z;
  std::span<std::byte> operands;     ///< of x, then of the intermediate
  std::span<float> row_factors;      ///< [M]
  std::span<float> row_magnitudes;   ///< [M]
  std::span<RowGroup> groups;        ///< [min(E, M)]: experts with rows, in their order
  std::span<int32_t> largest_first;  ///< [min(E, M)]: their numbers by falling number of rows
};
PassSpace carve_pass(WorkspaceCarver& carver, const PreparedExperts& experts, const Kernels& kernels,
                     int64_t rows);

/// What is read of a pass when it is over.
struct KeptStages {
  MatrixView<Bf16> h;                    ///< where h is stored too; may be empty
  bool x = false, intermediate = false;  ///< rows in PassSpace::staged_x, staged_intermediate
};

/// Where rows of x come from.
struct RowSource {
  MatrixView<const Bf16> x;              ///< [T, H]
  std::span<const int32_t> slot_of_row;  ///< empty: row r is token r
  std::span<const int32_t> row_of_slot;  ///< [T * K], -1: none; where slot_of_row is set
  MatrixView<const float> topk_weights;  ///< of slots; used where the routing weight is on the input
};

/// Hands out numbers from 0 on, each once.
class WorkCounter {
 public:
  int64_t take() { return next_.fetch_add(1, std::memory_order_relaxed); }

 private:
  std::atomic<int64_t> next_{0};
};

/// The stages of one call. Made by one thread; then every thread of a team calls the stages in their order,
/// with a barrier after each. A thread takes work as it becomes free; results do not depend on who does it.
class ExpertPass {
 public:
  /// `staged`: rows that come staged; null where stage_x makes them.
  ExpertPass(const PreparedExperts& experts, const Kernels& kernels, const PassSpace& space,
             std::span<const int32_t> group_offsets, const KeptStages& kept, const ActivationView* staged);

  /// For each thread, 64-byte aligned: `scratch` of the stages.
  static int64_t scratch_bytes(const PreparedExperts& experts);

  /// Whether stage_x and stage_intermediate need the magnitudes of all rows first.
  bool measures_x() const { return measures(experts_.options().x_scale); }
  bool measures_intermediate() const { return measures(experts_.options().intermediate_scale); }

  void measure_x(const RowSource& source, std::byte* scratch);
  /// Stages x by the layer's format and policy, and brings it into operands.
  void stage_x(const RowSource& source, std::byte* scratch);
  /// Instead of stage_x: rows that came staged.
  void adopt_x(std::byte* scratch);
  /// First GEMM and activation.
  void multiply_up(std::byte* scratch);
  void measure_intermediate(std::byte* scratch);
  void stage_intermediate(std::byte* scratch);
  /// Second GEMM, into z.
  void multiply_down(std::byte* scratch);

 private:
  enum Stage : uint8_t { kMeasureX, kStageX, kUp, kMeasureIntermediate, kStageIntermediate, kDown, kStages };

  bool measures(ScalePolicy policy) const {
    return is_nvfp4(experts_.options().activations) && policy == ScalePolicy::kDynamicTensor;
  }
  void lay_out_groups(std::span<const int32_t> group_offsets);
  const Bf16* x_row(const RowSource& source, int64_t row) const;
  void load_x(const RowSource& source, int64_t row, float* out) const;
  void load_intermediate(int64_t row, float* out) const;
  std::span<float> adopted_row_scales() const;
  template <class Handle>
  void for_rows(Stage stage, const Handle& handle);
  const RowGroup& group_of(int64_t row) const;
  bool is_read_staged(bool kept) const { return kept || experts_.has_irregular_pairs(); }
  bool skips_staging(bool kept) const;
  bool shares_staging(const RowSource& source) const;
  bool has_x_scale_of(const RowGroup& group, const RowGroup& other) const;
  void stage_tokens(const RowSource& source, float largest, std::byte* scratch);
  void quantize_row(const RowStager& stager, ScalePolicy policy, std::span<const float> expert_scales,
                    const StagedActivations& staged, const RowGroup& group, int64_t row, float largest,
                    std::byte* scratch) const;
  /// A row, and the group that it is of; null: there is none.
  struct RowPlace {
    const RowGroup* group = nullptr;
    int64_t row = 0;
  };
  RowPlace behind(const RowPlace& place) const;
  void expand_row(const RowStager& stager, const StagedRow& staged, int64_t RowGroup::*offset,
                  const RowPlace& place, const RowPlace& next, std::byte* scratch);
  float largest_of_rows() const;
  template <class MatrixOf>
  void multiply(Stage stage, const MatrixOf& matrix_of, const GroupMultiply& args, std::byte* scratch);
  GroupMultiply arguments(const StagedActivations& staged, const float* row_scales) const;

  const PreparedExperts& experts_;
  const Kernels& kernels_;
  const RowFunctions& functions_;
  PassSpace space_;
  KeptStages kept_;
  const ActivationView* adopted_;
  std::span<const int32_t> group_offsets_;
  RowStager x_stager_, intermediate_stager_;
  int64_t rows_ = 0;
  std::span<RowGroup> groups_;
  WorkCounter counters_[kStages];
};

}  // namespace fourfold::cpu
