// From tensor names and dtypes to the expert weights of a layer. Views into the mapped files; nothing is
// copied.
#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstring>
#include <set>

#include "base/fail.h"
#include "fourfold/checkpoint.h"

namespace fourfold {
namespace {

/// How a family of models names its experts. docs/formats.md, section 3.
struct Naming {
  std::string_view before_layer, before_experts;  // "model.layers." L ".mlp.experts." E "." gate ".weight"
  std::string_view gate, up, down;
};

constexpr std::array<Naming, 3> kNamings = {{
    {"model.layers.", ".mlp.experts.", "gate_proj", "up_proj", "down_proj"},  // Qwen3-MoE, DeepSeek-V3
    {"model.layers.", ".block_sparse_moe.experts.", "w1", "w3", "w2"},        // Mixtral
    {"layers.", ".ffn.experts.", "w1", "w3", "w2"},                           // DeepSeek-V4
}};

/// Of a layer; the largest models have a few hundred. Bounds what a shape can make us allocate.
constexpr int64_t kMaxExperts = 65536;

std::string experts_prefix(const Naming& naming, int64_t layer) {
  return fmt::format("{}{}{}", naming.before_layer, layer, naming.before_experts);
}

/// The number that `text` starts with, written as numbers are, if it is followed by `stop`. At most nine
/// digits.
std::optional<int64_t> leading_number(std::string_view text, char stop) {
  const size_t digits = text.find_first_not_of("0123456789");
  if (digits == 0 || digits == std::string_view::npos || digits > 9 || text[digits] != stop)
    return std::nullopt;
  if (text[0] == '0' && digits > 1) return std::nullopt;
  int64_t number = 0;
  std::from_chars(text.data(), text.data() + digits, number);
  return number;
}

/// Numbers of the experts under `prefix`.
std::vector<int64_t> expert_ids(const Checkpoint& checkpoint, const std::string& prefix) {
  std::set<int64_t> ids;
  const auto& tensors = checkpoint.tensors();
  for (auto it = tensors.lower_bound(prefix); it != tensors.end() && it->first.starts_with(prefix); ++it) {
    const auto id = leading_number(std::string_view(it->first).substr(prefix.size()), '.');
    if (!id) {
      fail(ErrorCode::kBadFile,
           "{}: tensor '{}': expected an expert's number after '{}', found something else", it->second->file,
           it->first, prefix);
    }
    ids.insert(*id);
  }
  return {ids.begin(), ids.end()};
}

[[noreturn]] void bad_tensor(const Tensor& tensor, const std::string& expected,
                             const std::string& hint = "") {
  fail(ErrorCode::kBadFile, "{}: tensor '{}': expected {}, found {}{}", tensor.file, tensor.name, expected,
       tensor.describe(), hint);
}

bool is_fp4_pair(DType type) {
  return type == DType::kU8 || type == DType::kI8;
}

std::optional<ElementType> dense_type(DType type) {
  if (type == DType::kBf16) return ElementType::kBf16;
  if (type == DType::kF16) return ElementType::kF16;
  if (type == DType::kF32) return ElementType::kF32;
  return std::nullopt;
}

/// Reads the tensors of one linear layer, e.g. everything that starts with "layers.0.ffn.experts.7.w1".
class LinearReader {
 public:
  LinearReader(const Checkpoint& checkpoint, std::string name)
      : checkpoint_(checkpoint), name_(std::move(name)) {}

  /// The weight, whatever its scheme; adds the scheme's name to `schemes`.
  WeightView weight(std::set<std::string>& schemes) const {
    const Tensor& weight = required(".weight");
    if (weight.shape.size() != 2 || weight.shape[0] == 0 || weight.shape[1] == 0) {
      bad_tensor(weight, "a matrix [out, in]");
    }
    if (const auto type = dense_type(weight.dtype)) {
      schemes.insert(*type == ElementType::kBf16 ? "bf16" : *type == ElementType::kF16 ? "f16" : "f32");
      return DenseView{*type, weight.data, weight.shape[0], weight.shape[1], weight.bytes / weight.shape[0],
                       {}};
    }
    if (!is_fp4_pair(weight.dtype)) {
      bad_tensor(weight, "NVFP4 or MXFP4 codes (U8 or I8), or BF16, F16, F32",
                 weight.dtype == DType::kF8E4m3 ? "; FP8 experts are not read" : "");
    }
    if (find(".weight_scale")) return nvfp4(weight, schemes);
    if (find(".scale")) return mxfp4(weight, schemes);
    fail(ErrorCode::kBadFile,
         "{}: tensor '{}': expected '{}.weight_scale' (NVFP4) or '{}.scale' (MXFP4) beside {}, "
         "found neither",
         weight.file, weight.name, name_, name_, weight.describe());
  }

  /// [1, out]; absent where the layer has none.
  std::optional<DenseView> bias(int64_t out) const {
    const Tensor* tensor = find(".bias");
    if (tensor == nullptr) return std::nullopt;
    const auto type = dense_type(tensor->dtype);
    if (!type || tensor->shape != std::vector{out})
      bad_tensor(*tensor, fmt::format("BF16, F16 or F32 [{}]", out));
    return DenseView{*type, tensor->data, 1, out, tensor->bytes, {}};
  }

  /// Refuses tensors beside the weight that nothing here reads: they would change what the layer computes.
  void require_all_known() const {
    constexpr std::array<std::string_view, 6> kKnown = {".weight",      ".weight_scale", ".weight_scale_2",
                                                        ".input_scale", ".scale",        ".bias"};
    const auto& tensors = checkpoint_.tensors();
    const std::string prefix = name_ + ".";
    for (auto it = tensors.lower_bound(prefix); it != tensors.end() && it->first.starts_with(prefix); ++it) {
      const std::string_view suffix = std::string_view(it->first).substr(name_.size());
      if (std::find(kKnown.begin(), kKnown.end(), suffix) == kKnown.end()) {
        fail(ErrorCode::kUnsupported,
             "{}: tensor '{}': expected none but {}, found {}, which this version does not read",
             it->second->file, it->first, fmt::join(kKnown, ", "), it->second->describe());
      }
    }
  }

  std::optional<float> input_scale() const {
    const Tensor* tensor = find(".input_scale");
    return tensor ? std::optional(scalar(*tensor)) : std::nullopt;
  }

 private:
  const Tensor* find(const char* suffix) const { return checkpoint_.find(name_ + suffix); }

  const Tensor& required(const char* suffix) const {
    if (const Tensor* tensor = find(suffix)) return *tensor;
    const bool packed = find(".weight_packed") != nullptr;
    fail(packed ? ErrorCode::kUnsupported : ErrorCode::kBadFile, "{}: expected a tensor '{}{}', found none{}",
         checkpoint_.path().string(), name_, suffix,
         packed ? "; 'weight_packed' beside it is compressed-tensors, which this version does not read" : "");
  }

  static float scalar(const Tensor& tensor) {
    if (tensor.dtype != DType::kF32 || tensor.elements() != 1) bad_tensor(tensor, "one F32 number");
    float value = 0.0f;
    std::memcpy(&value, tensor.data, sizeof(value));  // may be unaligned
    return value;
  }

  /// The scale tensor `suffix`, checked against [rows, cols] and `type`.
  const Tensor& scales(const char* suffix, DType type, int64_t rows, int64_t cols) const {
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

  BlockScaledView block_scaled(const Tensor& weight, QuantFormat format, const char* suffix,
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

  WeightView nvfp4(const Tensor& weight, std::set<std::string>& schemes) const {
    schemes.insert("nvfp4");
    BlockScaledView view = block_scaled(weight, QuantFormat::kNvfp4, ".weight_scale", DType::kF8E4m3);
    const Tensor& global = required(".weight_scale_2");
    view.global.value = scalar(global);
    if (!std::isfinite(view.global.value) || view.global.value < 0.0f) {
      fail(ErrorCode::kBadFile, "{}: tensor '{}': expected a finite global scale from 0, found {}",
           global.file, global.name, view.global.value);
    }
    return view;
  }

  WeightView mxfp4(const Tensor& weight, std::set<std::string>& schemes) const {
    schemes.insert("mxfp4");
    const BlockScaledView view = block_scaled(weight, QuantFormat::kMxfp4, ".scale", DType::kF8E8m0);
    const int64_t count = view.rows * view.blocks_per_row();
    if (const void* nan = std::memchr(view.scales, kE8m0NanCode, static_cast<size_t>(count))) {
      const int64_t at = static_cast<const uint8_t*>(nan) - view.scales;
      const Tensor& scale = required(".scale");
      fail(ErrorCode::kBadFile,
           "{}: tensor '{}': expected powers of two, found 0xFF (NaN) at row {}, block {}", scale.file,
           scale.name, at / view.blocks_per_row(), at % view.blocks_per_row());
    }
    return view;
  }

  const Checkpoint& checkpoint_;
  std::string name_;
};

/// One expert's slice of a fused tensor (E, rows, cols): rows [first, first + count).
DenseView fused_slice(const Tensor& tensor, int64_t expert, int64_t first, int64_t count) {
  const ElementType type = *dense_type(tensor.dtype);
  const int64_t row_bytes = tensor.shape[2] * bits_of(tensor.dtype) / 8;
  return {type,      tensor.data + (expert * tensor.shape[1] + first) * row_bytes,
          count,     tensor.shape[2],
          row_bytes, {}};
}

const Tensor& fused_tensor(const Checkpoint& checkpoint, const std::string& name) {
  const Tensor* tensor = checkpoint.find(name);
  if (tensor == nullptr) {
    fail(ErrorCode::kBadFile, "{}: expected a tensor '{}' beside the fused gate_up_proj, found none",
         checkpoint.path().string(), name);
  }
  if (!dense_type(tensor->dtype) || tensor->shape.size() != 3 || tensor->elements() == 0) {
    bad_tensor(*tensor, "BF16, F16 or F32 (experts, out, in)");
  }
  return *tensor;
}

/// Builds the layer from either kind of naming.
class LayerLoader {
 public:
  LayerLoader(const Checkpoint& checkpoint, int64_t layer, const std::vector<int64_t>& wanted)
      : checkpoint_(checkpoint), layer_number_(layer), wanted_(wanted) {}

  ExpertLayer load() {
    for (const Naming& naming : kNamings) {
      const std::string prefix = experts_prefix(naming, layer_number_);
      if (checkpoint_.find(prefix + "gate_up_proj")) return finish(load_fused(prefix));
      require_readable(prefix);
      const std::vector<int64_t> ids = expert_ids(checkpoint_, prefix);
      if (!ids.empty()) return finish(load_separate(naming, prefix, ids));
    }
    const std::vector<int64_t> others = layers_with_experts(checkpoint_);
    fail(ErrorCode::kNotFound,
         "{}: layer {}: expected expert tensors such as '{}0.{}.weight' or '{}0.{}.weight', found {}",
         checkpoint_.path().string(), layer_number_, experts_prefix(kNamings[0], layer_number_),
         kNamings[0].gate, experts_prefix(kNamings[2], layer_number_), kNamings[2].gate,
         others.empty() ? "no experts in any layer"
                        : fmt::format("experts in layers {}", fmt::join(others, ", ")));
  }

 private:
  /// Other layouts under the same prefix are named, not overlooked.
  void require_readable(const std::string& prefix) const {
    constexpr std::array<std::string_view, 2> kFusedNames = {"gate_up_proj", "down_proj"};
    for (const std::string_view fused : kFusedNames) {
      const auto it = checkpoint_.tensors().lower_bound(fmt::format("{}{}", prefix, fused));
      if (it != checkpoint_.tensors().end() && it->first.starts_with(fmt::format("{}{}", prefix, fused))) {
        fail(ErrorCode::kUnsupported,
             "{}: tensor '{}': expected experts one by one ('{}0...') or fused as '{}gate_up_proj', found "
             "{}, a layout that this version does not read",
             it->second->file, it->first, prefix, prefix, it->second->describe());
      }
    }
  }

  ExpertLayer load_separate(const Naming& naming, const std::string& prefix,
                            const std::vector<int64_t>& ids) {
    const int64_t count = static_cast<int64_t>(ids.size());
    if (ids.back() != count - 1) {
      int64_t first_missing = 0;
      while (ids[static_cast<size_t>(first_missing)] == first_missing) ++first_missing;
      fail(ErrorCode::kBadFile,
           "{}: layer {}: expected experts 0 to {}, found {} of them: expert {} ('{}{}') is missing; is a "
           "shard?",
           checkpoint_.path().string(), layer_number_, ids.back(), count, first_missing, prefix,
           first_missing);
    }
    ExpertLayer layer;
    layer.naming = fmt::format("{}E.{{{},{},{}}}", prefix, naming.gate, naming.up, naming.down);
    select(layer, count);
    for (const int64_t id : layer.expert_ids) {
      Expert expert;
      expert.name = fmt::format("{}{}", prefix, id);
      const auto reader = [&](std::string_view which) {
        return LinearReader(checkpoint_, fmt::format("{}.{}", expert.name, which));
      };
      const LinearReader gate = reader(naming.gate), up = reader(naming.up), down = reader(naming.down);
      expert.gate = gate.weight(schemes_);
      expert.up = up.weight(schemes_);
      expert.down = down.weight(schemes_);
      expert.gate_bias = gate.bias(rows_of(expert.gate));
      expert.up_bias = up.bias(rows_of(expert.up));
      expert.down_bias = down.bias(rows_of(expert.down));
      for (const LinearReader* linear : {&gate, &up, &down}) linear->require_all_known();
      expert.gate_input_scale = gate.input_scale();
      expert.up_input_scale = up.input_scale();
      expert.down_input_scale = down.input_scale();
      layer.weights.experts.push_back(std::move(expert));
    }
    return layer;
  }

  ExpertLayer load_fused(const std::string& prefix) {
    const Tensor& gate_up = fused_tensor(checkpoint_, prefix + "gate_up_proj");
    const Tensor& down = fused_tensor(checkpoint_, prefix + "down_proj");
    if (gate_up.shape[1] % 2 != 0) bad_tensor(gate_up, "an even number of rows: gate, then up");
    const int64_t count = gate_up.shape[0], half = gate_up.shape[1] / 2, hidden = gate_up.shape[2];
    if (count > kMaxExperts) bad_tensor(gate_up, fmt::format("at most {} experts", kMaxExperts));
    if (down.shape != std::vector{count, hidden, half}) {
      bad_tensor(down,
                 fmt::format("[{}, {}, {}] beside gate_up_proj {}", count, hidden, half, gate_up.describe()),
                 "; transposed fused exports are not read");
    }
    require_fused_known(prefix);
    ExpertLayer layer;
    layer.naming = prefix + "{gate_up_proj,down_proj}";
    schemes_.insert(std::string(format_name(fused_slice(gate_up, 0, 0, half))) + " (fused)");
    select(layer, count);
    for (const int64_t id : layer.expert_ids) {
      Expert expert;
      expert.name = fmt::format("{}{}", prefix, id);
      expert.gate = fused_slice(gate_up, id, 0, half);
      expert.up = fused_slice(gate_up, id, half, half);
      expert.down = fused_slice(down, id, 0, hidden);
      layer.weights.experts.push_back(std::move(expert));
    }
    return layer;
  }

  /// Fused tensors that nothing here reads would change what the layer computes.
  void require_fused_known(const std::string& prefix) const {
    const auto& tensors = checkpoint_.tensors();
    for (auto it = tensors.lower_bound(prefix); it != tensors.end() && it->first.starts_with(prefix); ++it) {
      const std::string_view rest = std::string_view(it->first).substr(prefix.size());
      if (rest != "gate_up_proj" && rest != "down_proj") {
        fail(ErrorCode::kUnsupported,
             "{}: tensor '{}': expected gate_up_proj and down_proj alone under '{}', found {} too, which "
             "this version does not read",
             it->second->file, it->first, prefix, it->second->describe());
      }
    }
  }

  /// Which of `count` experts to read.
  void select(ExpertLayer& layer, int64_t count) const {
    layer.experts_in_checkpoint = count;
    layer.expert_ids = wanted_;
    for (int64_t id = 0; wanted_.empty() && id < count; ++id) layer.expert_ids.push_back(id);
    for (const int64_t id : layer.expert_ids) {
      if (id < 0 || id >= count) {
        fail(ErrorCode::kInvalidArgument, "{}: layer {}: expert {}: expected 0 to {}",
             checkpoint_.path().string(), layer_number_, id, count - 1);
      }
    }
  }

  ExpertLayer finish(ExpertLayer layer) {
    layer.weights.intermediate = rows_of(layer.weights.experts.front().gate);
    layer.weights.hidden = cols_of(layer.weights.experts.front().gate);
    try {
      validate(layer.weights);
    } catch (const Error& error) {
      fail(ErrorCode::kBadFile, "{}: {}", checkpoint_.path().string(), error.what());
    }
    layer.scheme =
        schemes_.size() == 1 ? *schemes_.begin() : fmt::format("mixed: {}", fmt::join(schemes_, ", "));
    compare_with_config(layer);
    return layer;
  }

  void compare_with_config(ExpertLayer& layer) const {
    const ModelConfig& config = checkpoint_.config();
    const auto compare = [&](const char* what, std::optional<int64_t> claimed, int64_t found) {
      if (claimed && *claimed != found) {
        layer.notes.push_back(fmt::format("config.json says {} {}, the tensors say {}: the tensors are used",
                                          what, *claimed, found));
      }
    };
    compare("hidden size", config.hidden, layer.weights.hidden);
    compare("expert intermediate size", config.intermediate, layer.weights.intermediate);
    compare("experts", config.experts, layer.experts_in_checkpoint);
    const bool claims_nvfp4 = config.quantization.find("NVFP4") != std::string::npos;
    const bool is_nvfp4 = layer.scheme.find("nvfp4") != std::string::npos;
    if (claims_nvfp4 != is_nvfp4) {
      layer.notes.push_back(fmt::format("the config's quantization is '{}', the expert tensors are {}",
                                        config.quantization.empty() ? "none" : config.quantization,
                                        layer.scheme));
    }
  }

  const Checkpoint& checkpoint_;
  int64_t layer_number_;
  const std::vector<int64_t>& wanted_;
  std::set<std::string> schemes_;
};

}  // namespace

ExpertLayer load_experts(std::shared_ptr<const Checkpoint> checkpoint, int64_t layer,
                         const std::vector<int64_t>& experts) {
  ExpertLayer loaded = LayerLoader(*checkpoint, layer, experts).load();
  loaded.weights.storage = std::move(checkpoint);
  return loaded;
}

std::vector<int64_t> layers_with_experts(const Checkpoint& checkpoint) {
  std::set<int64_t> layers;
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    for (const Naming& naming : kNamings) {
      if (!name.starts_with(naming.before_layer)) continue;
      const std::string_view rest = std::string_view(name).substr(naming.before_layer.size());
      const auto layer = leading_number(rest, '.');
      if (layer && rest.substr(rest.find('.')).starts_with(naming.before_experts)) layers.insert(*layer);
    }
  }
  return {layers.begin(), layers.end()};
}

}  // namespace fourfold
