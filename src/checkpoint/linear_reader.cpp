#include "checkpoint/linear_reader.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "base/fail.h"
#include "checkpoint/moe_names.h"

namespace fourfold {
namespace {

/// Side of the square tiles of DeepSeek's FP8 weights.
constexpr int64_t kFp8Tile = 128;

bool is_fp4_pair(DType type) {
  return type == DType::kU8 || type == DType::kI8;
}

float float_at(const Tensor& tensor, int64_t index) {
  float value = 0.0f;
  std::memcpy(&value, tensor.data + index * static_cast<int64_t>(sizeof(value)), sizeof(value));
  return value;
}

float scalar(const Tensor& tensor) {
  if (tensor.dtype != DType::kF32 || tensor.elements() != 1) bad_tensor(tensor, "one F32 number");
  return float_at(tensor, 0);
}

void require_tile_scale(const Tensor& scales, int64_t tile, bool good) {
  if (good) return;
  fail(ErrorCode::kBadFile, "{}: tensor '{}': expected finite scales from 0, found another one at tile {}",
       scales.file, scales.name, tile);
}

}  // namespace

void bad_tensor(const Tensor& tensor, const std::string& expected, const std::string& hint) {
  fail(ErrorCode::kBadFile, "{}: tensor '{}': expected {}, found {}{}", tensor.file, tensor.name, expected,
       tensor.describe(), hint);
}

std::optional<ElementType> dense_type(DType type) {
  if (type == DType::kBf16) return ElementType::kBf16;
  if (type == DType::kF16) return ElementType::kF16;
  if (type == DType::kF32) return ElementType::kF32;
  return std::nullopt;
}

DenseView dense_tensor(const Tensor& tensor, const std::vector<int64_t>& shape) {
  const auto type = dense_type(tensor.dtype);
  if (!type || tensor.shape != shape)
    bad_tensor(tensor, fmt::format("BF16, F16 or F32 [{}]", fmt::join(shape, ", ")));
  const int64_t rows = shape.size() == 2 ? shape[0] : 1;
  return {*type, tensor.data, rows, shape.back(), tensor.bytes / rows, {}};
}

std::byte* RepackedBytes::add(int64_t bytes) {
  return blocks_.emplace_back(std::make_unique<std::byte[]>(static_cast<size_t>(bytes))).get();
}

bool LinearReader::exists() const {
  return !tensors_under(checkpoint_, name_ + ".").empty();
}

WeightView LinearReader::weight(std::set<std::string>& schemes) const {
  const Tensor& weight = required(".weight");
  if (weight.shape.size() != 2 || weight.shape[0] == 0 || weight.shape[1] == 0) {
    bad_tensor(weight, "a matrix [out, in]");
  }
  const auto as = [&](WeightView view) {
    schemes.insert(std::string(format_name(view)));
    return view;
  };
  if (dense_type(weight.dtype)) return as(dense_tensor(weight, weight.shape));
  if (weight.dtype == DType::kF8E4m3) return as(fp8(weight));
  if (!is_fp4_pair(weight.dtype)) {
    bad_tensor(weight, "NVFP4 or MXFP4 codes (U8 or I8), F8_E4M3, or BF16, F16, F32");
  }
  if (find(".weight_scale")) return as(nvfp4(weight));
  if (find(".scale")) return as(mxfp4(weight));
  fail(ErrorCode::kBadFile,
       "{}: tensor '{}': expected '{}.weight_scale' (NVFP4) or '{}.scale' (MXFP4) beside {}, "
       "found neither",
       weight.file, weight.name, name_, name_, weight.describe());
}

std::optional<DenseView> LinearReader::bias(int64_t out) const {
  const Tensor* tensor = find(".bias");
  return tensor ? std::optional(dense_tensor(*tensor, {out})) : std::nullopt;
}

void LinearReader::require_all_known() const {
  constexpr std::array<std::string_view, 7> kKnown = {
      ".weight", ".weight_scale", ".weight_scale_2", ".input_scale", ".scale", ".bias", ".weight_scale_inv"};
  for (const Tensor* tensor : tensors_under(checkpoint_, name_ + ".")) {
    const std::string_view suffix = std::string_view(tensor->name).substr(name_.size());
    if (std::find(kKnown.begin(), kKnown.end(), suffix) == kKnown.end()) {
      fail(ErrorCode::kUnsupported,
           "{}: tensor '{}': expected none but {}, found {}, which this version does not read", tensor->file,
           tensor->name, fmt::join(kKnown, ", "), tensor->describe());
    }
  }
}

std::optional<float> LinearReader::input_scale() const {
  const Tensor* tensor = find(".input_scale");
  return tensor ? std::optional(scalar(*tensor)) : std::nullopt;
}

const Tensor& LinearReader::required(const char* suffix) const {
  if (const Tensor* tensor = find(suffix)) return *tensor;
  const bool packed = find(".weight_packed") != nullptr;
  fail(packed ? ErrorCode::kUnsupported : ErrorCode::kBadFile, "{}: expected a tensor '{}{}', found none{}",
       checkpoint_.path().string(), name_, suffix,
       packed ? "; 'weight_packed' beside it is compressed-tensors, which this version does not read" : "");
}

/// The scale tensor `suffix`, checked against [rows, cols] and `type`.
const Tensor& LinearReader::scales(const char* suffix, DType type, int64_t rows, int64_t cols) const {
  const Tensor& scales = required(suffix);
  if (scales.dtype == type && scales.shape == std::vector{rows, cols}) return scales;
  const std::string expected = fmt::format("{} {}", to_string(type), shape_text(rows, cols));
  const bool is_matrix = scales.shape.size() == 2;
  std::string hint;
  if (is_matrix && scales.shape[0] == cols && scales.shape[1] == rows) hint = "; is it transposed?";
  if (is_matrix && scales.shape[1] * 2 == cols) hint = "; is this MXFP4 (blocks of 32)?";
  if (is_matrix && scales.shape[1] == cols * 2) hint = "; is this NVFP4 (blocks of 16)?";
  bad_tensor(scales, expected, hint);
}

BlockScaledView LinearReader::block_scaled(const Tensor& weight, QuantFormat format, const char* suffix,
                                           DType type) const {
  const int64_t rows = weight.shape[0], cols = weight.shape[1] * 2;
  const int block = traits_of(format).block_size;
  if (cols % block != 0)
    bad_tensor(weight, fmt::format("rows of whole blocks of {} (two codes a byte)", block));
  const int64_t blocks = cols / block;
  const Tensor& scale = scales(suffix, type, rows, blocks);
  return {format,
          rows,
          cols,
          {reinterpret_cast<const uint8_t*>(weight.data), rows, cols / 2},
          reinterpret_cast<const uint8_t*>(scale.data),
          blocks,
          ScaleLayout::kRowMajor,
          {}};
}

WeightView LinearReader::nvfp4(const Tensor& weight) const {
  BlockScaledView view = block_scaled(weight, QuantFormat::kNvfp4, ".weight_scale", DType::kF8E4m3);
  const Tensor& global = required(".weight_scale_2");
  view.global.value = scalar(global);
  if (!std::isfinite(view.global.value) || view.global.value < 0.0f) {
    fail(ErrorCode::kBadFile, "{}: tensor '{}': expected a finite global scale from 0, found {}", global.file,
         global.name, view.global.value);
  }
  return view;
}

WeightView LinearReader::mxfp4(const Tensor& weight) const {
  const BlockScaledView view = block_scaled(weight, QuantFormat::kMxfp4, ".scale", DType::kF8E8m0);
  const int64_t count = view.rows * view.blocks_per_row();
  if (const void* nan = std::memchr(view.scales, kE8m0NanCode, static_cast<size_t>(count))) {
    const int64_t at = static_cast<const uint8_t*>(nan) - view.scales;
    const Tensor& scale = required(".scale");
    fail(ErrorCode::kBadFile, "{}: tensor '{}': expected powers of two, found 0xFF (NaN) at row {}, block {}",
         scale.file, scale.name, at / view.blocks_per_row(), at % view.blocks_per_row());
  }
  return view;
}

/// DeepSeek-V4 has `scale` (e8m0), DeepSeek-V3 `weight_scale_inv` (float32; it multiplies, whatever its name
/// says), both for tiles of 128 x 128; ModelOpt's `weight_scale` is one number for the whole matrix.
WeightView LinearReader::fp8(const Tensor& weight) const {
  Fp8View view;
  view.rows = weight.shape[0];
  view.cols = weight.shape[1];
  view.codes = {reinterpret_cast<const uint8_t*>(weight.data), view.rows, view.cols};
  const auto tiles = [](int64_t extent) { return (extent + kFp8Tile - 1) / kFp8Tile; };
  const Tensor* found = nullptr;
  if (find(".scale")) {
    found = &scales(".scale", DType::kF8E8m0, tiles(view.rows), tiles(view.cols));
    view.scale_type = TileScaleType::kE8m0;
  } else if (find(".weight_scale_inv")) {
    found = &scales(".weight_scale_inv", DType::kF32, tiles(view.rows), tiles(view.cols));
  } else if (find(".weight_scale")) {
    found = find(".weight_scale");
    scalar(*found);
    view.tile_rows = view.rows;
    view.tile_cols = view.cols;
  } else {
    fail(ErrorCode::kBadFile,
         "{}: tensor '{}': expected '{}.scale' (e8m0), '{}.weight_scale_inv' or '{}.weight_scale' (F32) "
         "beside {}, found none of them",
         weight.file, weight.name, name_, name_, name_, weight.describe());
  }
  view.scales = found->data;
  for (int64_t tile = 0; tile < found->elements(); ++tile) {
    const bool is_e8m0 = view.scale_type == TileScaleType::kE8m0;
    const float scale = is_e8m0 ? 0.0f : float_at(*found, tile);
    require_tile_scale(*found, tile,
                       is_e8m0 ? static_cast<uint8_t>(found->data[tile]) != kE8m0NanCode
                               : std::isfinite(scale) && scale >= 0.0f);
  }
  return view;
}

}  // namespace fourfold
