#include "checkpoint/conversion_names.h"

#include <array>
#include <utility>

#include "fourfold/block_scaled.h"

namespace fourfold {
namespace {

constexpr std::array<std::pair<TargetFormat, std::string_view>, 3> kFormats = {{
    {TargetFormat::kNvfp4, "nvfp4"},
    {TargetFormat::kMxfp4, "mxfp4"},
    {TargetFormat::kBf16, "bf16"},
}};

}  // namespace

std::string_view to_string(TargetFormat format) {
  for (const auto& [entry, name] : kFormats) {
    if (entry == format) return name;
  }
  return "?";
}

std::optional<TargetFormat> parse_target_format(std::string_view name) {
  for (const auto& [format, entry] : kFormats) {
    if (entry == name) return format;
  }
  return std::nullopt;
}

int block_of(TargetFormat format) {
  if (format == TargetFormat::kBf16) return 0;
  return traits_of(format == TargetFormat::kNvfp4 ? QuantFormat::kNvfp4 : QuantFormat::kMxfp4).block_size;
}

LinearNames linear_names(TargetFormat format, WeightScheme scheme, bool is_deepseek_v4) {
  const bool is_compressed = scheme == WeightScheme::kCompressedTensors;
  if (format == TargetFormat::kBf16) return {".weight", "", "", "", DType::kBf16, DType::kU8, false, {}};
  if (format == TargetFormat::kNvfp4) {
    if (is_compressed) {
      return {".weight_packed",
              ".weight_scale",
              ".weight_global_scale",
              ".input_global_scale",
              DType::kU8,
              DType::kF8E4m3,
              true,
              {1}};
    }
    return {".weight", ".weight_scale", ".weight_scale_2", ".input_scale", DType::kU8, DType::kF8E4m3, false,
            {}};
  }
  if (is_compressed) return {".weight_packed", ".weight_scale", "", "", DType::kU8, DType::kU8, false, {}};
  if (is_deepseek_v4) return {".weight", ".scale", "", "", DType::kI8, DType::kF8E8m0, false, {}};
  return {".weight", ".weight_scale", "", "", DType::kU8, DType::kU8, false, {}};
}

LinearNames fused_names(TargetFormat format) {
  if (format == TargetFormat::kBf16) return {"", "", "", "", DType::kBf16, DType::kU8, false, {}};
  if (format == TargetFormat::kMxfp4)
    return {"_blocks", "_scales", "", "", DType::kU8, DType::kU8, false, {}};
  return {"", "_weight_scale", "_weight_scale_2", "_input_scale", DType::kU8, DType::kF8E4m3, false, {}};
}

std::vector<TensorSpec> matrix_specs(const std::string& name, TargetFormat format, const LinearNames& names,
                                     int64_t rows, int64_t cols) {
  const std::string weight = name + std::string(names.weight);
  if (format == TargetFormat::kBf16) return {{weight, names.weight_type, {rows, cols}}};
  return {{weight, names.weight_type, {rows, cols / 2}},
          {name + std::string(names.scales), names.scale_type, {rows, cols / block_of(format)}}};
}

std::vector<TensorSpec> fused_specs(const std::string& name, TargetFormat format, ExpertLayout layout,
                                    int64_t experts, int64_t rows, int64_t cols) {
  const LinearNames names = fused_names(format);
  const std::string weight = name + std::string(names.weight), scales = name + std::string(names.scales);
  if (layout == ExpertLayout::kFusedBlocks) {
    const int block = block_of(format);
    return {{weight, names.weight_type, {experts, rows, cols / block, block / 2}},
            {scales, names.scale_type, {experts, rows, cols / block}}};
  }
  if (format == TargetFormat::kBf16) return {{weight, names.weight_type, {experts, cols, rows}}};
  return {{weight, names.weight_type, {experts, cols / 2, rows}},
          {scales, names.scale_type, {experts, cols / block_of(format), rows}}};
}

}  // namespace fourfold
