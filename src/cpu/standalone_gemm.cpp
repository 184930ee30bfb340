#include "cpu/standalone_gemm.h"

#include <omp.h>

#include <algorithm>
#include <array>

#include "base/fail.h"
#include "cpu/expert_pass.h"
#include "fourfold/scale_layout.h"
#include "moe/workspace.h"

namespace fourfold::cpu {
namespace {

bool is_nvfp4_weight(const WeightView& weight) {
  return storage_for(weight) == PanelStorage::kNvfp4;
}

/// One call.
class StandaloneGemm {
 public:
  StandaloneGemm(const Kernels& kernels, const GroupedGemmArgs& args)
      : args_(args),
        kernels_(kernels),
        functions_(row_functions_of(kernels.isa)),
        stager_(functions_, args.a.format, args.a.cols) {
    needs_floats_ = !std::all_of(args.b.begin(), args.b.end(), is_nvfp4_weight);
    largest_pair_ = 0;
    for (const WeightView& weight : args.b) {
      largest_pair_ = std::max(largest_pair_, panel_pair_bytes(storage_for(weight), args.a.cols));
    }
  }

  size_t workspace_bytes() {
    WorkspaceCarver counter;
    carve(counter);
    return counter.used();
  }

  void run() {
    if (args_.accumulation != Accumulation::kFloat32) {
      fail(ErrorCode::kUnsupported, "cpu: float64 sums are for the reference");
    }
    if (args_.a.rows == 0) return;
    WorkspaceCarver carver(args_.workspace);
    carve(carver);
    lay_out_groups();
    WorkCounter rows, pieces;
#pragma omp parallel num_threads(threads_)
    {
      std::byte* const scratch = scratch_.data() + omp_get_thread_num() * scratch_bytes();
      stage(rows, scratch);
#pragma omp barrier
      multiply(pieces, scratch);
    }
  }

 private:
  int64_t packing_bytes() const {
    return round_up(largest_pair_, 64) + round_up(args_.a.cols * 4, 64);
  }
  int64_t scratch_bytes() const {
    return round_up(std::max(stager_.scratch_bytes(), multiply_scratch_bytes()) + packing_bytes(),
                    static_cast<int64_t>(kWorkspaceAlignment));
  }

  void carve(WorkspaceCarver& carver) {
    const int64_t rows = args_.a.rows, groups = std::min(rows, static_cast<int64_t>(args_.b.size()));
    staged_ = carver.take_staged(args_.a.format, rows, args_.a.cols);
    row_scales_ = carver.take<float>(rows);
    row_factors_ = carver.take<float>(rows);
    operands_ = carver.take<std::byte>(
        most_operand_bytes(kernels_, args_.a.format, rows, groups, args_.a.cols, needs_floats_));
    group_space_ = carver.take<RowGroup>(groups);
    scratch_ = carver.take<std::byte>(threads_ * scratch_bytes());
  }

  void lay_out_groups() {
    size_t count = 0;
    int64_t offset = 0;
    for (size_t e = 0; e < args_.b.size(); ++e) {
      const int64_t rows = args_.group_offsets[e + 1] - args_.group_offsets[e];
      if (rows == 0) continue;
      const OperandForm form = choose_form(kernels_, args_.a.format, rows, needs_floats_);
      group_space_[count++] = {static_cast<int32_t>(e), args_.group_offsets[e], rows, form, offset, 0};
      offset += operand_bytes(form, args_.a.format, rows, args_.a.cols);
    }
    groups_ = group_space_.first(count);
  }

  void stage(WorkCounter& counter, std::byte* scratch) const {
    const auto count = static_cast<int64_t>(groups_.size());
    for (int64_t g = counter.take(); g < count; g = counter.take()) {
      const RowGroup& group = groups_[static_cast<size_t>(g)];
      for (int64_t row = group.first_row; row < group.first_row + group.rows; ++row) {
        const auto index = static_cast<size_t>(row);
        row_scales_[index] = global_scale_of(args_.a, row, group.expert);
        copy_staged_row(args_.a, args_.group_offsets, group, row, staged_);
        stager_.expand(row_of(staged_, row), group, row - group.first_row, operands_.data() + group.x_offset,
                       nullptr, row_factors_[index], scratch);
      }
    }
  }

  void multiply(WorkCounter& counter, std::byte* scratch) const {
    GroupMultiply multiply;
    multiply.kernels = &kernels_;
    multiply.functions = &functions_;
    multiply.format = args_.a.format;
    multiply.operands = operands_.data();
    multiply.row_factors = row_factors_.data();
    multiply.row_scales = row_scales_.data();
    multiply.staged = &staged_;
    multiply.output.d = &args_.d;
    std::byte* const packed =
        scratch + round_up(std::max(stager_.scratch_bytes(), multiply_scratch_bytes()), 64);
    auto* const decoded = reinterpret_cast<float*>(packed + round_up(largest_pair_, 64));
    const int64_t pairs = PanelSource{args_.b.data(), nullptr}.pairs();
    if (kernels_.begin_tiles != nullptr) kernels_.begin_tiles();
    const int64_t pieces = pairs * static_cast<int64_t>(groups_.size());
    for (int64_t piece = counter.take(); piece < pieces; piece = counter.take()) {
      const RowGroup& group = groups_[static_cast<size_t>(piece / pairs)];
      const PanelSource source = {&args_.b[static_cast<size_t>(group.expert)], nullptr};
      ExpertMatrix matrix;
      matrix.panels = {storage_for(*source.first),
                       source.rows(),
                       source.depth(),
                       1,
                       false,
                       piece % pairs,
                       packed,
                       nullptr};
      const uint8_t irregular =
          pack_pair(source, matrix.panels.first_pair, matrix.panels.storage, decoded, packed);
      matrix.panels.irregular = &irregular;
      matrix.globals[0] = matrix.globals[1] = global_multiplier(*source.first);
      MultiplySpace space{scratch, {}};
      const int64_t pair = matrix.panels.first_pair;
      multiply_group(multiply, {&matrix, &group, group.x_offset, pair, pair + 1}, {}, space);
    }
    if (kernels_.end_tiles != nullptr) kernels_.end_tiles();
  }

  const GroupedGemmArgs& args_;
  const Kernels& kernels_;
  const RowFunctions& functions_;
  RowStager stager_;
  int threads_ = omp_get_max_threads();
  bool needs_floats_ = false;
  int64_t largest_pair_ = 0;
  StagedActivations staged_;
  std::span<float> row_scales_, row_factors_;
  std::span<std::byte> operands_, scratch_;
  std::span<RowGroup> group_space_, groups_;
};

}  // namespace

size_t gemm_workspace_bytes(const Kernels& kernels, const GroupedGemmArgs& args) {
  return StandaloneGemm(kernels, args).workspace_bytes();
}

void grouped_gemm(const Kernels& kernels, const GroupedGemmArgs& args) {
  validate(args);
  StandaloneGemm(kernels, args).run();
}

void gemm(const Kernels& kernels, const GemmArgs& args) {
  validate(args);
  const std::array<int32_t, 2> one_group = {0, static_cast<int32_t>(args.a.rows)};
  const GroupedGemmArgs grouped = {args.a,         {&args.b, 1}, one_group, args.d, args.accumulation,
                                   args.workspace, args.stream};
  StandaloneGemm(kernels, grouped).run();
}

}  // namespace fourfold::cpu
