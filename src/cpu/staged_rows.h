// Rows of activations on their way into the kernels: staged by the specification, then brought into the form
// that a kernel reads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "cpu/kernels.h"
#include "cpu/row_functions.h"
#include "fourfold/activations.h"
#include "fourfold/quantize.h"

namespace fourfold::cpu {

/// One staged row; which members are set follows from the format. Scales are row-major.
struct StagedRow {
  const Bf16* values = nullptr;
  const uint8_t* codes = nullptr;
  const uint8_t* scales = nullptr;
  const uint8_t* residual_codes = nullptr;
  const uint8_t* residual_scales = nullptr;
};

StagedRow row_of(const StagedActivations& staged, int64_t row);

/// Rows of one expert and where their operand lies.
struct RowGroup {
  int32_t expert = 0;
  int64_t first_row = 0;
  int64_t rows = 0;
  OperandForm form = OperandForm::kInts;
  /// Bytes from the operands' start, multiples of 64.
  int64_t x_offset = 0, intermediate_offset = 0;
};

/// Rows of the operand a staged row becomes: nvfp4x2 has two but for tiles, which add both terms themselves.
constexpr int operand_rows(OperandForm form, ActivationFormat format) {
  return format == ActivationFormat::kNvfp4x2 && form != OperandForm::kTiles ? 2 : 1;
}
constexpr int terms_of(ActivationFormat format) {
  return format == ActivationFormat::kNvfp4x2 ? 2 : 1;
}

/// Rows of NVFP4 operands (operand_rows) of an expert up to which byte products beat tiles: measured on a
/// machine with AMX, docs/cpu-tried.md. Floats never do: one row of them takes longer than a row tile.
inline constexpr int64_t kMostIntRows = 6;

/// The form for a group of `rows` rows. `needs_floats`: the weights are not NVFP4.
OperandForm choose_form(const Kernels& kernels, ActivationFormat format, int64_t rows, bool needs_floats);

/// Bytes of a group's operand, a multiple of 64.
int64_t operand_bytes(OperandForm form, ActivationFormat format, int64_t rows, int64_t depth);
/// The most that groups of `rows` rows in all, at most `groups` of them, can need.
int64_t most_operand_bytes(const Kernels& kernels, ActivationFormat format, int64_t rows, int64_t groups,
                           int64_t depth, bool needs_floats);

/// The global scale of a row of staged activations; 1 where they have none.
float global_scale_of(const ActivationView& a, int64_t row, int32_t group);

/// Brings row `row` of `a`, which lies in `group`, to the same row of `out`; scales become row-major.
void copy_staged_row(const ActivationView& a, std::span<const int32_t> group_offsets, const RowGroup& group,
                     int64_t row, const StagedActivations& out);

/// Row `from` of `staged` becomes row `to`, too.
void copy_row(const StagedActivations& staged, int64_t from, int64_t to);
/// Its scale, where rows have one.
void copy_row_scale(const StagedActivations& staged, int64_t from, int64_t to);

/// Quantizes and expands rows of one width.
class RowStager {
 public:
  /// `rule`: nvfp4's.
  RowStager(const RowFunctions& functions, ActivationFormat format, int64_t depth,
            ScaleRule rule = ScaleRule::kAmax)
      : functions_(functions), format_(format), depth_(depth), rule_(rule) {}

  int64_t depth() const { return depth_; }
  /// Bytes of scratch for one thread.
  int64_t scratch_bytes() const;

  /// Where row `x` [depth] is prepared, in a thread's scratch.
  float* values(std::byte* scratch) const { return reinterpret_cast<float*>(scratch); }

  /// values(scratch) -> row `row` of `staged`. nvfp4 and nvfp4x2 read staged.row_scales, fp8 writes it.
  void quantize(int64_t row, const StagedActivations& staged, std::byte* scratch) const;

  /// Row `row` of its group's operand. `row_factor` is the power of two that the sums are to be multiplied
  /// by. `next_tile_row`: where tile_row() says that the row after this goes, whose lines are asked for
  /// meanwhile; null: that is not known.
  void expand(const StagedRow& staged, const RowGroup& group, int64_t row, std::byte* group_operand,
              const Bf16* next_tile_row, float& row_factor, std::byte* scratch) const;
  /// Where row `row` begins in an operand of tiles; its other parts are tiles further on.
  Bf16* tile_row(std::byte* group_operand, int64_t row) const;

 private:
  void expand_ints(const StagedRow& staged, int64_t row, std::byte* operand) const;
  void expand_floats(const StagedRow& staged, int64_t row, std::byte* operand, std::byte* scratch) const;
  void expand_bf16_rows(const StagedRow& staged, int64_t row, std::byte* operand, float& row_factor,
                        std::byte* scratch) const;
  void expand_tiles(const StagedRow& staged, const RowGroup& group, int64_t row, std::byte* operand,
                    const Bf16* next_tile_row, float& row_factor, std::byte* scratch) const;
  /// A row of bf16 or fp8 x 2^unit_exponent, 32 values at a time, as RowFunctions::write_scaled_bf16 says.
  /// Rows of bf16 are divided by the power of two of their largest value, which `row_factor` then is: they
  /// lie below 2 in magnitude, or kTileScale would take them beyond float32. Values of fp8 are never far
  /// from 1.
  void write_bf16(const StagedRow& staged, int unit_exponent, int64_t stride, Bf16* out, const Bf16* ask_for,
                  float& row_factor, std::byte* scratch) const;
  void decode_term(const StagedRow& staged, int term, float* out, std::byte* scratch) const;

  int64_t padded_depth() const { return chunks_of(depth_) * kChunkDepth; }

  const RowFunctions& functions_;
  ActivationFormat format_;
  int64_t depth_;
  ScaleRule rule_;
};

}  // namespace fourfold::cpu
