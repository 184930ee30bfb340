#include "cpu/staged_rows.h"

#include <algorithm>
#include <cstring>

#include "fourfold/quantize.h"
#include "fourfold/scale_layout.h"

namespace fourfold::cpu {
namespace {

constexpr int64_t kTileValues = kTileRows * kTileDepth;

constexpr int64_t round_to_line(int64_t bytes) {
  return (bytes + 63) / 64 * 64;
}

void copy_scales(const ActivationView& a, const uint8_t* scales, int64_t row, int64_t row_in_group,
                 int64_t padded_first_row, uint8_t* out) {
  const int64_t count = a.cols / kBlockDepth;
  if (a.scale_layout == ScaleLayout::kRowMajor) {
    std::copy_n(scales + row * (a.scale_stride ? a.scale_stride : count), count, out);
    return;
  }
  const uint8_t* const group = scales + padded_first_row * round_up(count, kScaleTileCols);
  for (int64_t i = 0; i < count; ++i) out[i] = group[swizzled_scale_offset(row_in_group, i, count)];
}

}  // namespace

float global_scale_of(const ActivationView& a, int64_t row, int32_t group) {
  if (!a.row_scales.empty()) return a.row_scales[static_cast<size_t>(row)];
  return a.group_scales.empty() ? 1.0f : a.group_scales[static_cast<size_t>(group)];
}

void copy_staged_row(const ActivationView& a, std::span<const int32_t> group_offsets, const RowGroup& group,
                     int64_t row, const StagedActivations& out) {
  if (a.format == ActivationFormat::kBf16) {
    std::copy_n(a.values.row(row), a.cols, out.values.row(row));
    return;
  }
  std::copy_n(a.codes.row(row), a.codes.cols, out.codes.row(row));
  if (a.format == ActivationFormat::kFp8) return;
  int64_t padded_first_row = 0;
  if (a.scale_layout == ScaleLayout::kSwizzled128x4) {
    for (size_t e = 0; e < static_cast<size_t>(group.expert); ++e) {
      padded_first_row += round_up(group_offsets[e + 1] - group_offsets[e], kScaleTileRows);
    }
  }
  const int64_t row_in_group = row - group.first_row;
  copy_scales(a, a.scales, row, row_in_group, padded_first_row, out.scales.row(row));
  if (a.format != ActivationFormat::kNvfp4x2) return;
  std::copy_n(a.residual_codes.row(row), a.residual_codes.cols, out.residual_codes.row(row));
  copy_scales(a, a.residual_scales, row, row_in_group, padded_first_row, out.residual_scales.row(row));
}

void copy_row(const StagedActivations& staged, int64_t from, int64_t to) {
  const auto copy = [&](const auto& rows) {
    if (!rows.empty()) std::copy_n(rows.row(from), rows.cols, rows.row(to));
  };
  copy(staged.values);
  copy(staged.codes);
  copy(staged.scales);
  copy(staged.residual_codes);
  copy(staged.residual_scales);
}

void copy_row_scale(const StagedActivations& staged, int64_t from, int64_t to) {
  const std::span<float> scales = staged.row_scales;
  if (!scales.empty()) scales[static_cast<size_t>(to)] = scales[static_cast<size_t>(from)];
}

StagedRow row_of(const StagedActivations& staged, int64_t row) {
  return {staged.values.empty() ? nullptr : staged.values.row(row),
          staged.codes.empty() ? nullptr : staged.codes.row(row),
          staged.scales.empty() ? nullptr : staged.scales.row(row),
          staged.residual_codes.empty() ? nullptr : staged.residual_codes.row(row),
          staged.residual_scales.empty() ? nullptr : staged.residual_scales.row(row)};
}

OperandForm choose_form(const Kernels& kernels, ActivationFormat format, int64_t rows, bool needs_floats) {
  if (needs_floats) return OperandForm::kFloats;
  const bool has_tiles = kernels.multiply_tiles != nullptr;
  if (is_nvfp4(format)) {
    return has_tiles && rows * terms_of(format) > kMostIntRows ? OperandForm::kTiles : OperandForm::kInts;
  }
  if (has_tiles) return OperandForm::kTiles;
  return kernels.multiply_bf16 != nullptr ? OperandForm::kBf16Rows : OperandForm::kFloats;
}

int64_t operand_bytes(OperandForm form, ActivationFormat format, int64_t rows, int64_t depth) {
  const bool is_tiles = form == OperandForm::kTiles;
  const int64_t padded_rows = is_tiles ? (rows + kTileRows - 1) / kTileRows * kTileRows : rows;
  return round_to_line(padded_rows * terms_of(format) * operand_row_bytes(form, depth));
}

int64_t most_operand_bytes(const Kernels& kernels, ActivationFormat format, int64_t rows, int64_t groups,
                           int64_t depth, bool needs_floats) {
  const OperandForm few = choose_form(kernels, format, 1, needs_floats);
  const OperandForm many = choose_form(kernels, format, kMostIntRows + 1, needs_floats);
  const int64_t row_bytes =
      terms_of(format) * std::max(operand_row_bytes(few, depth), operand_row_bytes(many, depth));
  const int64_t padding = many == OperandForm::kTiles ? kTileRows - 1 : 1;
  return round_to_line((rows + padding * std::min(rows, groups)) * row_bytes);
}

int64_t RowStager::scratch_bytes() const {
  const int64_t row = round_to_line(padded_depth() * 4);
  return 2 * row + round_to_line(quantizer_scratch_bytes(depth_));
}

void RowStager::quantize(int64_t row, const StagedActivations& staged, std::byte* scratch) const {
  const float* const x = values(scratch);
  std::byte* const rest = scratch + round_to_line(padded_depth() * 4);
  switch (format_) {
    case ActivationFormat::kNvfp4:
      if (rule_ != ScaleRule::kAmax) {
        return functions_.quantize_nvfp4_searching(rule_, x, depth_,
                                                   staged.row_scales[static_cast<size_t>(row)],
                                                   staged.codes.row(row), staged.scales.row(row));
      }
      return functions_.quantize_nvfp4(x, depth_, staged.row_scales[static_cast<size_t>(row)],
                                       staged.codes.row(row), staged.scales.row(row), rest);
    case ActivationFormat::kNvfp4x2:
      return functions_.quantize_nvfp4x2(
          x, depth_, staged.row_scales[static_cast<size_t>(row)], staged.codes.row(row),
          staged.scales.row(row), staged.residual_codes.row(row), staged.residual_scales.row(row), rest);
    case ActivationFormat::kFp8: {
      const float scale = dynamic_scale(functions_.largest_magnitude(x, depth_), kE4m3Max);
      staged.row_scales[static_cast<size_t>(row)] = scale;
      return functions_.encode_fp8(x, depth_, 1.0f / scale, staged.codes.row(row));
    }
    case ActivationFormat::kBf16:
      return functions_.narrow(x, depth_, staged.values.row(row));
  }
}

void RowStager::decode_term(const StagedRow& staged, int term, float* out, std::byte* scratch) const {
  switch (format_) {
    case ActivationFormat::kBf16:
      functions_.widen(staged.values, depth_, out);
      break;
    case ActivationFormat::kFp8:
      functions_.decode_fp8(staged.codes, depth_, out);
      break;
    case ActivationFormat::kNvfp4:
    case ActivationFormat::kNvfp4x2: {
      auto* const scales = reinterpret_cast<float*>(scratch);
      const uint8_t* const codes = term == 0 ? staged.scales : staged.residual_scales;
      for (int64_t block = 0; block < depth_ / kBlockDepth; ++block)
        scales[block] = e4m3_values()[codes[block]];
      functions_.decode_nvfp4(term == 0 ? staged.codes : staged.residual_codes, scales, depth_, out);
      break;
    }
  }
  std::fill(out + depth_, out + padded_depth(), 0.0f);
}

void RowStager::expand_ints(const StagedRow& staged, int64_t row, std::byte* operand) const {
  const int64_t blocks = chunks_of(depth_) * kBlocksPerChunk, used = depth_ / kBlockDepth;
  const int terms = terms_of(format_);
  auto* out = reinterpret_cast<IntBlock*>(operand) + row * terms * blocks;
  for (int term = 0; term < terms; ++term, out += blocks) {
    functions_.make_int_blocks(term == 0 ? staged.codes : staged.residual_codes,
                               term == 0 ? staged.scales : staged.residual_scales, depth_, out);
    std::fill(out + used, out + blocks, IntBlock{{}, kIntBias, 0.0f});
  }
}

void RowStager::expand_floats(const StagedRow& staged, int64_t row, std::byte* operand,
                              std::byte* scratch) const {
  const int terms = terms_of(format_);
  auto* out = reinterpret_cast<float*>(operand) + row * terms * padded_depth();
  for (int term = 0; term < terms; ++term, out += padded_depth()) decode_term(staged, term, out, scratch);
}

void RowStager::write_bf16(const StagedRow& staged, int unit_exponent, int64_t stride, Bf16* out,
                           const Bf16* ask_for, float& row_factor, std::byte* scratch) const {
  if (format_ == ActivationFormat::kBf16) {
    row_factor = power_of_two(
        functions_.write_normalised_bf16(staged.values, depth_, unit_exponent, stride, out, ask_for));
    return;
  }
  functions_.decode_fp8(staged.codes, depth_, values(scratch));
  functions_.write_scaled_bf16(values(scratch), depth_, power_of_two(unit_exponent), stride, out, ask_for);
}

void RowStager::expand_bf16_rows(const StagedRow& staged, int64_t row, std::byte* operand, float& row_factor,
                                 std::byte* scratch) const {
  auto* const out = reinterpret_cast<Bf16*>(operand) + row * padded_depth();
  write_bf16(staged, 0, kTileDepth, out, out, row_factor, scratch);
}

Bf16* RowStager::tile_row(std::byte* group_operand, int64_t row) const {
  return reinterpret_cast<Bf16*>(group_operand) +
         row / kTileRows * (padded_depth() / kTileDepth) * terms_of(format_) * kTileValues +
         row % kTileRows * kTileDepth;
}

void RowStager::expand_tiles(const StagedRow& staged, const RowGroup& group, int64_t row, std::byte* operand,
                             const Bf16* next_tile_row, float& row_factor, std::byte* scratch) const {
  const int terms = terms_of(format_);
  Bf16* const tiles = tile_row(operand, row);
  for (int term = 0; term < terms; ++term) {
    Bf16* const out = tiles + term * kTileValues;
    const Bf16* const ask_for = next_tile_row != nullptr ? next_tile_row + term * kTileValues : out;
    if (is_nvfp4(format_)) {
      functions_.write_nvfp4_tiles(term == 0 ? staged.codes : staged.residual_codes,
                                   term == 0 ? staged.scales : staged.residual_scales, depth_,
                                   terms * kTileValues, out, ask_for);
      continue;
    }
    write_bf16(staged, kTileExponent, kTileValues, out, ask_for, row_factor, scratch);
  }
  if (row + 1 < group.rows) return;
  for (int64_t missing = group.rows; missing % kTileRows != 0; ++missing) {
    Bf16* const padding = tiles + (missing - row) * kTileDepth;
    for (int64_t tile = 0; tile < padded_depth() / kTileDepth * terms; ++tile) {
      std::memset(static_cast<void*>(padding + tile * kTileValues), 0, kTileDepth * sizeof(Bf16));
    }
  }
}

void RowStager::expand(const StagedRow& staged, const RowGroup& group, int64_t row, std::byte* operand,
                       const Bf16* next_tile_row, float& row_factor, std::byte* scratch) const {
  row_factor = 1.0f;
  switch (group.form) {
    case OperandForm::kInts:
      return expand_ints(staged, row, operand);
    case OperandForm::kFloats:
      return expand_floats(staged, row, operand, scratch);
    case OperandForm::kBf16Rows:
      return expand_bf16_rows(staged, row, operand, row_factor, scratch);
    case OperandForm::kTiles:
      return expand_tiles(staged, group, row, operand, next_tile_row, row_factor, scratch);
  }
}

}  // namespace fourfold::cpu
