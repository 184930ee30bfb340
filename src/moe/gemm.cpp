// What makes GEMM arguments fit each other.
#include "fourfold/gemm.h"

#include <string>

#include "base/fail.h"
#include "fourfold/scale_layout.h"

namespace fourfold {
namespace {

template <class T>
void require_shape(const std::string& what, const MatrixView<T>& matrix, int64_t rows, int64_t cols) {
  if (matrix.rows != rows || matrix.cols != cols)
    reject(what, shape_text(rows, cols), shape_text(matrix.rows, matrix.cols));
  if (matrix.data == nullptr && rows > 0 && cols > 0) reject(what, "data", "a null pointer");
  if (matrix.stride < cols) reject(what, fmt::format("a stride of at least {}", cols), matrix.stride);
}

void validate_weight(const std::string& what, const WeightView& weight, int64_t rows, int64_t cols) {
  if (rows_of(weight) != rows || cols_of(weight) != cols) {
    reject(what, shape_text(rows, cols), shape_text(rows_of(weight), cols_of(weight)));
  }
  if (const auto* dense = std::get_if<DenseView>(&weight)) {
    if (dense->data == nullptr && rows > 0) reject(what, "data", "a null pointer");
  }
  if (const auto* fp8 = std::get_if<Fp8View>(&weight)) {
    require_shape(what + " codes", fp8->codes, rows, cols);
    if (fp8->scales == nullptr && rows > 0) reject(what, "tile scales", "a null pointer");
    if (fp8->tile_rows < 1 || fp8->tile_cols < 1)
      reject(what, "tiles of at least one value", shape_text(fp8->tile_rows, fp8->tile_cols));
  }
  if (const auto* blocks = std::get_if<BlockScaledView>(&weight)) {
    if (blocks->scales == nullptr && rows > 0) reject(what, "block scales", "a null pointer");
    const int block = traits_of(blocks->format).block_size;
    if (cols % block != 0) reject(what, fmt::format("K to be a multiple of {}", block), cols);
    require_shape(what + " codes", blocks->codes, rows, cols / 2);
    if (blocks->scale_layout == ScaleLayout::kRowMajor && blocks->scale_stride < blocks->blocks_per_row()) {
      reject(what + " scales", fmt::format("a row stride of at least {}", blocks->blocks_per_row()),
             blocks->scale_stride);
    }
  }
}

}  // namespace

std::vector<WeightView> stacked_nvfp4_weights(const uint8_t* codes, const uint8_t* scales, ScaleLayout layout,
                                              std::span<const float> globals, int64_t rows, int64_t cols) {
  const int64_t k_sf = cols / 16;
  const int64_t scale_bytes =
      layout == ScaleLayout::kRowMajor ? rows * k_sf : swizzled_scale_bytes(rows, k_sf);
  std::vector<WeightView> experts;
  for (size_t e = 0; e < globals.size(); ++e) {
    const auto index = static_cast<int64_t>(e);
    experts.emplace_back(BlockScaledView{QuantFormat::kNvfp4,
                                         rows,
                                         cols,
                                         {codes + index * rows * cols / 2, rows, cols / 2},
                                         scales + index * scale_bytes,
                                         k_sf,
                                         layout,
                                         {globals[e], GlobalScaleKind::kMultiplier}});
  }
  return experts;
}

void validate(const ActivationView& a, size_t groups) {
  if (a.format == ActivationFormat::kBf16) {
    require_shape("bf16 activations", a.values, a.rows, a.cols);
  } else if (a.format == ActivationFormat::kFp8) {
    require_shape("fp8 codes", a.codes, a.rows, a.cols);
  } else {
    if (a.cols % 16 != 0) reject("nvfp4 activations", "K to be a multiple of 16", a.cols);
    require_shape("nvfp4 codes", a.codes, a.rows, a.cols / 2);
    if (a.scales == nullptr && a.rows > 0) reject("nvfp4 activations", "block scales", "none");
    if (a.format == ActivationFormat::kNvfp4x2) {
      require_shape("nvfp4x2 residual codes", a.residual_codes, a.rows, a.cols / 2);
      if (a.residual_scales == nullptr && a.rows > 0)
        reject("nvfp4x2 activations", "residual scales", "none");
    }
  }
  if (!a.row_scales.empty() && !a.group_scales.empty()) {
    reject("activation scales", "one a row or one a group", "both");
  }
  if (!a.row_scales.empty() && static_cast<int64_t>(a.row_scales.size()) != a.rows) {
    reject("row scales", a.rows, a.row_scales.size());
  }
  if (!a.group_scales.empty() && a.group_scales.size() != groups) {
    reject("group scales", groups, a.group_scales.size());
  }
}

void validate(const GemmArgs& args) {
  validate(args.a, 1);
  const int64_t rows = rows_of(args.b);
  validate_weight("b", args.b, rows, args.a.cols);
  std::visit([&](const auto& d) { require_shape("d", d, args.a.rows, rows); }, args.d);
}

void validate(const GroupedGemmArgs& args) {
  validate_shapes(args);
  validate_group_offsets(args.group_offsets, args.a.rows);
}

void validate_shapes(const GroupedGemmArgs& args) {
  if (args.group_offsets.size() != args.b.size() + 1) {
    reject("group offsets", fmt::format("{} for {} weights", args.b.size() + 1, args.b.size()),
           args.group_offsets.size());
  }
  validate(args.a, args.b.size());
  for (size_t e = 0; e < args.b.size(); ++e) {
    validate_weight(fmt::format("b of expert {}", e), args.b[e], rows_of(args.b[0]), args.a.cols);
  }
  const int64_t cols =
      args.b.empty() ? std::visit([](const auto& d) { return d.cols; }, args.d) : rows_of(args.b[0]);
  std::visit([&](const auto& d) { require_shape("d", d, args.a.rows, cols); }, args.d);
}

}  // namespace fourfold
