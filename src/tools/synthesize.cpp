#include "tools/synthesize.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>
#include <system_error>

#include "base/fail.h"
#include "base/files.h"
#include "checkpoint/shard_writer.h"
#include "fourfold/checkpoint.h"
#include "fourfold/model_family.h"
#include "tools/calibration.h"
#include "tools/input_routing.h"
#include "tools/layer_inputs.h"
#include "tools/layer_trace.h"
#include "tools/partial_directory.h"
#include "tools/random.h"
#include "tools/synthetic_layout.h"
#include "tools/synthetic_values.h"

namespace fourfold {
namespace {

/// Whether `directory` is a model that this command made: --force replaces nothing else.
bool is_synthetic(const std::filesystem::path& directory) {
  try {
    return read_file(directory / "config.json", 1 << 20).find("\"fourfold_synthetic\"") != std::string::npos;
  } catch (const Error&) {
    return false;
  }
}

/// Two at least, so that the index is exercised at every size.
constexpr ShardSizes kShards = {.bytes = int64_t{2} << 30, .fewest = 2};

void write_json(const std::filesystem::path& path, const nlohmann::ordered_json& json) {
  write_file(path, json.dump(2) + "\n");
}

std::vector<Bf16> to_bf16(const std::vector<float>& values) {
  std::vector<Bf16> rounded(values.size());
  std::transform(values.begin(), values.end(), rounded.begin(), encode_bf16);
  return rounded;
}

template <class T>
std::span<const std::byte> bytes_of(const std::vector<T>& values) {
  return std::as_bytes(std::span(values));
}
std::span<const std::byte> bytes_of(const float& value) {
  return std::as_bytes(std::span(&value, 1));
}

StoredAs stored_as(OriginalFormat format) {
  switch (format) {
    case OriginalFormat::kMxfp4:
      return StoredAs::kMxfp4;
    case OriginalFormat::kFp8:
      return StoredAs::kFp8;
    case OriginalFormat::kBf16:
      break;
  }
  return StoredAs::kBf16;
}

/// `matrix` [rows, cols] into `out` [cols, rows].
template <class T>
void put_transposed(const T* matrix, int64_t rows, int64_t cols, T* out) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) out[col * rows + row] = matrix[row * cols + col];
  }
}

/// Input scales of every expert [E], of the shared expert last.
struct InputScales {
  std::vector<float> x, intermediate;
};

class Synthesizer {
 public:
  explicit Synthesizer(const SynthesizeRequest& request)
      : request_(request), family_(*find_synthetic_family(request.family)), values_(request) {}

  SynthesizeResult run() {
    check_shape();
    check_target();
    const PartialDirectory partial(request_.directory);
    make_inputs_and_calibration();
    write_original(partial / "original");
    write_nvfp4(partial / "original", partial / "nvfp4");
    write_inputs(partial / "inputs.safetensors", inputs_);
    for (const char* name : {"original", "nvfp4", "inputs.safetensors"}) {
      partial.move_into_place(name, request_.directory);
    }
    return result_;
  }

 private:
  bool is_mxfp4() const { return request_.original == OriginalFormat::kMxfp4; }

  void check_shape() const {
    const auto require = [](bool good, const char* what, const std::string& expected, int64_t found) {
      if (!good) reject(fmt::format("--shape: {}", what), expected, found);
    };
    if (family_.is_fused && request_.original == OriginalFormat::kFp8) {
      reject(fmt::format("--original for {}", family_.name), "mxfp4 or bf16", "fp8");
    }
    const int64_t block = is_mxfp4() ? 32 : 16;
    const std::string multiple =
        fmt::format("a positive multiple of {} ({})", block, is_mxfp4() ? "MXFP4" : "NVFP4");
    const auto fits = [&](int64_t extent) {
      return extent > 0 && extent <= (1 << 20) && extent % block == 0;
    };
    require(request_.experts >= 1 && request_.experts <= 65536, "experts", "1 to 65536", request_.experts);
    require(fits(request_.hidden), "hidden", multiple, request_.hidden);
    require(fits(request_.intermediate), "intermediate", multiple, request_.intermediate);
    require(request_.top_k >= 1 && request_.top_k <= request_.experts, "top-k",
            fmt::format("1 to {}, the number of experts", request_.experts), request_.top_k);
    require(request_.layers >= 1, "layers", "at least 1", request_.layers);
  }

  void check_target() const {
    std::error_code error;
    std::filesystem::create_directories(request_.directory, error);
    if (error) fail(ErrorCode::kIo, "{}: can't create it: {}", request_.directory.string(), error.message());
    for (const char* name : {"original", "nvfp4", "inputs.safetensors"}) {
      const std::filesystem::path path = request_.directory / name;
      if (!std::filesystem::exists(path, error)) continue;
      if (!request_.force) reject(path.string(), "nothing of that name (--force replaces it)", "something");
      const bool is_model = std::string_view(name) != "inputs.safetensors";
      if (is_model ? !is_synthetic(path) : !std::filesystem::is_regular_file(path, error)) {
        reject(path.string(), "a model that this command made, for --force to replace", "something else");
      }
    }
    const auto space = std::filesystem::space(request_.directory, error);
    if (!error && static_cast<double>(space.available) < bytes_needed()) {
      fail(ErrorCode::kIo, "{}: expected {:.0f} MB of free disk, found {:.0f} MB",
           request_.directory.string(), bytes_needed() / 1e6, static_cast<double>(space.available) / 1e6);
    }
  }

  /// About; in double, where no shape overflows. Shared experts are at most twice an expert.
  double bytes_needed() const {
    const auto hidden = static_cast<double>(request_.hidden), tokens = static_cast<double>(request_.tokens);
    const auto inner = static_cast<double>(request_.intermediate);
    const auto layers = static_cast<double>(request_.layers), experts = static_cast<double>(request_.experts);
    const double original_bytes = is_mxfp4()                                  ? 17.0 / 32.0
                                  : request_.original == OriginalFormat::kFp8 ? 1.0
                                                                              : 2.0;
    const double values = layers * experts * 3.0 * hidden * inner;
    const double shared = request_.whole_family ? layers * 2.0 * 3.0 * hidden * inner * 4.0 : 0.0;
    const double routers = 2.0 * layers * experts * (hidden * 2.0 + 4.0);
    return values * (9.0 / 16.0 + original_bytes) + shared + routers + tokens * hidden * 2.0;
  }

  // ---- inputs ----

  /// Inputs for the user, and more of the same kind to calibrate on: 64 rows an expert, as far as 4096 rows
  /// go. Fewer leave scales that new tokens saturate. A whole family's tokens are routed by its own router,
  /// in layertest as in calibration; others at random, once and for all.
  void make_inputs_and_calibration() {
    const int64_t rows = std::min<int64_t>(64 * request_.experts, 4096);
    const int64_t tokens = std::max(request_.tokens, rows / request_.top_k);
    const bool outliers = request_.profile == WeightProfile::kRealistic;
    inputs_ = make_inputs(request_.tokens, request_.hidden, request_.seed, outliers);
    calibration_ =
        make_inputs(tokens, request_.hidden, request_.seed, outliers);  // starts with the same tokens
    if (!request_.whole_family) {
      route_at_random(inputs_, request_.experts, request_.top_k, request_.seed);
      route_at_random(calibration_, request_.experts, request_.top_k, request_.seed);
    } else if (family_.name == "deepseek-v4") {
      make_token_ids(inputs_);
      make_token_ids(calibration_);
    }
  }

  void make_token_ids(LayerInputs& inputs) const {
    for (int64_t token = 0; token < inputs.tokens; ++token) {
      Random random(request_.seed, Random::Purpose::kTokenId, static_cast<uint64_t>(token));
      inputs.token_ids.push_back(random.below(SyntheticLayout::kVocabulary));
    }
  }

  // ---- models ----

  void write_routers(ShardWriter& writer, const SyntheticLayout& layout) const {
    for (int64_t layer = 0; layer < request_.layers; ++layer) {
      const std::string name = layout.router(layer);
      writer.write(name + ".weight", bytes_of(to_bf16(values_.router_weight(layer))));
      if (layout.is_hashed(layer)) {
        writer.write(name + ".tid2eid", bytes_of(values_.hash_table(layer, SyntheticLayout::kVocabulary)));
      } else if (!family_.router_bias.empty()) {
        const std::vector<float> bias = values_.router_bias(layer);
        const std::string bias_name = name + std::string(family_.router_bias);
        family_.is_fused ? writer.write(bias_name, bytes_of(to_bf16(bias)))
                         : writer.write(bias_name, bytes_of(bias));
      }
      if (family_.shared_gate && layout.has_shared()) {
        writer.write(layout.block(layer) + "shared_expert_gate.weight",
                     bytes_of(to_bf16(values_.shared_gate(layer))));
      }
    }
  }

  void write_matrix(ShardWriter& writer, const std::string& name, StoredAs stored,
                    const DenseMatrix& weight) const {
    if (stored == StoredAs::kMxfp4) {
      const BlockScaledMatrix quantized = quantize_mxfp4(weight.view());
      writer.write(name + ".weight", bytes_of(quantized.codes));
      writer.write(name + ".scale", bytes_of(quantized.scales));
    } else if (stored == StoredAs::kFp8) {
      const Fp8Matrix quantized = quantize_fp8_tiles(weight.view(), family_.fp8_scales);
      writer.write(name + ".weight", bytes_of(quantized.codes));
      writer.write(name + (family_.fp8_scales == TileScaleType::kE8m0 ? ".scale" : ".weight_scale_inv"),
                   quantized.scales);
    } else {
      writer.write(name + ".weight", bytes_of(to_bf16(weight.values)));
    }
  }

  void write_original(const std::filesystem::path& directory) {
    const SyntheticLayout layout(request_, family_, stored_as(request_.original));
    ShardWriter writer(directory, layout.specs(), kShards);
    write_routers(writer, layout);
    for (int64_t layer = 0; layer < request_.layers; ++layer) {
      if (family_.is_fused) {
        report_layer("original", layer);
        write_fused_original(writer, layout, layer);
      }
      for (int64_t expert = 0; !family_.is_fused && expert < request_.experts; ++expert) {
        report_expert("original", layer, expert);
        for (const Matrix matrix : kMatrices) {
          write_matrix(writer, layout.linear(layer, expert, matrix), layout.experts_stored_as(),
                       values_.weight(layer, expert, matrix, request_.intermediate));
        }
      }
      for (const Matrix matrix : kMatrices) {
        if (!layout.has_shared()) break;
        write_matrix(writer, layout.shared_linear(layer, matrix), layout.shared_stored_as(),
                     values_.weight(layer, kSyntheticShared, matrix, layout.shared_intermediate()));
      }
    }
    write_json(directory / "config.json", layout.config());
    writer.finish();
    result_.original_bytes = writer.total_bytes();
  }

  void write_nvfp4(const std::filesystem::path& original_directory, const std::filesystem::path& directory) {
    const auto original = Checkpoint::open(original_directory);
    const SyntheticLayout layout(request_, family_, StoredAs::kNvfp4);
    ShardWriter writer(directory, layout.specs(), kShards);
    write_routers(writer, layout);
    for (int64_t layer = 0; layer < request_.layers; ++layer) {
      const ExpertLayer experts = load_experts(original, layer);
      request_.progress(fmt::format("calibrating layer {} on {} tokens", layer, calibration_.tokens));
      const InputScales scales = calibrate(*original, layer, experts);
      if (family_.is_fused) {
        report_layer("nvfp4", layer);
        write_fused_nvfp4(writer, layout, layer, experts.weights, scales);
      }
      for (int64_t expert = 0; !family_.is_fused && expert < request_.experts; ++expert) {
        report_expert("nvfp4", layer, expert);
        const auto index = static_cast<size_t>(expert);
        for (const Matrix matrix : kMatrices) {
          write_converted(writer, layout.linear(layer, expert, matrix),
                          weight_of(experts.weights.experts[index], matrix),
                          matrix == Matrix::kDown ? scales.intermediate[index] : scales.x[index]);
        }
      }
      write_shared_nvfp4(writer, layout, layer, experts.weights, scales);
    }
    write_json(directory / "config.json", layout.config());
    if (family_.name != "deepseek-v4")
      write_json(directory / "hf_quant_config.json", layout.modelopt_config());
    writer.finish();
    result_.nvfp4_bytes = writer.total_bytes();
  }

  static const WeightView& weight_of(const Expert& expert, Matrix matrix) {
    return matrix == Matrix::kGate ? expert.gate : matrix == Matrix::kUp ? expert.up : expert.down;
  }

  void write_converted(ShardWriter& writer, const std::string& name, const WeightView& original,
                       float input_scale) {
    const BlockScaledMatrix nvfp4 =
        convert_to_nvfp4(original, is_stored_as(original, QuantFormat::kMxfp4) ? &result_.cast : nullptr);
    writer.write(name + ".weight", bytes_of(nvfp4.codes));
    writer.write(name + ".weight_scale", bytes_of(nvfp4.scales));
    writer.write(name + ".weight_scale_2", bytes_of(nvfp4.global.value));
    writer.write(name + ".input_scale", bytes_of(input_scale));
  }

  void write_shared_nvfp4(ShardWriter& writer, const SyntheticLayout& layout, int64_t layer,
                          const ExpertWeights& weights, const InputScales& scales) {
    if (!layout.has_shared()) return;
    for (const Matrix matrix : kMatrices) {
      const std::string name = layout.shared_linear(layer, matrix);
      if (layout.shared_stored_as() == StoredAs::kNvfp4) {
        write_converted(writer, name, weight_of(weights.shared->expert, matrix),
                        matrix == Matrix::kDown ? scales.intermediate.back() : scales.x.back());
      } else {
        write_matrix(writer, name, layout.shared_stored_as(),
                     values_.weight(layer, kSyntheticShared, matrix, layout.shared_intermediate()));
      }
    }
  }

  // ---- fused: gpt-oss ----

  /// Gate and up interleaved, or down: [experts, rows, cols].
  DenseMatrix fused_values(int64_t layer, int64_t expert, bool is_down) const {
    const int64_t inner = request_.intermediate;
    if (is_down) return values_.weight(layer, expert, Matrix::kDown, inner);
    const DenseMatrix gate = values_.weight(layer, expert, Matrix::kGate, inner),
                      up = values_.weight(layer, expert, Matrix::kUp, inner);
    DenseMatrix both{2 * inner, request_.hidden, {}};
    for (int64_t row = 0; row < inner; ++row) {
      for (const DenseMatrix* half : {&gate, &up}) {
        both.values.insert(both.values.end(), half->view().row(row), half->view().row(row) + half->cols);
      }
    }
    return both;
  }

  std::vector<Bf16> fused_bias(int64_t layer, bool is_down) const {
    std::vector<Bf16> biases;
    for (int64_t expert = 0; expert < request_.experts; ++expert) {
      const int64_t size = is_down ? request_.hidden : 2 * request_.intermediate;
      const Matrix matrix = is_down ? Matrix::kDown : Matrix::kGate;
      for (const float value : values_.expert_bias(layer, expert, matrix, size)) {
        biases.push_back(encode_bf16(value));
      }
    }
    return biases;
  }

  void write_fused_original(ShardWriter& writer, const SyntheticLayout& layout, int64_t layer) const {
    for (const bool is_down : {false, true}) {
      const std::string name = layout.fused(layer, is_down);
      std::vector<uint8_t> blocks, scales;
      std::vector<Bf16> transposed;
      for (int64_t expert = 0; expert < request_.experts; ++expert) {
        const DenseMatrix weight = fused_values(layer, expert, is_down);
        if (is_mxfp4()) {
          const BlockScaledMatrix quantized = quantize_mxfp4(weight.view());
          blocks.insert(blocks.end(), quantized.codes.begin(), quantized.codes.end());
          scales.insert(scales.end(), quantized.scales.begin(), quantized.scales.end());
        } else {
          const std::vector<Bf16> rounded = to_bf16(weight.values);
          transposed.resize(transposed.size() + rounded.size());
          put_transposed(rounded.data(), weight.rows, weight.cols,
                         transposed.data() + transposed.size() - rounded.size());
        }
      }
      if (is_mxfp4()) {
        writer.write(name + "_blocks", bytes_of(blocks));
        writer.write(name + "_scales", bytes_of(scales));
      } else {
        writer.write(name, bytes_of(transposed));
      }
      writer.write(name + "_bias", bytes_of(fused_bias(layer, is_down)));
    }
  }

  /// Stored transposed, one global scale and one input scale for all experts, as ModelOpt exports them.
  void write_fused_nvfp4(ShardWriter& writer, const SyntheticLayout& layout, int64_t layer,
                         const ExpertWeights& weights, const InputScales& scales) {
    for (const bool is_down : {false, true}) {
      const std::string name = layout.fused(layer, is_down);
      const std::vector<BlockScaledMatrix> experts = convert_fused(weights, is_down);
      std::vector<uint8_t> codes, block_scales;
      for (const BlockScaledMatrix& expert : experts) {
        codes.resize(codes.size() + expert.codes.size());
        put_transposed(expert.codes.data(), expert.rows, expert.cols / 2,
                       codes.data() + codes.size() - expert.codes.size());
        block_scales.resize(block_scales.size() + expert.scales.size());
        put_transposed(expert.scales.data(), expert.rows, expert.cols / 16,
                       block_scales.data() + block_scales.size() - expert.scales.size());
      }
      const std::vector<float>& own = is_down ? scales.intermediate : scales.x;
      const float input_scale = *std::max_element(own.begin(), own.end());
      writer.write(name, bytes_of(codes));
      writer.write(name + "_weight_scale", bytes_of(block_scales));
      writer.write(name + "_weight_scale_2", bytes_of(experts.front().global.value));
      writer.write(name + "_input_scale", bytes_of(input_scale));
      writer.write(name + "_bias", bytes_of(fused_bias(layer, is_down)));
    }
  }

  /// Every expert's matrix, gate and up interleaved, with one global scale for all.
  std::vector<BlockScaledMatrix> convert_fused(const ExpertWeights& weights, bool is_down) {
    std::vector<BlockScaledMatrix> stored;  // as the original has them, rows in the fused order
    std::vector<DenseMatrix> dense;
    int kmax = kNoExponent;
    float amax = 0.0f;
    for (const Expert& expert : weights.experts) {
      if (is_mxfp4()) {
        stored.push_back(interleave_mxfp4(expert, is_down));
        kmax = std::max(kmax, largest_mxfp4_exponent(stored.back().view()));
      } else {
        dense.push_back(interleave(expert, is_down));
        amax = std::max(amax, absolute_maximum(dense.back().view()));
      }
    }
    std::vector<BlockScaledMatrix> converted;
    for (const BlockScaledMatrix& matrix : stored) {
      converted.push_back(cast_mxfp4_to_nvfp4(matrix.view(), kmax, &result_.cast));
    }
    for (const DenseMatrix& matrix : dense) {
      converted.push_back(quantize_nvfp4(matrix.view(), nvfp4_global_scale(amax)));
    }
    return converted;
  }

  static DenseMatrix interleave(const Expert& expert, bool is_down) {
    if (is_down) return {rows_of(expert.down), cols_of(expert.down), dequantize(expert.down)};
    const std::vector<float> gate = dequantize(expert.gate), up = dequantize(expert.up);
    DenseMatrix both{2 * rows_of(expert.up), cols_of(expert.up), {}};
    for (auto g = gate.begin(), u = up.begin(); g != gate.end(); g += both.cols, u += both.cols) {
      both.values.insert(both.values.end(), g, g + both.cols);
      both.values.insert(both.values.end(), u, u + both.cols);
    }
    return both;
  }

  static BlockScaledMatrix interleave_mxfp4(const Expert& expert, bool is_down) {
    std::vector<const BlockScaledView*> parts = {
        &std::get<BlockScaledView>(is_down ? expert.down : expert.gate)};
    if (!is_down) parts.push_back(&std::get<BlockScaledView>(expert.up));
    BlockScaledMatrix matrix{
        QuantFormat::kMxfp4, static_cast<int64_t>(parts.size()) * parts[0]->rows, parts[0]->cols, {}, {}, {}};
    for (int64_t row = 0; row < parts[0]->rows; ++row) {
      for (const BlockScaledView* part : parts) {
        matrix.codes.insert(matrix.codes.end(), part->codes.row(row), part->codes.row(row) + part->cols / 2);
        for (int64_t block = 0; block < part->blocks_per_row(); ++block) {
          matrix.scales.push_back(part->scale_code(row, block));
        }
      }
    }
    return matrix;
  }

  // ---- calibration ----

  /// amax/2688 of x and of the intermediate for every expert; the layer's largest where no token went.
  /// Beside an MXFP4 original, whose global scales are powers of two, these are rounded up to powers of two
  /// as well: ties between codes then occur in ordinary data, and a wrong tie rule shows.
  InputScales calibrate(const Checkpoint& original, int64_t layer, const ExpertLayer& experts) const {
    const LayerRules rules = rules_of(original.config());
    LayerInputs inputs = calibration_;
    route_inputs({original, layer, experts, rules}, inputs);
    LayerOptions options;
    options.activations = ActivationFormat::kBf16;
    LayerConfig config = layer_config(experts, rules);
    config.top_k = inputs.top_k;
    const auto& shared = experts.weights.shared;
    const LayerTrace run = trace(*reference_backend().make_layer(experts.weights, config, options), inputs,
                                 shared ? &*shared : nullptr);
    LayerAmax amax(request_.experts);
    amax.add(run);
    std::vector<float> x_amax, inner_amax;
    for (const ExpertAmax& expert : amax.experts()) {
      x_amax.push_back(expert.x);
      inner_amax.push_back(expert.intermediate);
    }
    InputScales scales{scales_from(x_amax), scales_from(inner_amax)};
    if (amax.shared()) {
      scales.x.push_back(scales_from({amax.shared()->x}).front());
      scales.intermediate.push_back(scales_from({amax.shared()->intermediate}).front());
    }
    return scales;
  }

  std::vector<float> scales_from(const std::vector<float>& amax) const {
    const float largest = *std::max_element(amax.begin(), amax.end());
    std::vector<float> scales;
    for (const float own : amax) {
      const float scale = nvfp4_global_scale(own > 0.0f ? own : largest);
      scales.push_back(is_mxfp4() ? std::exp2(std::ceil(std::log2(scale))) : scale);
    }
    return scales;
  }

  void report_layer(const char* what, int64_t layer) const {
    request_.progress(fmt::format("{}: layer {} of {}", what, layer, request_.layers));
  }

  void report_expert(const char* what, int64_t layer, int64_t expert) const {
    request_.progress(fmt::format("{}: layer {} of {}, expert {} of {}", what, layer, request_.layers, expert,
                                  request_.experts));
  }

  const SynthesizeRequest& request_;
  const SyntheticFamily& family_;
  SyntheticValues values_;
  LayerInputs inputs_, calibration_;
  SynthesizeResult result_;
};

}  // namespace

SynthesizeResult synthesize(const SynthesizeRequest& request) {
  if (find_synthetic_family(request.family) == nullptr) {
    reject("--family", fmt::format("one of {}", fmt::join(synthetic_family_names(), ", ")), request.family);
  }
  return Synthesizer(request).run();
}

}  // namespace fourfold
