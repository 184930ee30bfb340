// Quantizers, dequantization, staging and scale layouts.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>

#include "arrays.h"
#include "bindings.h"
#include "failures.h"
#include "fourfold/quantize.h"
#include "fourfold/reference.h"
#include "fourfold/scale_layout.h"

namespace fourfold::python {
namespace {

void require_host(const ArrayView& array) {
  if (array.device != Device::host()) {
    reject(array.name, "host memory", array.describe() + "; copy it to the host");
  }
}

void require_columns(const ArrayView& array, int64_t multiple) {
  if (array.shape[1] % multiple != 0) {
    reject(array.name, fmt::format("a multiple of {} columns", multiple), array.describe());
  }
}

/// Largest magnitude; NaN if any value is NaN.
float largest_magnitude(const DenseView& x) {
  bool nan = false;
  float largest = 0.0f;
#pragma omp parallel reduction(|| : nan) reduction(max : largest)
  {
    std::vector<float> row(static_cast<size_t>(x.cols));
#pragma omp for
    for (int64_t r = 0; r < x.rows; ++r) {
      decode_row(x, r, row.data());
      const float found = absolute_maximum(MatrixView<const float>(row.data(), 1, x.cols));
      nan = nan || std::isnan(found);
      if (found > largest) largest = found;
    }
  }
  return nan ? std::nanf("") : largest;
}

void require_global_scale(std::optional<float> scale) {
  if (scale && !(*scale > 0.0f && std::isfinite(*scale))) {
    reject("global_scale", "a finite number above 0", fmt::format("{}", *scale));
  }
}

QuantFormat quant_format(const std::string& name) {
  if (name == "nvfp4") return QuantFormat::kNvfp4;
  if (name == "mxfp4") return QuantFormat::kMxfp4;
  reject("format", "nvfp4 or mxfp4", "'" + name + "'");
}

ScaleLayout scale_layout(const std::string& name) {
  if (name == "row-major") return ScaleLayout::kRowMajor;
  if (name == "swizzled") return ScaleLayout::kSwizzled128x4;
  reject("layout", "row-major or swizzled", "'" + name + "'");
}

/// Returns the global scale. An empty `rule` is that of activations.
float quantize(const Array& x_array, const std::string& format_name, const std::string& rule_name,
               std::optional<float> global_scale, const WritableArray& code_array,
               const WritableArray& scale_array) {
  const ArrayView x = view_of(x_array, "x"), codes = view_of(code_array, "codes"),
                  scales = view_of(scale_array, "scales");
  const QuantFormat format = quant_format(format_name);
  const int block = traits_of(format).block_size;
  require_host(x);
  require_global_scale(global_scale);
  const DenseView values = dense_matrix(x);
  x.require_dimensions(2);
  require_columns(x, block);
  codes.require_shape({values.rows, values.cols / 2});
  scales.require_shape({values.rows, values.cols / block});
  const MatrixView<uint8_t> code_rows = byte_matrix(codes), scale_rows = byte_matrix(scales);
  std::optional<ScaleRule> rule;
  if (!rule_name.empty()) rule = scale_rule("rule", rule_name);
  const nb::gil_scoped_release release;
  float global = 1.0f;
  if (format == QuantFormat::kNvfp4)
    global = global_scale ? *global_scale : nvfp4_global_scale(largest_magnitude(values));
#pragma omp parallel
  {
    std::vector<float> row(static_cast<size_t>(values.cols));
#pragma omp for
    for (int64_t r = 0; r < values.rows; ++r) {
      decode_row(values, r, row.data());
      if (format == QuantFormat::kMxfp4) {
        quantize_row_mxfp4(row, code_rows.row(r), scale_rows.row(r));
      } else if (rule) {
        quantize_weight_row_nvfp4(row, global, *rule, code_rows.row(r), scale_rows.row(r));
      } else {
        quantize_row_nvfp4(row, global, ScaleFloor::kNone, code_rows.row(r), scale_rows.row(r));
      }
    }
  }
  return global;
}

Weight dense_weight(const Array& array) {
  const ArrayView view = view_of(array, "weight");
  view.require_dimensions(2);
  return {dense_matrix(view), keep_alive({array})};
}

Weight block_scaled_weight(const std::string& format_name, const Array& code_array, const Array& scale_array,
                           const std::string& layout_name, float global_scale, bool divides) {
  const ArrayView codes = view_of(code_array, "codes"), scales = view_of(scale_array, "scales");
  BlockScaledView view;
  view.format = quant_format(format_name);
  view.codes = byte_matrix(codes);
  view.rows = view.codes.rows;
  view.cols = view.codes.cols * 2;
  if (view.cols % traits_of(view.format).block_size != 0) {
    reject("codes", fmt::format("whole blocks of {} along K", traits_of(view.format).block_size),
           codes.describe());
  }
  view.scale_layout = scale_layout(layout_name);
  view.global = {global_scale, divides ? GlobalScaleKind::kDivisor : GlobalScaleKind::kMultiplier};
  if (scales.device != codes.device) reject("scales", "the memory that codes lie in", scales.describe());
  if (view.scale_layout == ScaleLayout::kSwizzled128x4) {
    const std::span<uint8_t> swizzled = bytes(scales);
    const int64_t expected = swizzled_scale_bytes(view.rows, view.blocks_per_row());
    if (static_cast<int64_t>(swizzled.size()) != expected) {
      reject("scales", fmt::format("{} swizzled bytes", expected), scales.describe());
    }
    view.scales = swizzled.data();
  } else {
    scales.require_shape({view.rows, view.blocks_per_row()});
    const MatrixView<uint8_t> rows = byte_matrix(scales);
    view.scales = rows.data;
    view.scale_stride = rows.stride;
  }
  return {view, keep_alive({code_array, scale_array})};
}

Weight fp8_weight(const Array& code_array, const Array& scale_array, int64_t tile_rows, int64_t tile_cols) {
  const ArrayView codes = view_of(code_array, "codes"), scales = view_of(scale_array, "scales");
  if (tile_rows < 1 || tile_cols < 1) {
    reject("tile", "sizes of at least 1", fmt::format("{} x {}", tile_rows, tile_cols));
  }
  Fp8View view;
  view.codes = byte_matrix(codes);
  view.rows = view.codes.rows;
  view.cols = view.codes.cols;
  view.tile_rows = tile_rows;
  view.tile_cols = tile_cols;
  if (scales.device != codes.device) reject("scales", "the memory that codes lie in", scales.describe());
  scales.require_shape({(view.rows + tile_rows - 1) / tile_rows, view.tiles_per_row()});
  if (scales.is(Element::kF32)) {
    const MatrixView<float> tiles = f32_matrix(scales);
    if (tiles.rows > 1 && tiles.stride != tiles.cols)
      reject("scales", "an array without gaps", scales.describe());
    view.scale_type = TileScaleType::kF32;
  } else {
    bytes(scales);
    view.scale_type = TileScaleType::kE8m0;
  }
  view.scales = scales.data;
  return {view, keep_alive({code_array, scale_array})};
}

void dequantize_into(const Weight& weight, const WritableArray& out_array) {
  const ArrayView out = view_of(out_array, "out");
  const int64_t rows = rows_of(weight.view), cols = cols_of(weight.view);
  out.require_shape({rows, cols});
  const MatrixView<float> values = f32_matrix(out);
  if (device_of(weight.view) != Device::host())
    reject("dequantize", "host memory", "a CUDA device's; copy it");
  const nb::gil_scoped_release release;
#pragma omp parallel for
  for (int64_t r = 0; r < rows; ++r) dequantize_row(weight.view, r, values.row(r));
}

StagedActivations staged_views(const std::optional<WritableArray>& values,
                               const std::optional<WritableArray>& codes,
                               const std::optional<WritableArray>& scales,
                               const std::optional<WritableArray>& residual_codes,
                               const std::optional<WritableArray>& residual_scales,
                               const std::optional<WritableArray>& row_scales) {
  StagedActivations staged;
  if (values) staged.values = bf16_matrix(view_of(*values, "values"));
  if (codes) staged.codes = byte_matrix(view_of(*codes, "codes"));
  if (scales) staged.scales = byte_matrix(view_of(*scales, "scales"));
  if (residual_codes) staged.residual_codes = byte_matrix(view_of(*residual_codes, "residual_codes"));
  if (residual_scales) staged.residual_scales = byte_matrix(view_of(*residual_scales, "residual_scales"));
  if (row_scales) staged.row_scales = f32_vector(view_of(*row_scales, "row_scales"));
  return staged;
}

/// `global_scale`: the static one of every row; else `policy` says how rows get theirs.
void stage(const Array& x_array, const std::string& format_name, const std::string& policy_name,
           std::optional<float> global_scale, const std::optional<WritableArray>& codes,
           const std::optional<WritableArray>& scales, const std::optional<WritableArray>& residual_codes,
           const std::optional<WritableArray>& residual_scales,
           const std::optional<WritableArray>& row_scales) {
  const ArrayView x = view_of(x_array, "x");
  require_host(x);
  const MatrixView<Bf16> rows = bf16_matrix(x);
  const ActivationFormat format = activation_format(format_name);
  require_global_scale(global_scale);
  if (is_nvfp4(format)) require_columns(x, 16);
  const StagedActivations out = staged_views({}, codes, scales, residual_codes, residual_scales, row_scales);
  const nb::gil_scoped_release release;
  if (is_nvfp4(format)) {
    const std::vector<int32_t> one_group = {0, static_cast<int32_t>(rows.rows)};
    const std::vector<float> given = {global_scale.value_or(1.0f)};
    const ScalePolicy policy = global_scale ? ScalePolicy::kStatic : scale_policy(policy_name);
    reference::activation_scales(policy, rows, one_group, given, out.row_scales);
  }
  reference::stage(format, rows, out);
}

Activations staged_activations(const std::string& format_name, int64_t rows, int64_t cols,
                               const std::optional<Array>& values, const std::optional<Array>& codes,
                               const std::optional<Array>& scales, const std::optional<Array>& residual_codes,
                               const std::optional<Array>& residual_scales,
                               const std::optional<Array>& row_scales) {
  const ActivationFormat format = activation_format(format_name);
  StagedActivations staged;
  std::vector<Array> kept;
  const auto matrix = [&](const std::optional<Array>& array, const char* name, int64_t columns, auto view) {
    if (!array) reject(name, "an array, which this format needs", "None");
    const ArrayView found = view_of(*array, name);
    found.require_shape({rows, columns});
    kept.push_back(*array);
    return view(found);
  };
  if (format == ActivationFormat::kBf16) {
    staged.values = matrix(values, "values", cols, bf16_matrix);
  } else {
    staged.codes = matrix(codes, "codes", format == ActivationFormat::kFp8 ? cols : cols / 2, byte_matrix);
    if (!row_scales) reject("row_scales", "an array, which this format needs", "None");
    const ArrayView globals = view_of(*row_scales, "row_scales");
    globals.require_shape({rows});
    staged.row_scales = f32_vector(globals);
    kept.push_back(*row_scales);
  }
  if (is_nvfp4(format)) staged.scales = matrix(scales, "scales", cols / 16, byte_matrix);
  if (format == ActivationFormat::kNvfp4x2) {
    staged.residual_codes = matrix(residual_codes, "residual_codes", cols / 2, byte_matrix);
    staged.residual_scales = matrix(residual_scales, "residual_scales", cols / 16, byte_matrix);
  }
  return {staged.view(format, rows, cols), keep_alive(std::move(kept))};
}

/// Copies `result` into `out`, whose size must be its.
void fill(const WritableArray& out_array, const std::vector<uint8_t>& result) {
  const std::span<uint8_t> out = bytes(view_of(out_array, "out"));
  if (out.size() != result.size()) {
    reject("out", fmt::format("{} bytes", result.size()), fmt::format("{} bytes", out.size()));
  }
  std::copy(result.begin(), result.end(), out.begin());
}

MatrixView<const uint8_t> host_scales(const Array& array) {
  const ArrayView scales = view_of(array, "scales");
  require_host(scales);
  return byte_matrix(scales);
}

}  // namespace

void bind_numeric(nb::module_& module) {
  nb::class_<Weight>(module, "Weight", "A weight matrix [rows, cols]: a view that keeps its arrays alive.")
      .def_prop_ro("rows", [](const Weight& weight) { return rows_of(weight.view); })
      .def_prop_ro("cols", [](const Weight& weight) { return cols_of(weight.view); })
      .def_prop_ro("format", [](const Weight& weight) { return std::string(format_name(weight.view)); });
  module.def("dense_weight", dense_weight, nb::arg("array"));
  module.def("block_scaled_weight", block_scaled_weight, nb::arg("format"), nb::arg("codes"),
             nb::arg("scales"), nb::arg("layout"), nb::arg("global_scale"), nb::arg("divides"));
  module.def("fp8_weight", fp8_weight, nb::arg("codes"), nb::arg("scales"), nb::arg("tile_rows"),
             nb::arg("tile_cols"));
  nb::class_<Activations>(module, "Activations",
                          "Staged activations [rows, cols]: views that keep arrays alive.")
      .def_prop_ro("rows", [](const Activations& staged) { return staged.view.rows; })
      .def_prop_ro("cols", [](const Activations& staged) { return staged.view.cols; });
  module.def("activations", staged_activations, nb::arg("format"), nb::arg("rows"), nb::arg("cols"),
             nb::arg("values") = nb::none(), nb::arg("codes") = nb::none(), nb::arg("scales") = nb::none(),
             nb::arg("residual_codes") = nb::none(), nb::arg("residual_scales") = nb::none(),
             nb::arg("row_scales") = nb::none());
  module.def("quantize", quantize, nb::arg("x"), nb::arg("format"), nb::arg("rule"),
             nb::arg("global_scale").none(), nb::arg("codes"), nb::arg("scales"));
  module.def("dequantize", dequantize_into, nb::arg("weight"), nb::arg("out"));
  module.def("stage", stage, nb::arg("x"), nb::arg("format"), nb::arg("policy"),
             nb::arg("global_scale").none(), nb::arg("codes") = nb::none(), nb::arg("scales") = nb::none(),
             nb::arg("residual_codes") = nb::none(), nb::arg("residual_scales") = nb::none(),
             nb::arg("row_scales") = nb::none());
  module.def("swizzled_scale_bytes", swizzled_scale_bytes, nb::arg("rows"), nb::arg("k_sf"));
  module.def(
      "padded_group_rows", [](const std::vector<int32_t>& offsets) { return padded_group_rows(offsets); },
      nb::arg("group_offsets"));
  module.def(
      "swizzle_scales",
      [](const Array& scales, const WritableArray& out) { fill(out, swizzle_scales(host_scales(scales))); },
      nb::arg("scales"), nb::arg("out"));
  module.def(
      "swizzle_scale_groups",
      [](const Array& scales, const std::vector<int32_t>& offsets, const WritableArray& out) {
        fill(out, swizzle_scale_groups(host_scales(scales), offsets));
      },
      nb::arg("scales"), nb::arg("group_offsets"), nb::arg("out"));
  module.def(
      "unswizzle_scales",
      [](const Array& swizzled, int64_t rows, int64_t k_sf, const WritableArray& out) {
        const ArrayView array = view_of(swizzled, "swizzled");
        require_host(array);
        fill(out, unswizzle_scales(bytes(array), rows, k_sf));
      },
      nb::arg("swizzled"), nb::arg("rows"), nb::arg("k_sf"), nb::arg("out"));
}

}  // namespace fourfold::python
