#include "cpu/expert_pass.h"

#include <algorithm>

#include "fourfold/quantize.h"

namespace fourfold::cpu {
namespace {

// Pieces of work: small enough that threads end together, large enough that taking one costs nothing and that
// weights are read in long runs.
constexpr int64_t kRowsAPiece = 4;
constexpr int64_t kWeightBytesAPiece = 128 << 10;

ActivationFormat format_of(const PreparedExperts& experts) {
  return experts.options().activations;
}

/// Rows an odd number of lines apart: at a distance of a power of two, a pair's columns of many rows would
/// share a few sets of the caches.
MatrixView<Bf16> take_padded(WorkspaceCarver& carver, int64_t rows, int64_t cols) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(Bf16));
  const int64_t stride = ((cols + kLine - 1) / kLine | 1) * kLine;
  return {carver.take<Bf16>(rows * stride).data(), rows, cols, stride};
}

/// Pairs of a matrix that are one piece of work.
int64_t pairs_a_piece(const PanelMatrix& matrix) {
  return std::max<int64_t>(1, kWeightBytesAPiece / panel_pair_bytes(matrix.storage, matrix.depth));
}

}  // namespace

PassSpace carve_pass(WorkspaceCarver& carver, const PreparedExperts& experts, const Kernels& kernels,
                     int64_t rows) {
  const LayerConfig& config = experts.config();
  const ActivationFormat format = format_of(experts);
  const int64_t groups = std::min(experts.count(), rows);
  const auto most_bytes = [&](int64_t depth) {
    return most_operand_bytes(kernels, format, rows, groups, depth, experts.needs_floats());
  };
  PassSpace space;
  space.staged_x = carver.take_staged(format, rows, config.hidden);
  space.staged_intermediate = carver.take_staged(format, rows, config.intermediate);
  space.activation = take_padded(carver, rows, config.intermediate);
  space.z = take_padded(carver, rows, config.hidden);
  space.operands =
      carver.take<std::byte>(std::max(most_bytes(config.hidden), most_bytes(config.intermediate)));
  space.row_factors = carver.take<float>(rows);
  space.row_magnitudes = carver.take<float>(rows);
  space.groups = carver.take<RowGroup>(groups);
  space.largest_first = carver.take<int32_t>(groups);
  return space;
}

ExpertPass::ExpertPass(const PreparedExperts& experts, const Kernels& kernels, const PassSpace& space,
                       std::span<const int32_t> group_offsets, MatrixView<Bf16> h,
                       const ActivationView* staged)
    : experts_(experts),
      kernels_(kernels),
      functions_(row_functions_of(kernels.isa)),
      space_(space),
      h_(h),
      adopted_(staged),
      group_offsets_(group_offsets),
      x_stager_(functions_, format_of(experts), experts.config().hidden, experts.options().activation_rule),
      intermediate_stager_(functions_, format_of(experts), experts.config().intermediate,
                           experts.options().activation_rule) {
  lay_out_groups(group_offsets);
}

int64_t ExpertPass::scratch_bytes(const PreparedExperts& experts) {
  const auto staging = [&](int64_t depth) {
    return RowStager(row_functions_of(Isa::kPortable), format_of(experts), depth).scratch_bytes();
  };
  return std::max(
      {staging(experts.config().hidden), staging(experts.config().intermediate), multiply_scratch_bytes()});
}

void ExpertPass::lay_out_groups(std::span<const int32_t> group_offsets) {
  rows_ = group_offsets.back();
  size_t count = 0;
  for (size_t e = 0; e + 1 < group_offsets.size(); ++e) {
    const int64_t rows = group_offsets[e + 1] - group_offsets[e];
    if (rows == 0) continue;
    space_.groups[count] = {static_cast<int32_t>(e),
                            group_offsets[e],
                            rows,
                            choose_form(kernels_, format_of(experts_), rows, experts_.needs_floats()),
                            0,
                            0};
    space_.largest_first[count] = static_cast<int32_t>(count);
    ++count;
  }
  groups_ = space_.groups.first(count);
  int64_t x_offset = 0, intermediate_offset = 0;
  for (RowGroup& group : groups_) {
    group.x_offset = x_offset;
    group.intermediate_offset = intermediate_offset;
    x_offset += operand_bytes(group.form, format_of(experts_), group.rows, experts_.config().hidden);
    intermediate_offset +=
        operand_bytes(group.form, format_of(experts_), group.rows, experts_.config().intermediate);
  }
  // Large groups first: what is taken last should be short.
  std::sort(space_.largest_first.begin(), space_.largest_first.begin() + static_cast<int64_t>(count),
            [&](int32_t a, int32_t b) {
              const int64_t rows_a = groups_[static_cast<size_t>(a)].rows,
                            rows_b = groups_[static_cast<size_t>(b)].rows;
              return rows_a != rows_b ? rows_a > rows_b : a < b;
            });
}

/// Calls handle(group, row) for every row, a few at a time.
template <class Handle>
void ExpertPass::for_rows(Stage stage, const Handle& handle) {
  for (int64_t piece = counters_[stage].take(); piece * kRowsAPiece < rows_;
       piece = counters_[stage].take()) {
    const int64_t last = std::min(rows_, (piece + 1) * kRowsAPiece);
    int64_t row = piece * kRowsAPiece;
    auto group = std::upper_bound(groups_.begin(), groups_.end(), row,
                                  [](int64_t r, const RowGroup& g) { return r < g.first_row; }) -
                 1;
    for (; row < last; ++row) {
      if (row >= group->first_row + group->rows) ++group;
      handle(*group, row);
    }
  }
}

void ExpertPass::load_x(const RowSource& source, int64_t row, float* out) const {
  const int64_t cols = source.x.cols;
  if (source.slot_of_row.empty()) return functions_.widen(source.x.row(row), cols, out);
  const int64_t slot = source.slot_of_row[static_cast<size_t>(row)], top_k = source.topk_weights.cols;
  const Bf16* const x = source.x.row(slot / top_k);
  if (experts_.config().weight_on_input) {
    functions_.widen_weighted(x, source.topk_weights(slot / top_k, slot % top_k), cols, out);
  } else {
    functions_.widen(x, cols, out);
  }
}

void ExpertPass::load_intermediate(int64_t row, float* out) const {
  functions_.widen(space_.activation.row(row), space_.activation.cols, out);
}

void ExpertPass::measure_x(const RowSource& source, std::byte* scratch) {
  float* const x = x_stager_.values(scratch);
  for_rows(kMeasureX, [&](const RowGroup&, int64_t row) {
    load_x(source, row, x);
    space_.row_magnitudes[static_cast<size_t>(row)] = functions_.largest_magnitude(x, source.x.cols);
  });
}

void ExpertPass::measure_intermediate(std::byte* scratch) {
  float* const x = intermediate_stager_.values(scratch);
  for_rows(kMeasureIntermediate, [&](const RowGroup&, int64_t row) {
    load_intermediate(row, x);
    space_.row_magnitudes[static_cast<size_t>(row)] = functions_.largest_magnitude(x, space_.activation.cols);
  });
}

/// Of row_magnitudes; every thread finds the same.
float ExpertPass::largest_of_rows() const {
  return functions_.largest_magnitude(space_.row_magnitudes.data(), rows_);
}

/// Quantizes what lies in the stager's scratch.
void ExpertPass::quantize_row(const RowStager& stager, ScalePolicy policy,
                              std::span<const float> expert_scales, const StagedActivations& staged,
                              const RowGroup& group, int64_t row, float largest, std::byte* scratch) const {
  if (is_nvfp4(format_of(experts_))) {
    float& scale = staged.row_scales[static_cast<size_t>(row)];
    switch (policy) {
      case ScalePolicy::kStatic:
      case ScalePolicy::kMaxOverExperts:
        scale = expert_scales[static_cast<size_t>(group.expert)];
        break;
      case ScalePolicy::kDynamicTensor:
        scale = nvfp4_global_scale(largest);
        break;
      case ScalePolicy::kDynamicToken:
        scale = nvfp4_global_scale(functions_.largest_magnitude(stager.values(scratch), stager.depth()));
        break;
    }
  }
  stager.quantize(row, staged, scratch);
}

void ExpertPass::stage_x(const RowSource& source, std::byte* scratch) {
  const float largest = measures_x() ? largest_of_rows() : 0.0f;
  for_rows(kStageX, [&](const RowGroup& group, int64_t row) {
    load_x(source, row, x_stager_.values(scratch));
    quantize_row(x_stager_, experts_.options().x_scale, experts_.x_scales(), space_.staged_x, group, row,
                 largest, scratch);
    expand_row(x_stager_, space_.staged_x, group, row, group.x_offset, scratch);
  });
}

void ExpertPass::stage_intermediate(std::byte* scratch) {
  const float largest = measures_intermediate() ? largest_of_rows() : 0.0f;
  for_rows(kStageIntermediate, [&](const RowGroup& group, int64_t row) {
    load_intermediate(row, intermediate_stager_.values(scratch));
    quantize_row(intermediate_stager_, experts_.options().intermediate_scale, experts_.intermediate_scales(),
                 space_.staged_intermediate, group, row, largest, scratch);
    expand_row(intermediate_stager_, space_.staged_intermediate, group, row, group.intermediate_offset,
               scratch);
  });
}

void ExpertPass::adopt_x(std::byte* scratch) {
  const std::span<float> scales = adopted_row_scales();
  for_rows(kStageX, [&](const RowGroup& group, int64_t row) {
    scales[static_cast<size_t>(row)] = global_scale_of(*adopted_, row, group.expert);
    copy_staged_row(*adopted_, group_offsets_, group, row, space_.staged_x);
    expand_row(x_stager_, space_.staged_x, group, row, group.x_offset, scratch);
  });
}

void ExpertPass::expand_row(const RowStager& stager, const StagedActivations& staged, const RowGroup& group,
                            int64_t row, int64_t operand_offset, std::byte* scratch) {
  stager.expand(row_of(staged, row), group, row - group.first_row, space_.operands.data() + operand_offset,
                space_.row_factors[static_cast<size_t>(row)], scratch);
}

/// Adopted rows of bf16 may have scales too; staged ones have none.
std::span<float> ExpertPass::adopted_row_scales() const {
  return format_of(experts_) == ActivationFormat::kBf16 ? space_.row_magnitudes : space_.staged_x.row_scales;
}

template <class MatrixOf>
void ExpertPass::multiply(Stage stage, const MatrixOf& matrix_of, const GroupMultiply& args,
                          std::byte* scratch) {
  if (groups_.empty()) return;
  const PanelMatrix& shape = matrix_of(0).panels;
  const int64_t step = pairs_a_piece(shape), pieces = (shape.pairs + step - 1) / step;
  const auto count = static_cast<int64_t>(groups_.size());
  if (kernels_.begin_tiles != nullptr) kernels_.begin_tiles();
  for (int64_t piece = counters_[stage].take(); piece < pieces * count; piece = counters_[stage].take()) {
    const RowGroup& group =
        groups_[static_cast<size_t>(space_.largest_first[static_cast<size_t>(piece / pieces)])];
    const int64_t first = piece % pieces * step;
    multiply_group(args, matrix_of(group.expert), group,
                   stage == kUp ? group.x_offset : group.intermediate_offset, first,
                   std::min(shape.pairs, first + step), scratch);
  }
  if (kernels_.end_tiles != nullptr) kernels_.end_tiles();
}

GroupMultiply ExpertPass::arguments(const StagedActivations& staged, const float* row_scales) const {
  GroupMultiply args;
  args.kernels = &kernels_;
  args.functions = &functions_;
  args.format = format_of(experts_);
  args.operands = space_.operands.data();
  args.row_factors = space_.row_factors.data();
  args.row_scales = row_scales;
  args.staged = &staged;
  return args;
}

void ExpertPass::multiply_up(std::byte* scratch) {
  const float* row_scales = space_.staged_x.row_scales.data();
  if (adopted_ != nullptr) row_scales = adopted_row_scales().data();
  GroupMultiply args = arguments(space_.staged_x, row_scales);
  args.output.activation = &experts_.config().activation;
  args.output.activated = space_.activation;
  args.output.h = h_;
  multiply(
      kUp, [&](int32_t expert) -> const ExpertMatrix& { return experts_.up(expert); }, args, scratch);
}

void ExpertPass::multiply_down(std::byte* scratch) {
  GroupMultiply args = arguments(space_.staged_intermediate, space_.staged_intermediate.row_scales.data());
  const OutputView z = space_.z;
  args.output.d = &z;
  multiply(
      kDown, [&](int32_t expert) -> const ExpertMatrix& { return experts_.down(expert); }, args, scratch);
}

}  // namespace fourfold::cpu
