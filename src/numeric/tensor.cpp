// Owned bytes and the decoding of rows.
#include "fourfold/tensor.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "base/avx2.h"
#include "fourfold/block_scaled.h"
#include "fourfold/scale_layout.h"
#if FOURFOLD_HAS_AVX2_LOOPS
#include <immintrin.h>
#endif

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

template <float (*kDecode)(uint8_t)>
constexpr std::array<float, 256> kScales = [] {
  std::array<float, 256> scales{};
  for (size_t code = 0; code < scales.size(); ++code) scales[code] = kDecode(static_cast<uint8_t>(code));
  return scales;
}();

/// The codes of one row, and where its scales come from.
struct RowOfBlocks {
  RowOfBlocks(const BlockScaledView& of, int64_t index)
      : matrix(of),
        row(index),
        codes(of.codes.row(index)),
        block_size(traits_of(of.format).block_size),
        scales(traits_of(of.format).scale_type == ScaleType::kE4m3 ? kScales<decode_e4m3>
                                                                   : kScales<decode_e8m0>),
        row_major(of.scale_layout == ScaleLayout::kRowMajor ? of.scales + index * of.scale_stride : nullptr) {
  }

  float scale(int64_t block) const {
    return scales[row_major != nullptr ? row_major[block] : matrix.scale_code(row, block)];
  }

  const BlockScaledView& matrix;
  int64_t row;
  const uint8_t* codes;
  int block_size;
  const std::array<float, 256>& scales;  // by their code
  const uint8_t* row_major;              // scale codes; null: swizzled
};

void decode_blocks(const RowOfBlocks& row, float* out) {
  const uint8_t* codes = row.codes;
  const int64_t blocks = row.matrix.blocks_per_row();
  for (int64_t block = 0; block < blocks; ++block) {
    const float scale = row.scale(block);
    for (int pair = 0; pair < row.block_size / 2; ++pair, ++codes, out += 2) {
      out[0] = kE2m1Pairs[*codes][0] * scale;
      out[1] = kE2m1Pairs[*codes][1] * scale;
    }
  }
}

#if FOURFOLD_HAS_AVX2_LOOPS
constexpr int kCodesAtOnce = 16;  // every block has a multiple of these

/// kCodesAtOnce codes x scale: the upper two bytes of a value's float32 are looked up, the others are zero.
FOURFOLD_AVX2_LOOP FOURFOLD_INLINE void decode_codes_avx2(const uint8_t* codes, float scale, float* out) {
  const __m128i first_bytes =  // of 0, 0.5, 1, 1.5, 2, 3, 4, 6, and with their signs
      _mm_setr_epi8(0x00, 0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40,  //
                    -0x80, -0x41, -0x41, -0x41, -0x40, -0x40, -0x40, -0x40);
  const __m128i second_bytes = _mm_setr_epi8(0x00, 0x00, -0x80, -0x40, 0x00, 0x40, -0x80, -0x40,  //
                                             0x00, 0x00, -0x80, -0x40, 0x00, 0x40, -0x80, -0x40);
  const __m128i low_nibbles = _mm_set1_epi8(0x0F);
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  const __m128i in_order = _mm_unpacklo_epi8(_mm_and_si128(bytes, low_nibbles),
                                             _mm_and_si128(_mm_srli_epi16(bytes, 4), low_nibbles));
  const __m128i firsts = _mm_shuffle_epi8(first_bytes, in_order);
  const __m128i seconds = _mm_shuffle_epi8(second_bytes, in_order);
  const __m128i halves[] = {_mm_unpacklo_epi8(seconds, firsts), _mm_unpackhi_epi8(seconds, firsts)};
  for (int half = 0; half < 2; ++half) {
    const __m256 values = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves[half]), 16));
    _mm256_storeu_ps(out + 8 * half, _mm256_mul_ps(values, _mm256_set1_ps(scale)));
  }
}

FOURFOLD_AVX2_LOOP void decode_blocks_avx2(const RowOfBlocks& row, float* out) {
  const uint8_t* codes = row.codes;
  const int64_t blocks = row.matrix.blocks_per_row();
  const int parts = row.block_size / kCodesAtOnce;
  for (int64_t block = 0; block < blocks; ++block) {
    const float scale = row.scale(block);
    for (int part = 0; part < parts; ++part) {
      decode_codes_avx2(codes, scale, out);
      codes += kCodesAtOnce / 2;
      out += kCodesAtOnce;
    }
  }
}
#endif

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
  const RowOfBlocks blocks(matrix, row);
#if FOURFOLD_HAS_AVX2_LOOPS
  if (has_avx2()) return decode_blocks_avx2(blocks, out);
#endif
  decode_blocks(blocks, out);
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
