// Tensors that hold a matrix of all experts of a layer. docs/formats.md, sections 3d and 3e.
#include <algorithm>
#include <cstring>

#include "base/fail.h"
#include "checkpoint/linear_reader.h"

namespace fourfold {
namespace {

/// Of a layer; the largest models have a few hundred. Bounds what a shape can make us allocate.
constexpr int64_t kMaxExperts = 65536;

/// Values of a block of gpt-oss's MXFP4, and the bytes that hold them.
constexpr int64_t kMxfp4Block = 32, kMxfp4BlockBytes = 16;

}  // namespace

void transpose(const std::byte* source, int64_t rows, int64_t cols, int64_t size, std::byte* out) {
  constexpr int64_t kTile = 64;
#pragma omp parallel for schedule(static)
  for (int64_t col_tile = 0; col_tile < cols; col_tile += kTile) {
    for (int64_t row_tile = 0; row_tile < rows; row_tile += kTile) {
      for (int64_t col = col_tile; col < std::min(col_tile + kTile, cols); ++col) {
        for (int64_t row = row_tile; row < std::min(row_tile + kTile, rows); ++row) {
          std::memcpy(out + (col * rows + row) * size, source + (row * cols + col) * size,
                      static_cast<size_t>(size));
        }
      }
    }
  }
}

FusedReader::FusedReader(const Checkpoint& checkpoint, std::string name, std::optional<WeightScheme> scheme)
    : checkpoint_(checkpoint), name_(std::move(name)), scheme_(scheme) {
  weight_ = checkpoint_.find(name_ + "_blocks");
  if (weight_ != nullptr) {
    find_blocks();
  } else {
    find_matrix();
  }
  if (experts() > kMaxExperts) bad_tensor(*weight_, fmt::format("at most {} experts", kMaxExperts));
}

void FusedReader::find_blocks() {
  kind_ = Kind::kMxfp4Blocks;
  format_ = QuantFormat::kMxfp4;
  const std::vector<int64_t>& shape = weight_->shape;
  if (weight_->dtype != DType::kU8 || shape.size() != 4 || shape[3] != kMxfp4BlockBytes ||
      weight_->elements() == 0) {
    bad_tensor(*weight_, fmt::format("U8 (experts, out, in / {}, {})", kMxfp4Block, kMxfp4BlockBytes));
  }
  if (scheme_ && scheme_ != WeightScheme::kMxfp4) {
    bad_tensor(*weight_, "codes with e4m3 scales (--scheme)", ", gpt-oss's MXFP4 blocks");
  }
  scales_ = &required("_scales");
  const std::vector<int64_t> expected(shape.begin(), shape.begin() + 3);
  if ((scales_->dtype != DType::kU8 && scales_->dtype != DType::kF8E8m0) || scales_->shape != expected) {
    bad_tensor(*scales_, fmt::format("U8 [{}]", fmt::join(expected, ", ")));
  }
}

void FusedReader::find_matrix() {
  weight_ = &required("");
  if (weight_->shape.size() != 3 || weight_->elements() == 0 ||
      (!dense_type(weight_->dtype) && weight_->dtype != DType::kU8)) {
    bad_tensor(*weight_, "BF16, F16, F32 or NVFP4 codes (U8) (experts, out, in)");
  }
  if (weight_->dtype != DType::kU8) return;
  kind_ = Kind::kPacked;
  scales_ = &required("_weight_scale");
  const bool looks_mxfp4 = checkpoint_.find(name_ + "_weight_scale_2") == nullptr &&
                           is_scale_type(scales_->dtype, ScaleType::kE8m0, false);
  const bool is_mxfp4 = scheme_ ? scheme_ == WeightScheme::kMxfp4 : looks_mxfp4;
  format_ = is_mxfp4 ? QuantFormat::kMxfp4 : QuantFormat::kNvfp4;
}

const Tensor& FusedReader::required(const std::string& suffix) const {
  const Tensor* tensor = checkpoint_.find(name_ + suffix);
  if (tensor == nullptr) {
    fail(ErrorCode::kBadFile, "{}: expected a tensor '{}{}' among the fused experts, found none",
         checkpoint_.path().string(), name_, suffix);
  }
  return *tensor;
}

std::optional<std::pair<int64_t, int64_t>> FusedReader::shape(bool transposed) const {
  const int64_t first = weight_->shape[1], second = weight_->shape[2];
  if (kind_ == Kind::kMxfp4Blocks) {
    return transposed ? std::nullopt : std::optional(std::pair(first, second * kMxfp4Block));
  }
  const int64_t per_element = kind_ == Kind::kPacked ? 2 : 1;
  return transposed ? std::pair(second, first * per_element) : std::pair(first, second * per_element);
}

std::string FusedReader::scheme() const {
  if (kind_ != Kind::kDense) return std::string(traits_of(format_).name);
  return std::string(format_name(DenseView{*dense_type(weight_->dtype), nullptr, 0, 0, 0, {}}));
}

DenseView FusedReader::dense_matrix(int64_t expert) const {
  const int64_t rows = weight_->shape[1], cols = weight_->shape[2];
  const int64_t row_bytes = cols * bits_of(weight_->dtype) / 8;
  return {*dense_type(weight_->dtype), weight_->data + expert * rows * row_bytes, rows, cols, row_bytes, {}};
}

/// Codes and scales where they are stored; of a transposed matrix, [in / 2, out] and [in / block, out].
BlockScaledView FusedReader::block_scaled_matrix(int64_t expert, bool transposed) const {
  const QuantFormatTraits traits = traits_of(format_);
  const int block = traits.block_size;
  const int64_t first = weight_->shape[1];
  const int64_t code_bytes = weight_->elements() / experts();
  const int64_t second = code_bytes / first;
  const int64_t rows = transposed ? second : first, cols = 2 * (transposed ? first : second);
  if (cols % block != 0) bad_tensor(*weight_, fmt::format("whole blocks of {} (two codes a byte)", block));
  const int64_t blocks = cols / block;
  if (kind_ == Kind::kPacked) {
    const std::vector<int64_t> expected =
        transposed ? std::vector{experts(), blocks, rows} : std::vector{experts(), rows, blocks};
    if (!is_scale_type(scales_->dtype, traits.scale_type, scheme_.has_value()) ||
        scales_->shape != expected) {
      bad_tensor(*scales_, fmt::format("{} [{}]", traits.has_global_scale ? "F8_E4M3" : "F8_E8M0",
                                       fmt::join(expected, ", ")));
    }
  }
  return {format_,
          rows,
          cols,
          {reinterpret_cast<const uint8_t*>(weight_->data) + expert * code_bytes, rows, cols / 2},
          reinterpret_cast<const uint8_t*>(scales_->data) + expert * rows * blocks,
          blocks,
          ScaleLayout::kRowMajor,
          {}};
}

WeightView FusedReader::matrix(int64_t expert, bool transposed, RepackedBytes& storage) const {
  if (kind_ == Kind::kDense) {
    DenseView view = dense_matrix(expert);
    if (!transposed) return view;
    const int64_t size = bits_of(weight_->dtype) / 8;
    std::byte* repacked = storage.add(view.rows * view.cols * size);
    transpose(view.data, view.rows, view.cols, size, repacked);
    return DenseView{view.type, repacked, view.cols, view.rows, view.rows * size, {}};
  }
  BlockScaledView view = block_scaled_matrix(expert, transposed);
  if (transposed) {
    const int64_t code_bytes = view.cols / 2, blocks = view.blocks_per_row();
    std::byte* codes = storage.add(view.rows * code_bytes);
    std::byte* scales = storage.add(view.rows * blocks);
    transpose(reinterpret_cast<const std::byte*>(view.codes.data), code_bytes, view.rows, 1, codes);
    transpose(reinterpret_cast<const std::byte*>(view.scales), blocks, view.rows, 1, scales);
    view.codes.data = reinterpret_cast<const uint8_t*>(codes);
    view.scales = reinterpret_cast<const uint8_t*>(scales);
  }
  if (traits_of(format_).has_global_scale) {
    const Tensor& tensor = required("_weight_scale_2");
    view.global = {scalar_of(tensor, expert), scheme_ == WeightScheme::kCompressedTensors
                                                  ? GlobalScaleKind::kDivisor
                                                  : GlobalScaleKind::kMultiplier};
    if (const auto expected = why_bad_global(view.global)) {
      fail(ErrorCode::kBadFile, "{}: tensor '{}', expert {}: expected {}, found {}", tensor.file, tensor.name,
           expert, *expected, view.global.value);
    }
    return view;
  }
  const auto count = static_cast<size_t>(view.rows * view.blocks_per_row());
  if (std::memchr(view.scales, kE8m0NanCode, count) != nullptr) {
    fail(ErrorCode::kBadFile, "{}: tensor '{}', expert {}: expected powers of two, found 0xFF (NaN)",
         scales_->file, scales_->name, expert);
  }
  return view;
}

/// One number for all experts, or one each.
float FusedReader::scalar_of(const Tensor& tensor, int64_t expert) const {
  if (tensor.dtype != DType::kF32 || (tensor.elements() != 1 && tensor.elements() != experts())) {
    bad_tensor(tensor, fmt::format("one F32 number, or {}", experts()));
  }
  float value = 0.0f;
  const int64_t index = tensor.elements() == 1 ? 0 : expert;
  std::memcpy(&value, tensor.data + index * static_cast<int64_t>(sizeof(value)), sizeof(value));
  return value;
}

std::optional<DenseView> FusedReader::bias(int64_t expert, int64_t out) const {
  const Tensor* tensor = checkpoint_.find(name_ + "_bias");
  if (tensor == nullptr) return std::nullopt;
  DenseView all = dense_tensor(*tensor, {experts(), out});
  all.data += expert * all.row_stride_bytes;
  all.rows = 1;
  return all;
}

std::optional<float> FusedReader::input_scale(int64_t expert) const {
  const Tensor* tensor = checkpoint_.find(name_ + "_input_scale");
  if (tensor == nullptr) return std::nullopt;
  const float stored = scalar_of(*tensor, expert);
  return scheme_ == WeightScheme::kCompressedTensors ? 1.0f / stored : stored;
}

std::set<std::string> FusedReader::tensor_names() const {
  std::set<std::string> names = {weight_->name, name_ + "_bias"};
  if (scales_ != nullptr) names.insert(scales_->name);
  if (kind_ == Kind::kPacked) names.insert(name_ + "_input_scale");
  if (kind_ == Kind::kPacked && traits_of(format_).has_global_scale) names.insert(name_ + "_weight_scale_2");
  return names;
}

WeightView take_rows(const WeightView& weight, int64_t first, int64_t count, int64_t step) {
  if (const auto* dense = std::get_if<DenseView>(&weight)) {
    DenseView part = *dense;
    part.data += first * part.row_stride_bytes;
    part.rows = count;
    part.row_stride_bytes *= step;
    return part;
  }
  BlockScaledView part = std::get<BlockScaledView>(weight);
  part.rows = count;
  part.codes = {part.codes.row(first), count, part.codes.cols, part.codes.stride * step, part.codes.device};
  part.scales += first * part.scale_stride;
  part.scale_stride *= step;
  return part;
}

}  // namespace fourfold
