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

/// Types of a byte that holds two codes of four bits.
bool is_code_pair(DType type) {
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

std::optional<std::string> why_bad_global(GlobalScale global) {
  const bool divides = global.kind == GlobalScaleKind::kDivisor;
  if (std::isfinite(global.value) && (divides ? global.value > 0.0f : global.value >= 0.0f))
    return std::nullopt;
  return divides ? "a finite divisor above 0" : "a finite global scale from 0";
}

bool is_scale_type(DType type, ScaleType wanted, bool forced) {
  if (type == (wanted == ScaleType::kE4m3 ? DType::kF8E4m3 : DType::kF8E8m0)) return true;
  if (wanted == ScaleType::kE8m0 && type == DType::kU8) return true;
  return forced && bits_of(type) == 8;
}

bool LinearReader::exists() const {
  return !tensors_under(checkpoint_, name_ + ".").empty();
}

/// ".weight", or compressed-tensors' ".weight_packed".
const Tensor& LinearReader::codes() const {
  const Tensor *packed = find(".weight_packed"), *weight = find(".weight");
  if (packed == nullptr) return required(".weight");
  if (weight != nullptr) {
    fail(ErrorCode::kBadFile, "{}: tensor '{}': expected it or '{}.weight_packed', found both", weight->file,
         weight->name, name_);
  }
  if (!is_code_pair(packed->dtype)) bad_tensor(*packed, "codes of four bits, two a byte (U8)");
  return *packed;
}

WeightView LinearReader::weight(std::set<std::string>& schemes) const {
  const Tensor& weight = codes();
  if (weight.shape.size() != 2 || weight.shape[0] == 0 || weight.shape[1] == 0) {
    bad_tensor(weight, "a matrix [out, in]");
  }
  const auto as = [&](WeightView view) {
    schemes.insert(std::string(format_name(view)));
    return view;
  };
  if (dense_type(weight.dtype)) return as(dense_tensor(weight, weight.shape));
  if (weight.dtype == DType::kF8E4m3) return as(fp8(weight));
  if (!is_code_pair(weight.dtype)) {
    bad_tensor(weight, "NVFP4 or MXFP4 codes (U8 or I8), F8_E4M3, or BF16, F16, F32");
  }
  const FourBit layout = four_bit(weight);
  schemes.emplace(layout.name);
  return block_scaled(weight, layout);
}

std::optional<DenseView> LinearReader::bias(int64_t out) const {
  const Tensor* tensor = find(".bias");
  return tensor ? std::optional(dense_tensor(*tensor, {out})) : std::nullopt;
}

/// What stands beside each kind of weight. Another kind's scales are as unknown as anything else: a
/// `weight_scale_2` beside bf16 would be left out.
void LinearReader::require_all_known() const {
  const Tensor& weight = codes();
  std::set<std::string_view> known = {".input_scale", ".bias"};
  known.insert(std::string_view(weight.name).substr(name_.size()));
  if (weight.dtype == DType::kF8E4m3) {
    known.insert(fp8_scales());
  } else if (!dense_type(weight.dtype)) {
    const FourBit layout = four_bit(weight);
    known.insert({layout.scales, layout.global, ".input_global_scale"});
    known.erase("");
  }
  for (const Tensor* tensor : tensors_under(checkpoint_, name_ + ".")) {
    const std::string_view suffix = std::string_view(tensor->name).substr(name_.size());
    if (known.contains(suffix)) continue;
    fail(ErrorCode::kUnsupported,
         "{}: tensor '{}': expected none but {} beside {}, found {}, which this version does not read there",
         tensor->file, tensor->name, fmt::join(known, ", "), weight.describe(), tensor->describe());
  }
}

std::optional<float> LinearReader::input_scale() const {
  const Tensor *multiplier = find(".input_scale"), *divisor = find(".input_global_scale");
  if (multiplier != nullptr && divisor != nullptr) {
    fail(ErrorCode::kBadFile, "{}: tensor '{}': expected it or '{}', found both", divisor->file,
         divisor->name, multiplier->name);
  }
  const Tensor* found = multiplier ? multiplier : divisor;
  if (found == nullptr) return std::nullopt;
  const bool named = scheme_ == WeightScheme::kModelOpt || scheme_ == WeightScheme::kCompressedTensors;
  const bool divides = named ? scheme_ == WeightScheme::kCompressedTensors : found == divisor;
  return divides ? 1.0f / scalar(*found) : scalar(*found);
}

const Tensor& LinearReader::required(const char* suffix) const {
  if (const Tensor* tensor = find(suffix)) return *tensor;
  fail(ErrorCode::kBadFile, "{}: expected a tensor '{}{}', found none", checkpoint_.path().string(), name_,
       suffix);
}

/// By the names beside the codes and the type of the block scales: e4m3 makes it NVFP4, e8m0 MXFP4. A global
/// scale belongs to NVFP4, so that bytes of no told type beside one are not taken for e8m0.
LinearReader::FourBit LinearReader::four_bit(const Tensor& codes) const {
  const bool packed = codes.name.ends_with("_packed");
  FourBit layout;
  layout.scales = packed || find(".weight_scale") || !find(".scale") ? ".weight_scale" : ".scale";
  const Tensor* scales = find(layout.scales);
  if (scales == nullptr) {
    fail(ErrorCode::kBadFile, "{}: tensor '{}': expected '{}.weight_scale'{} beside {}, found {}", codes.file,
         codes.name, name_, packed ? "" : fmt::format(" (NVFP4) or '{}.scale' (MXFP4)", name_),
         codes.describe(), packed ? "none" : "neither");
  }
  layout.global = find(".weight_global_scale") || packed ? ".weight_global_scale" : ".weight_scale_2";
  const bool has_global = find(".weight_global_scale") || find(".weight_scale_2");
  bool is_mxfp4 = layout.scales == std::string_view(".scale") ||
                  (!has_global && is_scale_type(scales->dtype, ScaleType::kE8m0, false));
  bool divides = layout.global == std::string_view(".weight_global_scale");
  if (scheme_) {
    is_mxfp4 = scheme_ == WeightScheme::kMxfp4;
    divides = scheme_ == WeightScheme::kCompressedTensors;
    if (find(".weight_scale_2")) layout.global = ".weight_scale_2";
  }
  if (is_mxfp4) {
    layout.format = QuantFormat::kMxfp4;
    layout.global = "";
    layout.name = packed ? "mxfp4 (compressed-tensors)" : "mxfp4";
    return layout;
  }
  layout.global_kind = divides ? GlobalScaleKind::kDivisor : GlobalScaleKind::kMultiplier;
  layout.name = divides ? "nvfp4 (compressed-tensors)" : "nvfp4";
  return layout;
}

/// The scale tensor `suffix`, checked against [rows, cols] and `type`.
const Tensor& LinearReader::scales(const char* suffix, DType type, int64_t rows, int64_t cols) const {
  const Tensor& scales = required(suffix);
  const ScaleType wanted = type == DType::kF8E8m0 ? ScaleType::kE8m0 : ScaleType::kE4m3;
  // DeepSeek's `.scale` has its type by name: U8 there is something else.
  const bool is_right_type =
      scales.dtype == type || (type != DType::kF32 && suffix != std::string_view(".scale") &&
                               is_scale_type(scales.dtype, wanted, scheme_.has_value()));
  if (is_right_type && scales.shape == std::vector{rows, cols}) return scales;
  const std::string expected = fmt::format("{} {}", to_string(type), shape_text(rows, cols));
  const bool is_matrix = scales.shape.size() == 2 && scales.shape[0] == rows;
  std::string hint;
  if (scales.shape == std::vector{cols, rows}) hint = "; is it transposed?";
  if (is_matrix && cols % 2 == 0 && scales.shape[1] == cols / 2)
    hint = "; is this MXFP4 (blocks of 32)? try --scheme mxfp4";
  if (is_matrix && cols <= INT64_MAX / 2 && scales.shape[1] == cols * 2)
    hint = "; is this NVFP4 (blocks of 16)? try --scheme modelopt or compressed-tensors";
  bad_tensor(scales, expected, hint);
}

WeightView LinearReader::block_scaled(const Tensor& codes, const FourBit& layout) const {
  const QuantFormatTraits traits = traits_of(layout.format);
  const int64_t rows = codes.shape[0], cols = codes.shape[1] * 2;
  if (cols % traits.block_size != 0)
    bad_tensor(codes, fmt::format("rows of whole blocks of {} (two codes a byte)", traits.block_size));
  const int64_t blocks = cols / traits.block_size;
  const DType type = traits.scale_type == ScaleType::kE4m3 ? DType::kF8E4m3 : DType::kF8E8m0;
  const Tensor& scale = scales(layout.scales, type, rows, blocks);
  BlockScaledView view{layout.format,
                       rows,
                       cols,
                       {reinterpret_cast<const uint8_t*>(codes.data), rows, cols / 2},
                       reinterpret_cast<const uint8_t*>(scale.data),
                       blocks,
                       ScaleLayout::kRowMajor,
                       {}};
  if (traits.has_global_scale) {
    view.global = global_scale(layout);
  } else {
    require_e8m0(view, scale);
  }
  return view;
}

GlobalScale LinearReader::global_scale(const FourBit& layout) const {
  const Tensor& tensor = required(layout.global);
  const GlobalScale global{scalar(tensor), layout.global_kind};
  if (const auto expected = why_bad_global(global)) {
    fail(ErrorCode::kBadFile, "{}: tensor '{}': expected {}, found {}", tensor.file, tensor.name, *expected,
         global.value);
  }
  return global;
}

void LinearReader::require_e8m0(const BlockScaledView& view, const Tensor& scales) const {
  const int64_t count = view.rows * view.blocks_per_row();
  const void* nan = std::memchr(view.scales, kE8m0NanCode, static_cast<size_t>(count));
  if (nan == nullptr) return;
  const int64_t at = static_cast<const uint8_t*>(nan) - view.scales;
  fail(ErrorCode::kBadFile, "{}: tensor '{}': expected powers of two, found 0xFF (NaN) at row {}, block {}",
       scales.file, scales.name, at / view.blocks_per_row(), at % view.blocks_per_row());
}

const char* LinearReader::fp8_scales() const {
  if (find(".scale")) return ".scale";
  return find(".weight_scale_inv") ? ".weight_scale_inv" : ".weight_scale";
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
