#include "tools/synthesize.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <optional>
#include <system_error>

#include "base/fail.h"
#include "base/files.h"
#include "fourfold/checkpoint.h"
#include "fourfold/reference.h"
#include "tools/layer_inputs.h"
#include "tools/layer_trace.h"
#include "tools/model_writer.h"
#include "tools/random.h"

namespace fourfold {
namespace {

using Json = nlohmann::ordered_json;

enum class Matrix : uint8_t { kGate, kUp, kDown };
constexpr std::array<Matrix, 3> kMatrices = {Matrix::kGate, Matrix::kUp, Matrix::kDown};

/// A directory for files in the making, beside their destination; removed with what is left in it.
class PartialDirectory {
 public:
  explicit PartialDirectory(const std::filesystem::path& parent)
      : path_(parent / fmt::format("{}{}", kPrefix, getpid())) {
    std::error_code error;
    remove_abandoned(parent);
    std::filesystem::create_directories(path_, error);
    if (error) fail(ErrorCode::kIo, "{}: can't create it: {}", path_.string(), error.message());
  }
  ~PartialDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  PartialDirectory(const PartialDirectory&) = delete;
  PartialDirectory& operator=(const PartialDirectory&) = delete;

  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

  /// What stands there goes aside first, and goes with this directory.
  void move_into_place(const std::string& name, const std::filesystem::path& parent) const {
    std::error_code error;
    if (std::filesystem::exists(parent / name)) {
      std::filesystem::rename(parent / name, path_ / ("replaced-" + name), error);
    }
    if (!error) std::filesystem::rename(path_ / name, parent / name, error);
    if (error) fail(ErrorCode::kIo, "{}: can't write it: {}", (parent / name).string(), error.message());
  }

 private:
  static constexpr std::string_view kPrefix = ".partial-";

  /// Leftovers of runs that were killed.
  static void remove_abandoned(const std::filesystem::path& parent) {
    std::error_code error;
    std::vector<std::filesystem::path> abandoned;
    for (const auto& entry : std::filesystem::directory_iterator(parent, error)) {
      const std::string name = entry.path().filename().string();
      pid_t owner = 0;
      if (!name.starts_with(kPrefix)) continue;
      const char* digits = name.data() + kPrefix.size();
      const auto parsed = std::from_chars(digits, name.data() + name.size(), owner);
      if (parsed.ec == std::errc() && owner > 0 && kill(owner, 0) != 0 && errno == ESRCH) {
        abandoned.push_back(entry.path());
      }
    }
    for (const auto& path : abandoned) std::filesystem::remove_all(path, error);
  }

  std::filesystem::path path_;
};

/// Whether `directory` is a model that this command made: --force replaces nothing else.
bool is_synthetic(const std::filesystem::path& directory) {
  try {
    return read_file(directory / "config.json", 1 << 20).find("\"fourfold_synthetic\"") != std::string::npos;
  } catch (const Error&) {
    return false;
  }
}

/// float32 [rows, cols] in memory.
struct DenseMatrix {
  int64_t rows = 0, cols = 0;
  std::vector<float> values;
  MatrixView<const float> view() const { return {values.data(), rows, cols}; }
};

std::vector<Bf16> to_bf16(const std::vector<float>& values) {
  std::vector<Bf16> rounded(values.size());
  std::transform(values.begin(), values.end(), rounded.begin(), encode_bf16);
  return rounded;
}

template <class T>
std::span<const std::byte> bytes_of(const std::vector<T>& values) {
  return std::as_bytes(std::span(values));
}

/// Names, shapes and data of one synthetic model.
class Synthesizer {
 public:
  explicit Synthesizer(const SynthesizeRequest& request) : request_(request) {}

  SynthesizeResult run() {
    check_shape();
    check_target();
    const PartialDirectory partial(request_.directory);
    make_calibration_inputs();
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

  /// About; in double, where no shape overflows.
  double bytes_needed() const {
    const auto hidden = static_cast<double>(request_.hidden), tokens = static_cast<double>(request_.tokens);
    const double experts = static_cast<double>(request_.layers) * static_cast<double>(request_.experts);
    const double values = experts * 3.0 * hidden * static_cast<double>(request_.intermediate);
    const double routers = 2.0 * experts * (hidden * 2.0 + 4.0);
    return values * 9.0 / 16.0 + values * (is_mxfp4() ? 17.0 / 32.0 : 2.0) + routers + tokens * hidden * 2.0;
  }

  // ---- names and shapes ----

  std::string layer_prefix(int64_t layer) const {
    return is_mxfp4() ? fmt::format("layers.{}.ffn.", layer) : fmt::format("model.layers.{}.mlp.", layer);
  }

  std::string linear_name(int64_t layer, int64_t expert, Matrix matrix) const {
    constexpr std::array<const char*, 3> kDeepSeek = {"w1", "w3", "w2"};
    constexpr std::array<const char*, 3> kQwen = {"gate_proj", "up_proj", "down_proj"};
    const auto index = static_cast<size_t>(matrix);
    return fmt::format("{}experts.{}.{}", layer_prefix(layer), expert,
                       is_mxfp4() ? kDeepSeek[index] : kQwen[index]);
  }

  int64_t rows_of_matrix(Matrix matrix) const {
    return matrix == Matrix::kDown ? request_.hidden : request_.intermediate;
  }
  int64_t cols_of_matrix(Matrix matrix) const {
    return matrix == Matrix::kDown ? request_.intermediate : request_.hidden;
  }

  template <class Visit>
  void for_each_matrix(Visit visit) const {
    for (int64_t layer = 0; layer < request_.layers; ++layer) {
      for (int64_t expert = 0; expert < request_.experts; ++expert) {
        for (const Matrix matrix : kMatrices) visit(layer, expert, matrix);
      }
    }
  }

  void add_router_specs(std::vector<TensorSpec>& specs) const {
    for (int64_t layer = 0; layer < request_.layers; ++layer) {
      specs.push_back(
          {layer_prefix(layer) + "gate.weight", DType::kBf16, {request_.experts, request_.hidden}});
      if (is_mxfp4()) specs.push_back({layer_prefix(layer) + "gate.bias", DType::kF32, {request_.experts}});
    }
  }

  std::vector<TensorSpec> original_specs() const {
    std::vector<TensorSpec> specs;
    add_router_specs(specs);
    for_each_matrix([&](int64_t layer, int64_t expert, Matrix matrix) {
      const std::string name = linear_name(layer, expert, matrix);
      const int64_t rows = rows_of_matrix(matrix), cols = cols_of_matrix(matrix);
      if (is_mxfp4()) {
        specs.push_back({name + ".weight", DType::kI8, {rows, cols / 2}});
        specs.push_back({name + ".scale", DType::kF8E8m0, {rows, cols / 32}});
      } else {
        specs.push_back({name + ".weight", DType::kBf16, {rows, cols}});
      }
    });
    return specs;
  }

  std::vector<TensorSpec> nvfp4_specs() const {
    std::vector<TensorSpec> specs;
    add_router_specs(specs);
    for_each_matrix([&](int64_t layer, int64_t expert, Matrix matrix) {
      const std::string name = linear_name(layer, expert, matrix);
      const int64_t rows = rows_of_matrix(matrix), cols = cols_of_matrix(matrix);
      specs.push_back({name + ".weight", DType::kU8, {rows, cols / 2}});
      specs.push_back({name + ".weight_scale", DType::kF8E4m3, {rows, cols / 16}});
      specs.push_back({name + ".weight_scale_2", DType::kF32, {}});
      specs.push_back({name + ".input_scale", DType::kF32, {}});
    });
    return specs;
  }

  // ---- data ----

  /// Inputs for the user, and more of the same kind to calibrate on: 64 rows an expert, as far as 4096 rows
  /// go. Fewer leave scales that new tokens saturate.
  void make_calibration_inputs() {
    const int64_t rows = std::min<int64_t>(64 * request_.experts, 4096);
    const int64_t tokens = std::max(request_.tokens, rows / request_.top_k);
    const bool outliers = request_.profile == WeightProfile::kRealistic;
    inputs_ = make_inputs(request_.tokens, request_.hidden, request_.seed, outliers);
    route_at_random(inputs_, request_.experts, request_.top_k, request_.seed);
    calibration_ =
        make_inputs(tokens, request_.hidden, request_.seed, outliers);  // starts with the same tokens
    route_at_random(calibration_, request_.experts, request_.top_k, request_.seed);
  }

  /// Gate and up differ in size by factors around four, up the larger in some experts and gate in others, so
  /// that their global scales differ in every expert.
  double sigma(int64_t expert, Matrix matrix) const {
    constexpr double kSigma = 0.02;  // the scale of trained weights, and of the published simulations
    constexpr std::array<double, 4> kUpRatios = {0.25, 3.0, 0.2, 4.5};
    return matrix == Matrix::kUp ? kSigma * kUpRatios[static_cast<size_t>(expert % 4)] : kSigma;
  }

  DenseMatrix make_weight(int64_t layer, int64_t expert, Matrix matrix) const {
    DenseMatrix weight{rows_of_matrix(matrix), cols_of_matrix(matrix), {}};
    weight.values.resize(static_cast<size_t>(weight.rows * weight.cols));
    const double scale = sigma(expert, matrix);
    const auto tensor =
        static_cast<uint64_t>((layer * request_.experts + expert) * 3 + static_cast<int64_t>(matrix));
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < weight.rows; ++row) {
      Random random(request_.seed, Random::Purpose::kWeight, (tensor << 24) + static_cast<uint64_t>(row));
      const bool realistic = request_.profile == WeightProfile::kRealistic;
      const double row_scale = realistic ? scale * std::exp(0.3 * random.normal()) : scale;
      for (int64_t col = 0; col < weight.cols; ++col) {
        const double value = realistic ? random.student_t(5) : random.normal();
        weight.values[static_cast<size_t>(row * weight.cols + col)] = static_cast<float>(row_scale * value);
      }
    }
    return weight;
  }

  void write_routers(ModelWriter& writer) const {
    for (int64_t layer = 0; layer < request_.layers; ++layer) {
      Random random(request_.seed, Random::Purpose::kRouter, static_cast<uint64_t>(layer));
      std::vector<float> weight(static_cast<size_t>(request_.experts * request_.hidden));
      for (float& value : weight) value = static_cast<float>(0.02 * random.normal());
      writer.write(layer_prefix(layer) + "gate.weight", bytes_of(to_bf16(weight)));
      if (!is_mxfp4()) continue;
      std::vector<float> bias(static_cast<size_t>(request_.experts));
      for (float& value : bias) value = static_cast<float>(0.1 * random.normal());
      writer.write(layer_prefix(layer) + "gate.bias", bytes_of(bias));
    }
  }

  void write_original(const std::filesystem::path& directory) {
    ModelWriter writer(directory, original_specs());
    write_routers(writer);
    for_each_matrix([&](int64_t layer, int64_t expert, Matrix matrix) {
      const std::string name = linear_name(layer, expert, matrix);
      if (matrix == Matrix::kGate) report_expert("original", layer, expert);
      const DenseMatrix weight = make_weight(layer, expert, matrix);
      if (is_mxfp4()) {
        const BlockScaledMatrix quantized = quantize_mxfp4(weight.view());
        writer.write(name + ".weight", bytes_of(quantized.codes));
        writer.write(name + ".scale", bytes_of(quantized.scales));
      } else {
        writer.write(name + ".weight", bytes_of(to_bf16(weight.values)));
      }
    });
    writer.write_json("config.json", config(false));
    writer.finish();
    result_.original_bytes = writer.total_bytes();
  }

  void write_nvfp4(const std::filesystem::path& original_directory, const std::filesystem::path& directory) {
    const auto original = Checkpoint::open(original_directory);
    ModelWriter writer(directory, nvfp4_specs());
    write_routers(writer);
    for (int64_t layer = 0; layer < request_.layers; ++layer) {
      const ExpertWeights weights = load_experts(original, layer).weights;
      request_.progress(fmt::format("calibrating layer {} on {} tokens", layer, calibration_.tokens));
      const std::vector<float> x_scales = input_scales(weights);
      for (int64_t expert = 0; expert < request_.experts; ++expert) {
        report_expert("nvfp4", layer, expert);
        for (const Matrix matrix : kMatrices) {
          write_converted(writer, linear_name(layer, expert, matrix), weight_of(weights, expert, matrix));
          const float scale = x_scales[static_cast<size_t>(expert * 2 + (matrix == Matrix::kDown))];
          writer.write(linear_name(layer, expert, matrix) + ".input_scale",
                       std::as_bytes(std::span(&scale, 1)));
        }
      }
    }
    writer.write_json("config.json", config(true));
    if (!is_mxfp4()) writer.write_json("hf_quant_config.json", modelopt_config());
    writer.finish();
    result_.nvfp4_bytes = writer.total_bytes();
  }

  static const WeightView& weight_of(const ExpertWeights& weights, int64_t expert, Matrix matrix) {
    const Expert& e = weights.experts[static_cast<size_t>(expert)];
    return matrix == Matrix::kGate ? e.gate : matrix == Matrix::kUp ? e.up : e.down;
  }

  void write_converted(ModelWriter& writer, const std::string& name, const WeightView& original) {
    const BlockScaledMatrix nvfp4 = convert_to_nvfp4(original, is_mxfp4() ? &result_.cast : nullptr);
    writer.write(name + ".weight", bytes_of(nvfp4.codes));
    writer.write(name + ".weight_scale", bytes_of(nvfp4.scales));
    writer.write(name + ".weight_scale_2", std::as_bytes(std::span(&nvfp4.global.value, 1)));
  }

  /// amax/2688 of x and of the intermediate for every expert [E, 2]; the layer's largest where no token went.
  /// Beside an MXFP4 original, whose global scales are powers of two, these are rounded up to powers of two
  /// as well: ties between codes then occur in ordinary data, and a wrong tie rule shows.
  std::vector<float> input_scales(const ExpertWeights& weights) const {
    LayerOptions options;
    options.activations = ActivationFormat::kBf16;
    const LayerConfig config{request_.hidden, request_.intermediate, request_.experts, request_.top_k,
                             activation()};
    const LayerTrace run = trace(*reference_backend().make_layer(weights, config, options), calibration_);
    std::vector<float> amax(static_cast<size_t>(request_.experts * 2), 0.0f);
    std::array<float, 2> largest = {0.0f, 0.0f};
    for (size_t expert = 0; expert < static_cast<size_t>(request_.experts); ++expert) {
      const int32_t begin = run.permutation.group_offsets[expert],
                    end = run.permutation.group_offsets[expert + 1];
      const MatrixView<const Bf16> x(run.staged_x.values.data(), run.rows, request_.hidden);
      amax[expert * 2] = absolute_maximum(x.rows_from(begin, end - begin));
      amax[expert * 2 + 1] = absolute_maximum(run.activation_view().rows_from(begin, end - begin));
      for (size_t i = 0; i < 2; ++i) largest[i] = std::max(largest[i], amax[expert * 2 + i]);
    }
    std::vector<float> scales;
    for (size_t i = 0; i < amax.size(); ++i) {
      const float scale = nvfp4_global_scale(amax[i] > 0.0f ? amax[i] : largest[i % 2]);
      scales.push_back(is_mxfp4() ? std::exp2(std::ceil(std::log2(scale))) : scale);
    }
    return scales;
  }

  // ---- configs ----

  ActivationFunction activation() const {
    ActivationFunction function;
    if (is_mxfp4()) function.limit = kSwigluLimit;
    return function;
  }

  Json config(bool quantized) const {
    Json json;
    json["architectures"] = {is_mxfp4() ? "DeepseekV4ForCausalLM" : "Qwen3MoeForCausalLM"};
    json["model_type"] = is_mxfp4() ? "deepseek_v4" : "qwen3_moe";
    json["hidden_size"] = request_.hidden;
    json["moe_intermediate_size"] = request_.intermediate;
    json["num_hidden_layers"] = request_.layers;
    json[is_mxfp4() ? "n_routed_experts" : "num_experts"] = request_.experts;
    json["num_experts_per_tok"] = request_.top_k;
    json["norm_topk_prob"] = true;
    json["hidden_act"] = "silu";
    json["torch_dtype"] = "bfloat16";
    if (is_mxfp4()) {
      json["swiglu_limit"] = kSwigluLimit;
      json["scoring_func"] = "sqrtsoftplus";
      json["routed_scaling_factor"] = 1.5;
      json["quantization_config"] = {{"quant_method", "fp8"}};
      if (quantized) {
        json["quantization_config"]["quant_algo"] = "MIXED_PRECISION";
        json["quantization_config"]["moe_quant_algo"] = "NVFP4";
        json["quantization_config"]["group_size"] = 16;
      }
    }
    json["fourfold_synthetic"] = {
        {"seed", request_.seed},
        {"profile", request_.profile == WeightProfile::kGaussian ? "gaussian" : "realistic"}};
    return json;
  }

  static Json modelopt_config() {
    Json json;
    json["producer"] = {{"name", "fourfold synthesize"}, {"version", FOURFOLD_VERSION}};
    json["quantization"] = {{"quant_algo", "NVFP4"},
                            {"group_size", 16},
                            {"kv_cache_quant_algo", nullptr},
                            {"exclude_modules", {"model.layers.*.mlp.gate"}}};
    return json;
  }

  void report_expert(const char* what, int64_t layer, int64_t expert) const {
    request_.progress(fmt::format("{}: layer {} of {}, expert {} of {}", what, layer, request_.layers, expert,
                                  request_.experts));
  }

  static constexpr float kSwigluLimit = 10.0f;  // DeepSeek-V4's

  const SynthesizeRequest& request_;
  LayerInputs inputs_, calibration_;
  SynthesizeResult result_;
};

}  // namespace

SynthesizeResult synthesize(const SynthesizeRequest& request) {
  return Synthesizer(request).run();
}

}  // namespace fourfold
