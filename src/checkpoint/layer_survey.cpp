#include "checkpoint/layer_survey.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <map>
#include <utility>

#include "base/fail.h"
#include "checkpoint/finding_text.h"

namespace fourfold {
namespace {

constexpr std::array<std::string_view, 2> kWeights = {".weight", ".weight_packed"};
constexpr std::array<std::string_view, 3> kScales = {".weight_scale", ".scale", ".weight_scale_inv"};
constexpr std::array<std::string_view, 2> kGlobals = {".weight_scale_2", ".weight_global_scale"};
constexpr std::array<std::string_view, 2> kInputScales = {".input_scale", ".input_global_scale"};

const uint8_t* bytes_of(const Tensor& tensor) {
  return reinterpret_cast<const uint8_t*>(tensor.data);
}

std::vector<float> floats_of(const Tensor& tensor) {
  std::vector<float> values(static_cast<size_t>(tensor.elements()));
  std::memcpy(values.data(), tensor.data, values.size() * sizeof(float));
  return values;
}

/// The value that most of `votes` name; 0 for none.
int64_t most_frequent(const std::map<int64_t, int64_t>& votes) {
  const auto it = std::max_element(votes.begin(), votes.end(),
                                   [](const auto& a, const auto& b) { return a.second < b.second; });
  return it == votes.end() ? 0 : it->first;
}

class LayerSurveyor {
 public:
  LayerSurveyor(const Checkpoint& checkpoint, int64_t layer, std::optional<WeightScheme> scheme)
      : checkpoint_(checkpoint), scheme_(scheme) {
    survey_.layer = layer;
    survey_.block = find_block(checkpoint, layer);
  }

  LayerSurvey run() {
    const std::string& prefix = survey_.block.prefix;
    survey_.lost = lost_under(prefix);
    list_unknown_children();
    const std::string experts = prefix + std::string(kExperts);
    survey_.is_fused =
        checkpoint_.find(experts + "gate_up_proj") || checkpoint_.find(experts + "gate_up_proj_blocks");
    survey_.is_fused ? survey_fused(experts) : survey_separate(experts);
    survey_shared();
    return std::move(survey_);
  }

 private:
  // ---- names ----

  int64_t lost_under(const std::string& prefix) const {
    int64_t count = 0;
    for (auto it = checkpoint_.lost().lower_bound(prefix);
         it != checkpoint_.lost().end() && it->starts_with(prefix); ++it) {
      ++count;
    }
    return count;
  }

  void add(FindingKind kind, const std::string& tensor, std::string found, std::string remedy) {
    const Tensor* known = checkpoint_.find(tensor);
    survey_.findings.push_back(
        {kind, survey_.layer, tensor, known ? known->file : "", std::move(found), std::move(remedy)});
  }

  void add_unknown(const Tensor& tensor) {
    add(FindingKind::kUnknownTensor, tensor.name,
        fmt::format("{}, which nothing reads: the layer would be computed without it", tensor.describe()),
        "use a version that reads it; if it is a leftover of a conversion, remove it");
  }

  void list_unknown_children() {
    for (const Tensor* tensor : tensors_under(checkpoint_, survey_.block.prefix)) {
      const std::string_view child = std::string_view(tensor->name).substr(survey_.block.prefix.size());
      const auto starts = [&](std::string_view known) { return child.starts_with(known); };
      if (!starts(kExperts) && !starts(kSharedGate) &&
          std::none_of(kRouters.begin(), kRouters.end(), starts) &&
          std::none_of(kSharedExperts.begin(), kSharedExperts.end(), starts)) {
        add_unknown(*tensor);
      }
    }
  }

  template <size_t kCount>
  const Tensor* first_of(const std::string& name,
                         const std::array<std::string_view, kCount>& suffixes) const {
    for (const std::string_view suffix : suffixes) {
      if (const Tensor* tensor = checkpoint_.find(name + std::string(suffix))) return tensor;
    }
    return nullptr;
  }

  // ---- expert by expert ----

  std::set<int64_t> expert_ids(const std::string& prefix) {
    std::set<int64_t> ids;
    const auto number = [&](std::string_view name) {
      return leading_number(name.substr(prefix.size()), '.');
    };
    for (const Tensor* tensor : tensors_under(checkpoint_, prefix)) {
      const auto id = number(tensor->name);
      id ? static_cast<void>(ids.insert(*id)) : add_unknown(*tensor);
    }
    for (auto it = checkpoint_.lost().lower_bound(prefix);
         it != checkpoint_.lost().end() && it->starts_with(prefix); ++it) {
      if (const auto id = number(*it)) ids.insert(*id);
    }
    return ids;
  }

  void survey_separate(const std::string& prefix) {
    const std::set<int64_t> ids = expert_ids(prefix);
    if (ids.empty()) return;
    constexpr int64_t kMostGaps = 1024;  // a hostile number must not make us name a billion
    survey_.experts = *ids.rbegin() + 1;
    const auto gaps = survey_.experts - static_cast<int64_t>(ids.size());
    for (int64_t id = 0; gaps <= kMostGaps && id < survey_.experts; ++id) {
      if (ids.contains(id)) continue;
      add(FindingKind::kMissingTensor, fmt::format("{}{}", prefix, id),
          fmt::format("no tensor of this expert, and tensors of experts up to {}", survey_.experts - 1),
          "is a shard missing, or the index of another model? download or convert again");
    }
    if (gaps > kMostGaps) {
      add(FindingKind::kMissingTensor, fmt::format("{}{}", prefix, survey_.experts - 1),
          fmt::format("{} of the experts below this one are missing", gaps), "is this number an expert's?");
    }
    const BlockNames& names = survey_.block.names;
    for (const int64_t id : ids) {
      survey_.has_gates |= LinearReader(checkpoint_, fmt::format("{}{}.{}", prefix, id, names.gate)).exists();
    }
    for (const int64_t id : ids) read_expert(fmt::format("{}{}", prefix, id), id, false);
    vote_shape();
    survey_.naming = fmt::format("{}E.{}", prefix, linear_names());
  }

  std::string linear_names() const {
    const BlockNames& names = survey_.block.names;
    return survey_.has_gates ? fmt::format("{{{},{},{}}}", names.gate, names.up, names.down)
                             : fmt::format("{{{},{}}}", names.up, names.down);
  }

  void read_expert(const std::string& name, int64_t id, bool is_shared) {
    const BlockNames& names = survey_.block.names;
    const std::string before = is_shared ? "shared " : "";
    for (const Tensor* tensor : tensors_under(checkpoint_, name + ".")) {
      const std::string_view rest = std::string_view(tensor->name).substr(name.size() + 1);
      const std::string_view linear = rest.substr(0, rest.find('.'));
      if (linear != names.gate && linear != names.up && linear != names.down) add_unknown(*tensor);
    }
    for (const auto& [role, linear] :
         {std::pair("gate", names.gate), std::pair("up", names.up), std::pair("down", names.down)}) {
      if (linear == names.gate && !survey_.has_gates) continue;
      SurveyedMatrix matrix;
      matrix.role = before + role;
      matrix.name = fmt::format("{}.{}", name, linear);
      matrix.expert = id;
      matrix.is_shared = is_shared;
      read_linear(matrix);
      survey_.matrices.push_back(std::move(matrix));
    }
  }

  void read_linear(SurveyedMatrix& matrix) {
    if (lost_under(matrix.name + ".") > 0) return;  // the damaged file is a finding of its own
    const LinearReader reader(checkpoint_, matrix.name, scheme_);
    if (!reader.exists()) {
      add(FindingKind::kMissingTensor, matrix.name + ".weight", "none, and its sibling matrices are there",
          "is a shard missing? download or convert again");
      return;
    }
    for (const Tensor* tensor : tensors_under(checkpoint_, matrix.name + ".")) matrix.bytes += tensor->bytes;
    matrix.weight = first_of(matrix.name, kWeights);
    matrix.scales = first_of(matrix.name, kScales);
    matrix.global = first_of(matrix.name, kGlobals);
    matrix.input_scale = first_of(matrix.name, kInputScales);
    const size_t before = survey_.findings.size();
    check_scalars_of(matrix);
    attempt(matrix, before, FindingKind::kBadTensor, [&] {
      std::set<std::string> schemes;
      const WeightView view = reader.weight(schemes);
      static_cast<void>(reader.bias(rows_of(view)));  // for what it throws
      matrix.rows = rows_of(view);
      matrix.cols = cols_of(view);
      matrix.slices.push_back(slice_of(view));
      if (const auto* blocks = std::get_if<BlockScaledView>(&view))
        matrix.globals = {blocks->global.multiplier()};
    });
    attempt(matrix, before, FindingKind::kUnknownTensor, [&] { reader.require_all_known(); });
    attempt(matrix, before, FindingKind::kBadTensor, [&] {
      if (const auto scale = reader.input_scale()) matrix.input_scales = {*scale};
    });
  }

  static MatrixSlice slice_of(const WeightView& view) {
    MatrixSlice slice;
    slice.weight = view;
    if (const auto* blocks = std::get_if<BlockScaledView>(&view)) {
      slice.scales = {blocks->scales, blocks->rows, blocks->blocks_per_row(), blocks->scale_stride};
      slice.scale_type = traits_of(blocks->format).scale_type;
    }
    return slice;
  }

  /// What readers refuse by its value is told apart from what they refuse by its form.
  void check_scalars_of(const SurveyedMatrix& matrix) {
    if (matrix.global != nullptr) check_scales(*matrix.global, "global scale");
    if (matrix.scales == nullptr) return;
    if (matrix.scales->dtype == DType::kF32) check_scales(*matrix.scales, "tile scale");
    if (matrix.scales->dtype == DType::kF8E8m0) {
      const uint8_t* bytes = bytes_of(*matrix.scales);
      const auto count = std::count(bytes, bytes + matrix.scales->bytes, kE8m0NanCode);
      if (count == 0) return;
      const auto first = std::find(bytes, bytes + matrix.scales->bytes, kE8m0NanCode) - bytes;
      const int64_t cols =
          std::max<int64_t>(1, matrix.scales->shape.empty() ? 1 : matrix.scales->shape.back());
      add(FindingKind::kNanScale, matrix.scales->name,
          nan_scales_text(count, matrix.scales->bytes, first / cols, first % cols), kConvertAgain);
    }
  }

  /// One finding a tensor of float32 scales, naming the first bad one.
  void check_scales(const Tensor& tensor, const char* what) {
    if (tensor.dtype != DType::kF32) return;
    const std::vector<float> values = floats_of(tensor);
    const auto bad = [&](float value) {
      const bool may_be_zero = std::string_view(what) == "tile scale";  // a tile of zeros
      return !std::isfinite(value) || value < 0.0f || (value == 0.0f && !may_be_zero);
    };
    const auto first = std::find_if(values.begin(), values.end(), bad);
    if (first == values.end()) return;
    const std::string where =
        values.size() == 1 ? "" : fmt::format(" at index {} of {}", first - values.begin(), values.size());
    add(FindingKind::kBadScale, tensor.name,
        fmt::format("{} {}{}, expected a positive finite number", what, *first, where),
        "convert the model again; with 0, inf or NaN here every output of the expert is");
  }

  /// Runs `read`. Its Error becomes a finding, unless one since `before` explains it.
  void attempt(const SurveyedMatrix& matrix, size_t before, FindingKind kind,
               const std::function<void()>& read) {
    try {
      read();
    } catch (const Error& error) {
      if (survey_.findings.size() > before) return;
      Finding finding = finding_of(error, checkpoint_, survey_.layer, kind);
      const std::string missing = missing_tensor(matrix, scheme_);
      if (!missing.empty()) {
        finding.kind = FindingKind::kMissingTensor;
        finding.tensor = missing;
        finding.file.clear();
      } else if (finding.tensor.empty() && matrix.weight != nullptr) {
        finding.tensor = matrix.weight->name;
        finding.file = matrix.weight->file;
      }
      survey_.findings.push_back(std::move(finding));
    }
  }

  /// The tensor that a 4-bit matrix lacks; empty where it is something else that its reader refuses.
  static std::string missing_tensor(const SurveyedMatrix& matrix, std::optional<WeightScheme> scheme) {
    if (matrix.weight == nullptr) return matrix.name + ".weight";
    const bool is_fp4 = matrix.weight->dtype == DType::kU8 || matrix.weight->dtype == DType::kI8;
    if (is_fp4 && matrix.scales == nullptr) return matrix.name + ".weight_scale";
    const bool has_nvfp4_scales = is_fp4 && matrix.scales->dtype == DType::kF8E4m3;
    const bool is_nvfp4 = is_fp4 && scheme ? scheme != WeightScheme::kMxfp4 : has_nvfp4_scales;
    return is_nvfp4 && matrix.global == nullptr ? matrix.name + ".weight_scale_2" : "";
  }

  /// Hidden and intermediate size as most matrices have them; others are findings, and not counted.
  void vote_shape() {
    std::map<int64_t, int64_t> hidden, intermediate;
    for (const SurveyedMatrix& matrix : survey_.matrices) {
      if (matrix.slices.empty() || matrix.is_shared) continue;
      const bool is_down = matrix.role == "down";
      ++hidden[is_down ? matrix.rows : matrix.cols];
      ++intermediate[is_down ? matrix.cols : matrix.rows];
    }
    survey_.hidden = most_frequent(hidden);
    survey_.intermediate = most_frequent(intermediate);
    for (SurveyedMatrix& matrix : survey_.matrices) require_shape(matrix, survey_.intermediate);
  }

  void require_shape(SurveyedMatrix& matrix, int64_t intermediate) {
    if (matrix.slices.empty()) return;
    const bool is_down = matrix.role.ends_with("down");
    const int64_t rows = is_down ? survey_.hidden : intermediate,
                  cols = is_down ? intermediate : survey_.hidden;
    if (matrix.rows == rows && matrix.cols == cols) return;
    add(FindingKind::kBadTensor, matrix.weight->name,
        fmt::format("a matrix {}, expected {} as the layer's others say",
                    shape_text(matrix.rows, matrix.cols), shape_text(rows, cols)),
        "is it of another model? convert again");
    matrix.slices.clear();
  }

  // ---- fused ----

  void survey_fused(const std::string& prefix) {
    survey_.has_gates = true;
    survey_.naming = prefix + "{gate_up_proj,down_proj}";
    const auto gate_up = open_fused(prefix + "gate_up_proj"), down = open_fused(prefix + "down_proj");
    if (gate_up) survey_.experts = gate_up->experts();
    if (!gate_up || !down) return;
    const auto fits = [&](bool transposed) {
      const auto first = gate_up->shape(transposed), second = down->shape(transposed);
      return first && second && first->first == 2 * second->second && first->second == second->first;
    };
    survey_.is_transposed = !fits(false);
    if (gate_up->experts() != down->experts() || (survey_.is_transposed && !fits(true))) {
      add(FindingKind::kBadTensor, down->tensor().name,
          fmt::format("{} beside {}, expected [E, H, I] beside [E, 2I, H], or both transposed",
                      down->tensor().describe(), gate_up->tensor().describe()),
          "is one of them of another model? convert again");
      return;
    }
    const auto shape = *down->shape(survey_.is_transposed);
    survey_.hidden = shape.first;
    survey_.intermediate = shape.second;
    add_fused("gate_up", prefix + "gate_up_proj", *gate_up);
    add_fused("down", prefix + "down_proj", *down);
  }

  std::optional<FusedReader> open_fused(const std::string& name) {
    if (lost_under(name) > 0) return std::nullopt;
    try {
      return FusedReader(checkpoint_, name, scheme_);
    } catch (const Error& error) {
      Finding finding = finding_of(error, checkpoint_, survey_.layer, FindingKind::kBadTensor);
      if (finding.tensor.empty()) {
        finding.kind = FindingKind::kMissingTensor;
        finding.tensor = checkpoint_.find(name)               ? name + "_weight_scale"
                         : checkpoint_.find(name + "_blocks") ? name + "_scales"
                                                              : name;
      }
      survey_.findings.push_back(std::move(finding));
      return std::nullopt;
    }
  }

  void add_fused(const std::string& role, const std::string& name, const FusedReader& reader) {
    SurveyedMatrix matrix;
    matrix.role = role;
    matrix.name = name;
    matrix.weight = &reader.tensor();
    const bool has_blocks = matrix.weight->name.ends_with("_blocks");
    matrix.scales = checkpoint_.find(name + (has_blocks ? "_scales" : "_weight_scale"));
    matrix.global = checkpoint_.find(name + "_weight_scale_2");
    matrix.input_scale = checkpoint_.find(name + "_input_scale");
    std::tie(matrix.rows, matrix.cols) = *reader.shape(survey_.is_transposed);
    for (const std::string& tensor : reader.tensor_names()) {
      if (const Tensor* known = checkpoint_.find(tensor)) matrix.bytes += known->bytes;
    }
    if (dense_type(matrix.weight->dtype)) {
      add_dense_slices(matrix);
    } else if (has_blocks || is_sound_packed(matrix, reader.format())) {
      add_4bit_slices(matrix, reader.format());
    }
    if (matrix.input_scale != nullptr && is_one_or_each(*matrix.input_scale))
      matrix.input_scales = multipliers_of(*matrix.input_scale);
    survey_.matrices.push_back(std::move(matrix));
  }

  void add_dense_slices(SurveyedMatrix& matrix) const {
    const Tensor& weight = *matrix.weight;
    const int64_t rows = weight.shape[1], cols = weight.shape[2],
                  row_bytes = cols * bits_of(weight.dtype) / 8;
    for (int64_t expert = 0; expert < weight.shape[0]; ++expert) {
      matrix.slices.push_back(slice_of(DenseView{
          *dense_type(weight.dtype), weight.data + expert * rows * row_bytes, rows, cols, row_bytes, {}}));
    }
  }

  /// Whether scales and global scale have the form that goes with the codes; findings where not.
  bool is_sound_packed(SurveyedMatrix& matrix, QuantFormat format) {
    const Tensor& weight = *matrix.weight;
    const QuantFormatTraits traits = traits_of(format);
    const bool transposed = survey_.is_transposed, is_nvfp4 = format == QuantFormat::kNvfp4;
    const int64_t bytes = traits.block_size / 2;  // of codes, with one scale
    const std::vector<int64_t> expected =
        transposed ? std::vector{weight.shape[0], weight.shape[1] / bytes, weight.shape[2]}
                   : std::vector{weight.shape[0], weight.shape[1], weight.shape[2] / bytes};
    const ScaleType type = is_nvfp4 ? ScaleType::kE4m3 : ScaleType::kE8m0;
    if (!is_scale_type(matrix.scales->dtype, type, scheme_.has_value()) || matrix.scales->shape != expected ||
        matrix.cols % traits.block_size != 0) {
      add(FindingKind::kBadTensor, matrix.scales->name,
          fmt::format("{}, expected {} [{}]", matrix.scales->describe(), is_nvfp4 ? "F8_E4M3" : "F8_E8M0",
                      fmt::join(expected, ", ")),
          kConvertAgain);
      return false;
    }
    if (!is_nvfp4) return true;
    if (matrix.global == nullptr) {
      add(FindingKind::kMissingTensor, matrix.name + "_weight_scale_2", "none beside NVFP4 codes",
          kConvertAgain);
      return false;
    }
    if (!is_one_or_each(*matrix.global)) return false;
    check_scales(*matrix.global, "global scale");
    matrix.globals = multipliers_of(*matrix.global);
    return true;
  }

  /// Scalars of fused tensors multiply, unless the caller says otherwise.
  std::vector<float> multipliers_of(const Tensor& tensor) const {
    std::vector<float> values = floats_of(tensor);
    if (scheme_ == WeightScheme::kCompressedTensors) {
      for (float& value : values) value = 1.0f / value;
    }
    return values;
  }

  bool is_one_or_each(const Tensor& tensor) {
    const int64_t elements = tensor.elements();
    if (tensor.dtype == DType::kF32 && (elements == 1 || elements == survey_.experts)) return true;
    add(FindingKind::kBadTensor, tensor.name,
        fmt::format("{}, expected one F32 number, or {}", tensor.describe(), survey_.experts), kConvertAgain);
    return false;
  }

  void add_4bit_slices(SurveyedMatrix& matrix, QuantFormat format) const {
    const QuantFormatTraits traits = traits_of(format);
    const int64_t experts = matrix.weight->shape[0], code_bytes = matrix.rows * matrix.cols / 2;
    const int64_t blocks = matrix.cols / traits.block_size, scale_bytes = matrix.rows * blocks;
    for (int64_t expert = 0; expert < experts; ++expert) {
      const uint8_t* codes = bytes_of(*matrix.weight) + expert * code_bytes;
      const uint8_t* scales = bytes_of(*matrix.scales) + expert * scale_bytes;
      MatrixSlice slice = slice_of(BlockScaledView{format,
                                                   matrix.rows,
                                                   matrix.cols,
                                                   {codes, matrix.rows, matrix.cols / 2},
                                                   scales,
                                                   blocks,
                                                   ScaleLayout::kRowMajor,
                                                   {}});
      slice.is_transposed = survey_.is_transposed;
      if (slice.is_transposed) {
        slice.packed = {codes, matrix.cols / 2, matrix.rows};
        slice.scales = {scales, blocks, matrix.rows};
      }
      matrix.slices.push_back(slice);
    }
  }

  // ---- the shared expert ----

  void survey_shared() {
    for (const std::string_view child : kSharedExperts) {
      const std::string name = survey_.block.prefix + std::string(child.substr(0, child.size() - 1));
      if (tensors_under(checkpoint_, name + ".").empty() && lost_under(name + ".") == 0) continue;
      survey_.has_shared = true;
      const size_t first = survey_.matrices.size();
      read_expert(name, -1, true);
      std::map<int64_t, int64_t> sizes;
      for (size_t i = first; i < survey_.matrices.size(); ++i) {
        const SurveyedMatrix& matrix = survey_.matrices[i];
        if (!matrix.slices.empty()) ++sizes[matrix.role == "shared down" ? matrix.cols : matrix.rows];
      }
      survey_.shared_intermediate = most_frequent(sizes);
      for (size_t i = first; i < survey_.matrices.size(); ++i) {
        require_shape(survey_.matrices[i], survey_.shared_intermediate);
      }
      survey_.shared_naming = fmt::format("{}.{}", name, linear_names());
    }
    const std::string gate = survey_.block.prefix + std::string(kSharedGate) + "weight";
    survey_.shared_gate = checkpoint_.find(gate) != nullptr || checkpoint_.lost().contains(gate);
  }

  const Checkpoint& checkpoint_;
  std::optional<WeightScheme> scheme_;
  LayerSurvey survey_;
};

}  // namespace

bool stays_fused(const Checkpoint& checkpoint, const LayerSurvey& survey) {
  const std::string prefix = survey.block.prefix + std::string(kExperts);
  return survey.is_fused &&
         (survey.is_transposed || checkpoint.find(prefix + "gate_up_proj_bias") != nullptr ||
          checkpoint.find(prefix + "down_proj_bias") != nullptr ||
          checkpoint.find(prefix + "gate_up_proj_blocks") != nullptr ||
          fused_gate_up_order(checkpoint.config()) == GateUpOrder::kInterleaved);
}

LayerSurvey survey_layer(const Checkpoint& checkpoint, int64_t layer, std::optional<WeightScheme> scheme) {
  return LayerSurveyor(checkpoint, layer, scheme).run();
}

}  // namespace fourfold
