#include "cpu/expert_pass.h"

#include <omp.h>

#include <algorithm>

#include "fourfold/quantize.h"

namespace fourfold::cpu {
namespace {

constexpr int64_t kRowsAPiece = 4;  // of staging

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

/// Cuts the matrices of all groups, which have one shape, into pieces of work: small enough that threads end
/// together, large enough that weights are read in long runs. Two threads that read short ones in turns took
/// a fifth more time: what is asked for ahead then is what the other one needs.
class WorkPieces {
 public:
  /// `order`: indices of groups, as they are to be taken. By a thread of the team.
  WorkPieces(std::span<const RowGroup> groups, std::span<const int32_t> order, const PanelMatrix& shape)
      : groups_(groups),
        order_(order),
        pairs_(shape.pairs),
        bytes_(shape.pairs * panel_pair_bytes(shape.storage, shape.depth)),
        threads_(omp_get_num_threads()) {
    for (const RowGroup& group : groups) cost_ += cost_of(group);
    for (const RowGroup& group : groups) count_ += divided_up(pairs_, step_of(group));
  }

  struct Piece {
    const RowGroup* group = nullptr;  // null: there are no more
    int64_t first = 0, last = 0;      // pairs
  };
  /// The numbers that one caller asks for ascend.
  Piece at(int64_t number) {
    for (; place_ < order_.size(); ++place_) {
      const RowGroup& group = groups_[static_cast<size_t>(order_[place_])];
      const int64_t step = step_of(group), first = (number - first_number_) * step;
      if (first < pairs_) return {&group, first, std::min(pairs_, first + step)};
      first_number_ += divided_up(pairs_, step);
    }
    return {};
  }

  /// Whether a thread may hold a second piece without another one's going idle.
  bool are_many() const { return count_ >= kManyAThread * threads_; }

 private:
  static constexpr int64_t kLeastBytes = 128 << 10, kMostBytes = 1 << 20;  // where reading binds
  static constexpr int64_t kPiecesAThread = 12, kManyAThread = 8;
  static constexpr int64_t kReadingCostInRows = 8;  // weights are read while so many rows are multiplied

  static int64_t divided_up(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
  static int64_t cost_of(const RowGroup& group) { return group.rows + kReadingCostInRows; }

  /// Pairs a piece. Every thread gets one, however short they are then.
  int64_t step_of(const RowGroup& group) const {
    const int64_t least = divided_up(bytes_, kMostBytes);
    const int64_t of_every_thread = divided_up(threads_, static_cast<int64_t>(groups_.size()));
    const int64_t of_least_work = bytes_ * cost_of(group) / (kLeastBytes * (1 + kReadingCostInRows));
    const int64_t most = std::max({least, of_least_work, of_every_thread});
    const int64_t wanted = divided_up(kPiecesAThread * threads_ * cost_of(group), cost_);
    return divided_up(pairs_, std::clamp(wanted, least, most));
  }

  std::span<const RowGroup> groups_;
  std::span<const int32_t> order_;
  int64_t pairs_, bytes_, threads_, cost_ = 0, count_ = 0;
  size_t place_ = 0;          // in the order
  int64_t first_number_ = 0;  // of the group there
};

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
                       std::span<const int32_t> group_offsets, const KeptStages& kept,
                       const ActivationView* staged)
    : experts_(experts),
      kernels_(kernels),
      functions_(row_functions_of(kernels.isa)),
      space_(space),
      kept_(kept),
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

const RowGroup& ExpertPass::group_of(int64_t row) const {
  const auto next = std::upper_bound(groups_.begin(), groups_.end(), row,
                                     [](int64_t r, const RowGroup& g) { return r < g.first_row; });
  return *(next - 1);
}

ExpertPass::RowPlace ExpertPass::behind(const RowPlace& place) const {
  const int64_t row = place.row + 1;
  if (row >= rows_) return {};
  return {row < place.group->first_row + place.group->rows ? place.group : place.group + 1, row};
}

/// Calls handle(group, row) for every row, a few at a time.
template <class Handle>
void ExpertPass::for_rows(Stage stage, const Handle& handle) {
  for (int64_t piece = counters_[stage].take(); piece * kRowsAPiece < rows_;
       piece = counters_[stage].take()) {
    const int64_t last = std::min(rows_, (piece + 1) * kRowsAPiece);
    int64_t row = piece * kRowsAPiece;
    const RowGroup* group = &group_of(row);
    for (; row < last; ++row) {
      if (row >= group->first_row + group->rows) ++group;
      handle(*group, row);
    }
  }
}

const Bf16* ExpertPass::x_row(const RowSource& source, int64_t row) const {
  if (source.slot_of_row.empty()) return source.x.row(row);
  return source.x.row(source.slot_of_row[static_cast<size_t>(row)] / source.topk_weights.cols);
}

void ExpertPass::load_x(const RowSource& source, int64_t row, float* out) const {
  const Bf16* const x = x_row(source, row);
  if (source.slot_of_row.empty() || !experts_.config().weight_on_input) {
    return functions_.widen(x, source.x.cols, out);
  }
  const int64_t slot = source.slot_of_row[static_cast<size_t>(row)], top_k = source.topk_weights.cols;
  functions_.widen_weighted(x, source.topk_weights(slot / top_k, slot % top_k), source.x.cols, out);
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

/// Whether rows of bf16 go into operands from where they lie.
bool ExpertPass::skips_staging(bool kept) const {
  return format_of(experts_) == ActivationFormat::kBf16 && !is_read_staged(kept);
}

/// Whether a token's rows are staged together: where they hold the same values, and tokens suffice to keep
/// all threads busy.
bool ExpertPass::shares_staging(const RowSource& source) const {
  if (source.row_of_slot.empty() || experts_.config().weight_on_input) return false;
  const int64_t threads = omp_get_num_threads(), tokens = source.x.rows;
  return tokens % threads == 0 || tokens >= 4 * threads;
}

/// Whether a token's rows in the two groups are staged alike. Scales that a row has of itself are the same.
bool ExpertPass::has_x_scale_of(const RowGroup& group, const RowGroup& other) const {
  const ScalePolicy policy = experts_.options().x_scale;
  if (!is_nvfp4(format_of(experts_)) || policy == ScalePolicy::kDynamicTensor ||
      policy == ScalePolicy::kDynamicToken) {
    return true;
  }
  const std::span<const float> scales = experts_.x_scales();
  return scales[static_cast<size_t>(group.expert)] == scales[static_cast<size_t>(other.expert)];
}

/// Token by token: quantized once for as long as scales stay the same, and copied only where staged rows are
/// read.
void ExpertPass::stage_tokens(const RowSource& source, float largest, std::byte* scratch) {
  const bool is_read = is_read_staged(kept_.x);
  const std::span<const int32_t> rows = source.row_of_slot;
  const auto top_k = static_cast<size_t>(source.topk_weights.cols);
  const auto place_of = [&](size_t slot) {
    if (slot >= rows.size() || rows[slot] < 0) return RowPlace{};
    return RowPlace{&group_of(rows[slot]), rows[slot]};
  };
  for (int64_t token = counters_[kStageX].take(); token < source.x.rows; token = counters_[kStageX].take()) {
    const size_t first = static_cast<size_t>(token) * top_k;
    RowPlace quantized, next = place_of(first);
    for (size_t slot = first; slot < first + top_k; ++slot) {
      const RowPlace place = next;
      next = place_of(slot + 1);
      if (place.group == nullptr) continue;
      int64_t staged_row = place.row;
      if (quantized.group != nullptr && has_x_scale_of(*place.group, *quantized.group)) {
        copy_row_scale(space_.staged_x, quantized.row, place.row);
        if (is_read) {
          copy_row(space_.staged_x, quantized.row, place.row);
        } else {
          staged_row = quantized.row;
        }
      } else {
        load_x(source, place.row, x_stager_.values(scratch));
        quantize_row(x_stager_, experts_.options().x_scale, experts_.x_scales(), space_.staged_x,
                     *place.group, place.row, largest, scratch);
        quantized = place;
      }
      expand_row(x_stager_, row_of(space_.staged_x, staged_row), &RowGroup::x_offset, place, next, scratch);
    }
  }
}

void ExpertPass::stage_x(const RowSource& source, std::byte* scratch) {
  const float largest = measures_x() ? largest_of_rows() : 0.0f;
  const bool as_it_is = skips_staging(kept_.x) && !experts_.config().weight_on_input;
  if (!as_it_is && shares_staging(source)) return stage_tokens(source, largest, scratch);
  for_rows(kStageX, [&](const RowGroup& group, int64_t row) {
    StagedRow staged;
    if (as_it_is) {
      staged.values = x_row(source, row);
    } else {
      load_x(source, row, x_stager_.values(scratch));
      quantize_row(x_stager_, experts_.options().x_scale, experts_.x_scales(), space_.staged_x, group, row,
                   largest, scratch);
      staged = row_of(space_.staged_x, row);
    }
    expand_row(x_stager_, staged, &RowGroup::x_offset, {&group, row}, behind({&group, row}), scratch);
  });
}

void ExpertPass::stage_intermediate(std::byte* scratch) {
  const float largest = measures_intermediate() ? largest_of_rows() : 0.0f;
  const bool as_it_is = skips_staging(kept_.intermediate);
  for_rows(kStageIntermediate, [&](const RowGroup& group, int64_t row) {
    StagedRow staged;
    if (as_it_is) {
      staged.values = space_.activation.row(row);
    } else {
      load_intermediate(row, intermediate_stager_.values(scratch));
      quantize_row(intermediate_stager_, experts_.options().intermediate_scale,
                   experts_.intermediate_scales(), space_.staged_intermediate, group, row, largest, scratch);
      staged = row_of(space_.staged_intermediate, row);
    }
    expand_row(intermediate_stager_, staged, &RowGroup::intermediate_offset, {&group, row},
               behind({&group, row}), scratch);
  });
}

void ExpertPass::adopt_x(std::byte* scratch) {
  const std::span<float> scales = adopted_row_scales();
  for_rows(kStageX, [&](const RowGroup& group, int64_t row) {
    scales[static_cast<size_t>(row)] = global_scale_of(*adopted_, row, group.expert);
    copy_staged_row(*adopted_, group_offsets_, group, row, space_.staged_x);
    expand_row(x_stager_, row_of(space_.staged_x, row), &RowGroup::x_offset, {&group, row},
               behind({&group, row}), scratch);
  });
}

/// `next`: the row that this thread, presumably, brings into operands after this one.
void ExpertPass::expand_row(const RowStager& stager, const StagedRow& staged, int64_t RowGroup::*offset,
                            const RowPlace& place, const RowPlace& next, std::byte* scratch) {
  const auto operand_of = [&](const RowGroup& group) { return space_.operands.data() + group.*offset; };
  const Bf16* next_tile_row = nullptr;
  if (next.group != nullptr && next.group->form == OperandForm::kTiles) {
    next_tile_row = stager.tile_row(operand_of(*next.group), next.row - next.group->first_row);
  }
  stager.expand(staged, *place.group, place.row - place.group->first_row, operand_of(*place.group),
                next_tile_row, space_.row_factors[static_cast<size_t>(place.row)], scratch);
}

/// Adopted rows of bf16 may have scales too; staged ones have none.
std::span<float> ExpertPass::adopted_row_scales() const {
  return format_of(experts_) == ActivationFormat::kBf16 ? space_.row_magnitudes : space_.staged_x.row_scales;
}

/// Where there are many pieces, a thread takes its next one before it multiplies one, so that it can ask for
/// what that reads.
template <class MatrixOf>
void ExpertPass::multiply(Stage stage, const MatrixOf& matrix_of, const GroupMultiply& args,
                          std::byte* scratch) {
  if (groups_.empty()) return;
  WorkPieces pieces(groups_, space_.largest_first.first(groups_.size()), matrix_of(0).panels);
  const auto take = [&]() -> GroupPairs {
    const WorkPieces::Piece piece = pieces.at(counters_[stage].take());
    if (piece.group == nullptr) return {};
    const RowGroup& group = *piece.group;
    return {&matrix_of(group.expert), &group, stage == kUp ? group.x_offset : group.intermediate_offset,
            piece.first, piece.last};
  };
  if (kernels_.begin_tiles != nullptr) kernels_.begin_tiles();
  MultiplySpace space{scratch, {}};
  for (GroupPairs pairs = take(), next; pairs.matrix != nullptr; pairs = next) {
    next = pieces.are_many() ? take() : GroupPairs{};
    multiply_group(args, pairs, next, space);
    if (!pieces.are_many()) next = take();
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
  args.output.h = kept_.h;
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
