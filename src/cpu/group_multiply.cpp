#include "cpu/group_multiply.h"

#include <algorithm>

#include "cpu/irregular_multiply.h"
#include "cpu/prefetch.h"

namespace fourfold::cpu {
namespace {

constexpr int64_t kSumsBytes = kRowsAtATime * kPairRows * 4;

/// Some rows of a group on their way through a pair.
struct RowRange {
  int64_t first = 0;  // in the group
  int64_t count = 0;
};

class PairMultiplier {
 public:
  PairMultiplier(const GroupMultiply& args, const GroupPairs& pairs, MultiplySpace& space)
      : args_(args),
        matrix_(*pairs.matrix),
        group_(*pairs.group),
        operand_(args.operands + pairs.operand_offset),
        sums_(reinterpret_cast<float*>(space.scratch)),
        scratch_(space.scratch + kSumsBytes),
        decoded_ahead_(space.decoded_ahead) {
    if (group_.form != OperandForm::kTiles) decoded_ahead_ = {};  // overwritten
  }

  /// `next`: what this thread multiplies after it, of this or another matrix.
  void run(int64_t pair, const NextTiles& next, const RowRange& rows) {
    PairSums sums;
    sums.sums = sums_;
    sums.rows = rows.count;
    const int64_t row = group_.first_row + rows.first;
    const bool irregular = matrix_.panels.is_irregular(pair);
    if (irregular) {
      multiply_irregular(matrix_.panels, pair, *args_.staged, args_.format, row, rows.count, sums_);
    } else {
      ask_for_targets(pair, rows);
      multiply(pair, next, rows);
      sums.terms = operand_rows(group_.form, args_.format);
      const bool is_normalised = group_.form == OperandForm::kBf16Rows || group_.form == OperandForm::kTiles;
      if (is_normalised && args_.format == ActivationFormat::kBf16) {
        sums.row_factors = args_.row_factors + row;
      }
    }
    if (args_.row_scales != nullptr) sums.row_scales = args_.row_scales + row;
    for (int panel = 0; panel < 2; ++panel) {
      sums.globals[panel] = matrix_.globals[panel];
      if (matrix_.biases != nullptr)
        sums.biases[panel] = matrix_.biases + pair * kPairRows + panel * kPanelRows;
    }
    store(pair, row, sums);
  }

 private:
  void multiply(int64_t pair, const NextTiles& next, const RowRange& rows) {
    const int64_t chunks = matrix_.panels.chunks();
    const auto* const weights = reinterpret_cast<const uint8_t*>(matrix_.panels.pair(pair));
    const int terms = operand_rows(group_.form, args_.format);
    const int64_t row_bytes = terms * operand_row_bytes(group_.form, matrix_.panels.depth);
    switch (group_.form) {
      case OperandForm::kInts:
        return args_.kernels->multiply_ints(
            weights, chunks, reinterpret_cast<const IntBlock*>(operand_ + rows.first * row_bytes),
            rows.count * terms, scratch_, sums_);
      case OperandForm::kFloats: {
        const auto* const values = reinterpret_cast<const float*>(operand_ + rows.first * row_bytes);
        if (matrix_.panels.storage != PanelStorage::kNvfp4)
          return multiply_dense(pair, values, rows.count * terms);
        return multiply_pair_floats(*args_.kernels, weights, chunks, values, rows.count * terms, scratch_,
                                    sums_);
      }
      case OperandForm::kBf16Rows:
        return args_.kernels->multiply_bf16(weights, chunks,
                                            reinterpret_cast<const Bf16*>(operand_ + rows.first * row_bytes),
                                            rows.count, scratch_, sums_);
      case OperandForm::kTiles: {
        // rows.first is a multiple of a tile's rows.
        const std::byte* const tiles = operand_ + rows.first * terms_of(args_.format) * row_bytes;
        return args_.kernels->multiply_tiles(weights, next, chunks, tiles,
                                             (rows.count + kTileRows - 1) / kTileRows, terms_of(args_.format),
                                             scratch_, decoded_ahead_, sums_);
      }
    }
  }

  void multiply_dense(int64_t pair, const float* rows, int64_t count) const {
    const int64_t depth = matrix_.panels.chunks() * kChunkDepth;
    const std::byte* const data = matrix_.panels.pair(pair);
    std::fill_n(sums_, count * kPairRows, 0.0f);
    for (int64_t k = 0; k < depth; k += kFloatDepth) {
      const int64_t now = std::min(kFloatDepth, depth - k);
      const float* weights = reinterpret_cast<const float*>(data) + k * kPairRows;
      if (matrix_.panels.storage == PanelStorage::kBf16) {
        auto* const widened = reinterpret_cast<float*>(scratch_);
        args_.functions->widen(reinterpret_cast<const Bf16*>(data) + k * kPairRows, now * kPairRows, widened);
        weights = widened;
      }
      args_.kernels->multiply_floats(weights, now, rows + k, depth, count, sums_);
    }
  }

  /// The lines that sums will be stored to: on their way while the pair is multiplied.
  void ask_for_targets(int64_t pair, const RowRange& rows) const {
    const PairColumns columns = columns_of(matrix_.panels, pair);
    const GroupOutput& output = args_.output;
    const auto* const d = output.d == nullptr ? nullptr : std::get_if<MatrixView<Bf16>>(output.d);
    const MatrixView<Bf16> to = d != nullptr ? *d : output.activated;
    if (to.empty()) return;
    const int64_t row = group_.first_row + rows.first;
    for (int64_t i = 0; i < rows.count; ++i) __builtin_prefetch(to.row(row + i) + columns.first[0], 1, 2);
  }

  void store(int64_t pair, int64_t row, const PairSums& sums) const {
    const PairColumns columns = columns_of(matrix_.panels, pair);
    const GroupOutput& output = args_.output;
    if (output.activation != nullptr) {
      const bool is_gate_up = matrix_.panels.is_gate_up;
      const PairTargets targets = targets_in(output.h, is_gate_up ? matrix_.panels.rows : 0, columns, row);
      args_.functions->activate(*output.activation, sums, targets,
                                output.activated.row(row) + columns.first[0], output.activated.stride);
    } else if (const auto* const bf16 = std::get_if<MatrixView<Bf16>>(output.d)) {
      args_.functions->store_bf16(sums, targets_in(*bf16, 0, columns, row));
    } else {
      const auto& d = std::get<MatrixView<float>>(*output.d);
      float* const to[2] = {d.row(row) + columns.first[0], d.row(row) + columns.first[1]};
      args_.functions->store_float(sums, columns.count, to, d.stride);
    }
  }

  /// `second_half`: where the second panel's columns start, beside their own number.
  static PairTargets targets_in(const MatrixView<Bf16>& d, int64_t second_half, const PairColumns& columns,
                                int64_t row) {
    PairTargets targets;
    for (int panel = 0; panel < 2; ++panel) {
      targets.columns[panel] = columns.count[panel];
      if (!d.empty()) targets.h[panel] = d.row(row) + columns.first[panel] + panel * second_half;
    }
    targets.h_stride = d.stride;
    return targets;
  }

  const GroupMultiply& args_;
  const ExpertMatrix& matrix_;
  const RowGroup& group_;
  const std::byte* operand_;
  float* sums_;
  std::byte* scratch_;
  DecodedAhead& decoded_ahead_;
};

/// Where a pair lies that tiles can be decoded from; null: nowhere.
const uint8_t* regular_pair(const GroupPairs& pairs, int64_t pair) {
  if (pairs.matrix == nullptr || pairs.group->form != OperandForm::kTiles) return nullptr;
  const PanelMatrix& panels = pairs.matrix->panels;
  return panels.is_irregular(pair) ? nullptr : reinterpret_cast<const uint8_t*>(panels.pair(pair));
}

/// The operands that `next` reads first, in equal parts, one for each of `parts` pairs before it. None where
/// its rows are those of `pairs`.
class NextOperand {
 public:
  NextOperand(const GroupMultiply& args, const GroupPairs& pairs, const GroupPairs& next, int64_t parts) {
    if (next.matrix == nullptr || next.group == pairs.group || next.group->form != OperandForm::kTiles)
      return;
    const int64_t rows = std::min(next.group->rows, kRowsAtATime);
    begin_ = args.operands + next.operand_offset;
    end_ = begin_ + operand_bytes(OperandForm::kTiles, args.format, rows, next.matrix->panels.depth);
    part_ = (end_ - begin_ + parts - 1) / parts;
  }

  /// What a thread asks for meanwhile, beside the pair that comes next.
  NextTiles beside(const uint8_t* pair) {
    const NextTiles next{pair, begin_, std::min(part_, end_ - begin_)};
    begin_ += next.row_bytes;
    return next;
  }

 private:
  const std::byte *begin_ = nullptr, *end_ = nullptr;
  int64_t part_ = 0;
};

/// The first weights of `next`, unless they lie right behind those of `pairs`, where the kernels ask for them
/// anyway.
void ask_for_weights(const GroupPairs& pairs, const GroupPairs& next) {
  if (next.matrix == nullptr || (next.matrix == pairs.matrix && next.first == pairs.last)) return;
  const PanelMatrix& panels = next.matrix->panels;
  const int64_t bytes = (next.last - next.first) * panel_pair_bytes(panels.storage, panels.depth);
  prefetch_to_second_level(reinterpret_cast<const uint8_t*>(panels.pair(next.first)),
                           std::min(prefetch_plan().far_bytes, bytes));
}

}  // namespace

int64_t multiply_scratch_bytes() {
  return kSumsBytes + kKernelScratchBytes;
}

void multiply_group(const GroupMultiply& args, const GroupPairs& pairs, const GroupPairs& next,
                    MultiplySpace& space) {
  PairMultiplier multiplier(args, pairs, space);
  const RowGroup& group = *pairs.group;
  const int64_t step = kRowsAtATime / operand_rows(group.form, args.format);
  NextOperand operand(args, pairs, next, (pairs.last - pairs.first) * ((group.rows + step - 1) / step));
  for (int64_t row = 0; row < group.rows; row += step) {
    const RowRange rows{row, std::min(step, group.rows - row)};
    const bool last_rows = row + step >= group.rows;
    for (int64_t pair = pairs.first; pair < pairs.last; ++pair) {
      const bool last_pair = pair + 1 == pairs.last;
      if (last_rows && last_pair) {
        const uint8_t* const next_pair = regular_pair(next, next.first);
        const bool kernel_asks = group.form == OperandForm::kTiles && next_pair != nullptr;
        if (!kernel_asks) ask_for_weights(pairs, next);
        multiplier.run(pair, operand.beside(next_pair), rows);
      } else {
        multiplier.run(pair, operand.beside(regular_pair(pairs, last_pair ? pairs.first : pair + 1)), rows);
      }
    }
  }
}

}  // namespace fourfold::cpu
