// Names of activation formats and scale policies; staged rows as GEMM operands.
#include "fourfold/activations.h"

#include <array>
#include <utility>

namespace fourfold {
namespace {

constexpr std::array<std::pair<ActivationFormat, std::string_view>, 4> kFormats = {{
    {ActivationFormat::kNvfp4, "nvfp4"},
    {ActivationFormat::kNvfp4x2, "nvfp4x2"},
    {ActivationFormat::kFp8, "fp8"},
    {ActivationFormat::kBf16, "bf16"},
}};

constexpr std::array<std::pair<ScalePolicy, std::string_view>, 4> kPolicies = {{
    {ScalePolicy::kStatic, "static"},
    {ScalePolicy::kMaxOverExperts, "max-over-experts"},
    {ScalePolicy::kDynamicTensor, "dynamic-tensor"},
    {ScalePolicy::kDynamicToken, "dynamic-token"},
}};

template <class Table, class Value>
std::string_view name_in(const Table& table, Value value) {
  for (const auto& [entry, name] : table) {
    if (entry == value) return name;
  }
  return "?";
}

template <class Value, size_t kSize>
std::optional<Value> value_in(const std::array<std::pair<Value, std::string_view>, kSize>& table,
                              std::string_view wanted) {
  for (const auto& [value, name] : table) {
    if (name == wanted) return value;
  }
  return std::nullopt;
}

}  // namespace

std::string_view to_string(ActivationFormat format) {
  return name_in(kFormats, format);
}
std::string_view to_string(ScalePolicy policy) {
  return name_in(kPolicies, policy);
}

std::optional<ActivationFormat> parse_activation_format(std::string_view name) {
  return value_in(kFormats, name);
}
std::optional<ScalePolicy> parse_scale_policy(std::string_view name) {
  return value_in(kPolicies, name);
}

ActivationView StagedActivations::view(ActivationFormat format, int64_t rows, int64_t cols) const {
  ActivationView view;
  view.format = format;
  view.rows = rows;
  view.cols = cols;
  if (format == ActivationFormat::kBf16) {
    view.values = values.rows_from(0, rows);
    return view;
  }
  view.codes = codes.rows_from(0, rows);
  view.row_scales = row_scales.first(static_cast<size_t>(rows));
  if (is_nvfp4(format)) {
    view.scales = scales.data;
    view.scale_stride = scales.stride;
  }
  if (format == ActivationFormat::kNvfp4x2) {
    view.residual_codes = residual_codes.rows_from(0, rows);
    view.residual_scales = residual_scales.data;
  }
  return view;
}

}  // namespace fourfold
