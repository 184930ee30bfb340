// Owned bytes and the decoding of rows.
#include "fourfold/tensor.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "fourfold/block_scaled.h"
#include "fourfold/scale_layout.h"

namespace fourfold {
namespace {

/// Both values of every byte of e2m1 codes.
constexpr std::array<std::array<float, 2>, 256> kE2m1Pairs = [] {
  std::array<std::array<float, 2>, 256> pairs{};
  for (size_t byte = 0; byte < pairs.size(); ++byte) {
    pairs[byte] = {decode_e2m1(static_cast<uint8_t>(byte & 15)),
                   decode_e2m1(static_cast<uint8_t>(byte >> 4))};
  }
  return pairs;
}();

constexpr std::align_val_t kBufferAlignment{64};

template <class Bits, class Decode>
void decode_elements(const std::byte* source, int64_t count, float* out, Decode decode) {
  for (int64_t i = 0; i < count; ++i) {
    Bits bits;  // checkpoints promise no alignment
    std::memcpy(&bits, source + i * static_cast<int64_t>(sizeof(Bits)), sizeof(Bits));
    out[i] = decode(bits);
  }
}

}  // namespace

Buffer::Buffer(size_t bytes)
    : data_(static_cast<std::byte*>(::operator new(bytes, kBufferAlignment)),
            [](void* data) { ::operator delete(data, kBufferAlignment); }),
      bytes_(bytes) {}

void decode_row(const DenseView& matrix, int64_t row, float* out) {
  const std::byte* source = matrix.data + row * matrix.row_stride_bytes;
  switch (matrix.type) {
    case ElementType::kBf16:
      return decode_elements<uint16_t>(source, matrix.cols, out,
                                       [](uint16_t bits) { return static_cast<float>(Bf16{bits}); });
    case ElementType::kF16:
      return decode_elements<uint16_t>(source, matrix.cols, out, decode_f16);
    case ElementType::kF32:
      return decode_elements<uint32_t>(source, matrix.cols, out, float_from_bits);
  }
}

uint8_t BlockScaledView::scale_code(int64_t row, int64_t block) const {
  return scale_layout == ScaleLayout::kRowMajor ? scales[row * scale_stride + block]
                                                : scales[swizzled_scale_offset(row, block, blocks_per_row())];
}

float Fp8View::scale(int64_t row, int64_t col) const {
  const int64_t tile = row / tile_rows * tiles_per_row() + col / tile_cols;
  if (scale_type == TileScaleType::kE8m0) return decode_e8m0(static_cast<uint8_t>(scales[tile]));
  float value;  // at any address
  std::memcpy(&value, scales + tile * static_cast<int64_t>(sizeof(value)), sizeof(value));
  return value;
}

int64_t rows_of(const WeightView& weight) {
  return std::visit([](const auto& view) { return view.rows; }, weight);
}

int64_t cols_of(const WeightView& weight) {
  return std::visit([](const auto& view) { return view.cols; }, weight);
}

Device device_of(const WeightView& weight) {
  if (const auto* blocks = std::get_if<BlockScaledView>(&weight)) return blocks->codes.device;
  if (const auto* fp8 = std::get_if<Fp8View>(&weight)) return fp8->codes.device;
  return std::get<DenseView>(weight).device;
}

std::string_view format_name(const WeightView& weight) {
  if (const auto* blocks = std::get_if<BlockScaledView>(&weight)) return traits_of(blocks->format).name;
  if (std::holds_alternative<Fp8View>(weight)) return "fp8";
  switch (std::get<DenseView>(weight).type) {
    case ElementType::kBf16:
      return "bf16";
    case ElementType::kF16:
      return "f16";
    case ElementType::kF32:
      return "f32";
  }
  return "?";
}

bool is_stored_as(const WeightView& weight, QuantFormat format) {
  const auto* blocks = std::get_if<BlockScaledView>(&weight);
  return blocks != nullptr && blocks->format == format;
}

void decode_row(const BlockScaledView& matrix, int64_t row, float* out) {
  const QuantFormatTraits traits = traits_of(matrix.format);
  const uint8_t* codes = matrix.codes.row(row);
  for (int64_t block = 0; block < matrix.blocks_per_row(); ++block) {
    const uint8_t code = matrix.scale_code(row, block);
    const float scale = traits.scale_type == ScaleType::kE4m3 ? decode_e4m3(code) : decode_e8m0(code);
    for (int pair = 0; pair < traits.block_size / 2; ++pair, ++codes, out += 2) {
      out[0] = kE2m1Pairs[*codes][0] * scale;
      out[1] = kE2m1Pairs[*codes][1] * scale;
    }
  }
}

void decode_row(const Fp8View& matrix, int64_t row, float* out) {
  const uint8_t* codes = matrix.codes.row(row);
  for (int64_t begin = 0; begin < matrix.cols; begin += matrix.tile_cols) {
    const float scale = matrix.scale(row, begin);
    const int64_t end = std::min(begin + matrix.tile_cols, matrix.cols);
    for (int64_t col = begin; col < end; ++col) out[col] = decode_e4m3(codes[col]) * scale;
  }
}

void decode_row(const WeightView& weight, int64_t row, float* out) {
  std::visit([&](const auto& view) { decode_row(view, row, out); }, weight);
}

float global_multiplier(const WeightView& weight) {
  const auto* blocks = std::get_if<BlockScaledView>(&weight);
  return blocks ? blocks->global.multiplier() : 1.0f;
}

void dequantize_row(const WeightView& weight, int64_t row, float* out) {
  decode_row(weight, row, out);
  if (const auto* blocks = std::get_if<BlockScaledView>(&weight)) {
    for (int64_t i = 0; i < blocks->cols; ++i) out[i] = blocks->global.apply(out[i]);
  }
}

}  // namespace fourfold
