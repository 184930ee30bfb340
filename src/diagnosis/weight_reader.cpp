#include "diagnosis/weight_reader.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "fourfold/number_formats.h"
#include "fourfold/scale_layout.h"

namespace fourfold::diagnosis {
namespace {

float scale_value(ScaleCode code, uint8_t byte) {
  switch (code) {
    case ScaleCode::kRight:
      return decode_e4m3(byte);
    case ScaleCode::kE8m0:
      return decode_e8m0(byte);
    case ScaleCode::kSaturated240:
      return (byte & 0x78) == 0x78 ? (byte & 0x80 ? -240.0f : 240.0f) : decode_e4m3(byte);
    case ScaleCode::kFnuz:
      return decode_e4m3(byte) / 2.0f;
  }
  return 0.0f;
}

float element(const DenseView& vector, int64_t index) {
  float value = 0.0f;
  const int64_t bytes = vector.type == ElementType::kF32 ? 4 : 2;
  decode_row({vector.type, vector.data + index * bytes, 1, 1, bytes, vector.device}, 0, &value);
  return value;
}

const BlockScaledView& blocks_of(const WeightView& weight) {
  return std::get<BlockScaledView>(weight);
}

}  // namespace

WeightReader::WeightReader(const ExpertWeights& weights, const WeightReading& reading)
    : weights_(weights),
      is_down_(true),
      reading_(reading),
      rows_(weights.hidden),
      cols_(weights.intermediate) {
  std::array<float, 16> values{};
  for (uint8_t code = 0; code < 16; ++code) {
    const bool wrong = (code & 7) == reading.wrong_code;
    values[code] = !wrong ? decode_e2m1(code) : code & 8 ? -reading.wrong_value : reading.wrong_value;
  }
  for (size_t pair = 0; pair < 256; ++pair) {
    pair_values_[pair] = {values[pair & 15], values[pair >> 4]};
    if (reading.swapped_nibbles) std::swap(pair_values_[pair][0], pair_values_[pair][1]);
  }
  for (int byte = 0; byte < 256; ++byte) {
    scale_values_[static_cast<size_t>(byte)] = scale_value(reading.scale_code, static_cast<uint8_t>(byte));
  }
}

WeightReader::WeightReader(const ExpertWeights& weights, const FirstDeviation& deviation)
    : WeightReader(weights, deviation.reading) {
  is_down_ = false;
  row_order_ = deviation.rows;
  global_rule_ = deviation.global;
  bias_missing_ = deviation.bias_missing;
  half_ = weights.experts.front().has_gate() ? weights.intermediate : 0;
  rows_ = half_ + weights.intermediate;
  cols_ = weights.hidden;
}

WeightReader::StoredRow WeightReader::stored(int64_t expert, int64_t row) const {
  const Expert& from = weights_.experts[static_cast<size_t>(expert)];
  if (is_down_) return {&from.down, row};
  return row < half_ ? StoredRow{&from.gate, row} : StoredRow{&from.up, row - half_};
}

int64_t WeightReader::moved(int64_t row) const {
  switch (row_order_) {
    case GateUpRows::kRight:
      return row;
    case GateUpRows::kSwapped:
    case GateUpRows::kRowsSwapped:
      return (row + half_) % rows_;
    case GateUpRows::kHalvesAsInterleaved:
      return row < half_ ? 2 * row : 2 * (row - half_) + 1;
    case GateUpRows::kInterleavedAsHalves:
      return row % 2 == 0 ? row / 2 : half_ + row / 2;
  }
  return row;
}

uint8_t WeightReader::stored_scale(int64_t expert, int64_t row, int64_t block) const {
  const StoredRow at = stored(expert, row);
  return blocks_of(*at.matrix).scale_code(at.row, block);
}

uint8_t WeightReader::swizzled_scale(int64_t expert, int64_t offset) const {
  const int64_t blocks = blocks_of(*stored(0, 0).matrix).blocks_per_row();
  const int64_t tiles_across = round_up(blocks, kScaleTileCols) / kScaleTileCols;
  const int64_t tile = offset / (kScaleTileRows * kScaleTileCols), within = offset % 512;
  const int64_t row = tile / tiles_across * kScaleTileRows + within / 16 + within % 16 / 4 * 32;
  const int64_t block = tile % tiles_across * kScaleTileCols + within % 4;
  const bool is_data = expert < weights_.count() && row < rows_ && block < blocks;
  return is_data ? stored_scale(expert, row, block) : uint8_t{0};
}

uint8_t WeightReader::found_scale(int64_t expert, int64_t row, int64_t block) const {
  const int64_t blocks = blocks_of(*stored(expert, row).matrix).blocks_per_row(), bytes = rows_ * blocks;
  switch (reading_.scale_order) {
    case ScaleOrder::kRight:
      break;
    case ScaleOrder::kTransposed: {
      const int64_t at = block * rows_ + row;
      return stored_scale(expert, at / blocks, at % blocks);
    }
    case ScaleOrder::kTransposedHalves: {
      const int64_t first = row < half_ ? 0 : half_, height = is_down_ || half_ == 0 ? rows_ : half_;
      const int64_t at = block * height + row - first;
      return stored_scale(expert, first + at / blocks, at % blocks);
    }
    case ScaleOrder::kLinearAsSwizzled: {
      const int64_t at = expert * bytes + swizzled_scale_offset(row, block, blocks);
      if (at / bytes >= weights_.count()) return 0;
      return stored_scale(at / bytes, at % bytes / blocks, at % blocks);
    }
    case ScaleOrder::kSwizzledAsLinear:
      return swizzled_scale(expert, row * blocks + block);
    case ScaleOrder::kUnpaddedStride: {
      const int64_t padded = swizzled_scale_bytes(rows_, blocks);
      const int64_t at = expert * bytes + swizzled_scale_offset(row, block, blocks);
      return swizzled_scale(at / padded, at % padded);
    }
  }
  return stored_scale(expert, row, block);
}

void WeightReader::read_row(int64_t expert, int64_t row, float* out) const {
  const int64_t source = moved(row);
  const StoredRow at = stored(expert, source);
  if (const auto* matrix = std::get_if<BlockScaledView>(at.matrix)) {
    const int64_t block = traits_of(matrix->format).block_size;
    const bool is_nvfp4 = matrix->format == QuantFormat::kNvfp4;
    const bool in_place = reading_.scale_order == ScaleOrder::kRight;
    const uint8_t* codes = matrix->codes.row(at.row);
    for (int64_t first = 0; first < cols_; first += block) {
      const uint8_t byte =
          in_place ? matrix->scale_code(at.row, first / block) : found_scale(expert, source, first / block);
      const float scale = is_nvfp4 ? scale_values_[byte] : decode_e8m0(byte);
      for (int64_t k = first; k < first + block; k += 2) {
        const auto& [even, odd] = pair_values_[codes[k / 2]];
        out[k] = even * scale;
        out[k + 1] = odd * scale;
      }
    }
  } else {
    decode_row(*at.matrix, at.row, out);
  }
  if (reading_.tail == KTail::kDropped) {
    std::fill(out + cols_ / reading_.tail_tile * reading_.tail_tile, out + cols_, 0.0f);
  }
}

float WeightReader::own_global(int64_t expert, int64_t row) const {
  const float stored_global = global_multiplier(*stored(expert, row).matrix);
  switch (reading_.global) {
    case GlobalUse::kRight:
      return stored_global;
    case GlobalUse::kDropped:
      return 1.0f;
    case GlobalUse::kReciprocal:
      return 1.0f / stored_global;
  }
  return stored_global;
}

float WeightReader::global(int64_t expert, int64_t row) const {
  const bool moves_along = row_order_ == GateUpRows::kSwapped;
  const float own = own_global(expert, moves_along ? moved(row) : row);
  if (is_down_ || half_ == 0 || global_rule_ == GateUpGlobal::kOwn) return own;
  const float gate = own_global(expert, 0), up = own_global(expert, half_);
  if (global_rule_ == GateUpGlobal::kGate) return gate;
  return global_rule_ == GateUpGlobal::kUp ? up : std::max(gate, up);
}

float WeightReader::bias(int64_t expert, int64_t row) const {
  if (bias_missing_) return 0.0f;
  const Expert& from = weights_.experts[static_cast<size_t>(expert)];
  if (is_down_) return from.down_bias ? element(*from.down_bias, row) : 0.0f;
  const int64_t source = moved(row);
  const auto& bias = source < half_ ? from.gate_bias : from.up_bias;
  return bias ? element(*bias, source < half_ ? source : source - half_) : 0.0f;
}

}  // namespace fourfold::diagnosis
