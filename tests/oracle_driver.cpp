// Runs one operation on tensors from a file and writes the results to another, so that the numpy oracle of
// tests/oracle can judge the library without sharing a line with it.
//
//   oracle_driver OP IN.safetensors OUT.safetensors [key=value ...]
#include <fmt/format.h>

#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "fourfold/error.h"
#include "fourfold/expert_weights.h"
#include "fourfold/moe_layer.h"
#include "fourfold/quantize.h"
#include "fourfold/reference.h"
#include "fourfold/router.h"
#include "fourfold/safetensors.h"
#include "fourfold/scale_layout.h"
#include "tools/layer_trace.h"

namespace fourfold {
namespace {

class Job {
 public:
  Job(const std::string& in, std::map<std::string, std::string> options)
      : file_(SafetensorsFile::open(in)), options_(std::move(options)) {}

  std::string option(const std::string& key, const std::string& fallback = "") const {
    const auto it = options_.find(key);
    return it == options_.end() ? fallback : it->second;
  }

  bool has(const std::string& name) const { return file_->find(name) != nullptr; }
  const std::vector<int64_t>& shape(const std::string& name) const { return file_->at(name).shape; }

  /// A tensor's elements, copied to where they are aligned.
  template <class T>
  std::vector<T> values(const std::string& name) const {
    const Tensor& tensor = file_->at(name);
    std::vector<T> copy(static_cast<size_t>(tensor.bytes) / sizeof(T));
    if (!copy.empty()) std::memcpy(copy.data(), tensor.data, copy.size() * sizeof(T));
    return copy;
  }

  /// A matrix kept alive by the job. Tensors of higher rank fold into [rows, last extent].
  template <class T>
  MatrixView<const T> matrix(const std::string& name) {
    const std::vector<int64_t>& extents = shape(name);
    const int64_t cols = extents.back();
    auto& bytes = kept_.emplace_back(values<std::byte>(name));
    const auto rows = cols == 0 ? 0 : static_cast<int64_t>(bytes.size() / sizeof(T)) / cols;
    return {reinterpret_cast<const T*>(bytes.data()), rows, cols};
  }

  /// A result of `shape`, zeroed, to be filled in.
  template <class T>
  T* result(const std::string& name, DType type, std::vector<int64_t> shape) {
    TensorSpec spec{name, type, std::move(shape)};
    auto& bytes = results_.emplace_back(static_cast<size_t>(spec.bytes()));
    specs_.push_back(std::move(spec));
    return reinterpret_cast<T*>(bytes.data());
  }

  template <class T>
  void result(const std::string& name, DType type, std::vector<int64_t> shape, const std::vector<T>& values) {
    T* data = result<T>(name, type, std::move(shape));
    if (!values.empty()) std::memcpy(data, values.data(), values.size() * sizeof(T));
  }

  void save(const std::string& out) const {
    std::vector<TensorData> tensors;
    for (size_t i = 0; i < specs_.size(); ++i) tensors.push_back({specs_[i], results_[i]});
    write_safetensors(out, tensors);
  }

 private:
  std::shared_ptr<const SafetensorsFile> file_;
  std::map<std::string, std::string> options_;
  std::deque<std::vector<std::byte>> kept_;
  std::deque<std::vector<std::byte>> results_;
  std::vector<TensorSpec> specs_;
};

int64_t ssize_of(const auto& container) {
  return static_cast<int64_t>(container.size());
}

void decode(Job& job) {
  float* e2m1 = job.result<float>("e2m1", DType::kF32, {16});
  for (int code = 0; code < 16; ++code) e2m1[code] = decode_e2m1(static_cast<uint8_t>(code));
  float* e4m3 = job.result<float>("e4m3", DType::kF32, {256});
  for (int code = 0; code < 256; ++code) e4m3[code] = decode_e4m3(static_cast<uint8_t>(code));
  float* e8m0 = job.result<float>("e8m0", DType::kF32, {256});
  for (int code = 0; code < 256; ++code) e8m0[code] = decode_e8m0(static_cast<uint8_t>(code));
  float* bf16 = job.result<float>("bf16", DType::kF32, {65536});
  for (int code = 0; code < 65536; ++code) bf16[code] = static_cast<float>(Bf16{static_cast<uint16_t>(code)});
}

void encode(Job& job) {
  const auto values = job.values<float>("values");
  uint8_t* e2m1 = job.result<uint8_t>("e2m1", DType::kU8, {ssize_of(values)});
  uint8_t* e4m3 = job.result<uint8_t>("e4m3", DType::kU8, {ssize_of(values)});
  Bf16* bf16 = job.result<Bf16>("bf16", DType::kBf16, {ssize_of(values)});
  for (size_t i = 0; i < values.size(); ++i) {
    e2m1[i] = encode_e2m1(values[i]);
    e4m3[i] = encode_e4m3(values[i]);
    bf16[i] = encode_bf16(values[i]);
  }
}

void quantize(Job& job) {
  const auto x = job.matrix<float>("x");
  const std::string policy = job.option("policy");
  const bool token = policy == "token", two_terms = job.option("terms", "1") == "2";
  const ScaleFloor floor =
      job.option("floor", "none") == "modelopt" ? ScaleFloor::kModelOpt : ScaleFloor::kNone;

  float* global = job.result<float>("global", DType::kF32, {token ? x.rows : 1});
  if (policy == "static") global[0] = job.values<float>("global")[0];
  if (policy == "tensor") global[0] = nvfp4_global_scale(absolute_maximum(x));
  uint8_t* codes = job.result<uint8_t>("codes", DType::kU8, {x.rows, x.cols / 2});
  uint8_t* scales = job.result<uint8_t>("scales", DType::kU8, {x.rows, x.cols / 16});
  float* dequantized = job.result<float>("dequantized", DType::kF32, {x.rows, x.cols});
  uint8_t* residual_codes =
      two_terms ? job.result<uint8_t>("residual_codes", DType::kU8, {x.rows, x.cols / 2}) : nullptr;
  uint8_t* residual_scales =
      two_terms ? job.result<uint8_t>("residual_scales", DType::kU8, {x.rows, x.cols / 16}) : nullptr;
  for (int64_t row = 0; row < x.rows; ++row) {
    if (token) global[row] = nvfp4_global_scale(absolute_maximum(x.rows_from(row, 1)));
    const float g = global[token ? row : 0];
    const std::span<const float> values(x.row(row), static_cast<size_t>(x.cols));
    uint8_t *row_codes = codes + row * x.cols / 2, *row_scales = scales + row * x.cols / 16;
    if (two_terms) {
      quantize_row_nvfp4x2(values, g, row_codes, row_scales, residual_codes + row * x.cols / 2,
                           residual_scales + row * x.cols / 16);
    } else {
      quantize_row_nvfp4(values, g, floor, row_codes, row_scales);
    }
    const BlockScaledView view{QuantFormat::kNvfp4,
                               1,
                               x.cols,
                               {row_codes, 1, x.cols / 2},
                               row_scales,
                               x.cols / 16,
                               ScaleLayout::kRowMajor,
                               {g, GlobalScaleKind::kMultiplier}};
    dequantize_row(view, 0, dequantized + row * x.cols);
  }
}

void save_matrix(Job& job, const BlockScaledMatrix& matrix) {
  job.result("codes", DType::kU8, {matrix.rows, matrix.cols / 2}, matrix.codes);
  job.result("scales", DType::kU8, {matrix.rows, matrix.cols / traits_of(matrix.format).block_size},
             matrix.scales);
}

void quantize_mx(Job& job) {
  const auto x = job.matrix<float>("x");
  const BlockScaledMatrix matrix = quantize_mxfp4(x);
  save_matrix(job, matrix);
  job.result("dequantized", DType::kF32, {x.rows, x.cols}, dequantize(matrix.view()));
}

void quantize_fp8(Job& job) {
  const auto x = job.matrix<Bf16>("x");
  StagedActivations staged;
  staged.codes = {job.result<uint8_t>("codes", DType::kU8, {x.rows, x.cols}), x.rows, x.cols};
  staged.row_scales = {job.result<float>("row_scales", DType::kF32, {x.rows}), static_cast<size_t>(x.rows)};
  reference::stage(ActivationFormat::kFp8, x, staged);
}

/// Row-major scales beside their codes.
BlockScaledView block_scaled(QuantFormat format, const MatrixView<const uint8_t>& codes,
                             const MatrixView<const uint8_t>& scales, float global = 1.0f) {
  return {format,      codes.rows,  codes.cols * 2,         codes,
          scales.data, scales.cols, ScaleLayout::kRowMajor, {global, GlobalScaleKind::kMultiplier}};
}

void cast(Job& job) {
  const auto codes = job.matrix<uint8_t>("codes"), scales = job.matrix<uint8_t>("scales");
  CastReport report;
  const BlockScaledMatrix matrix =
      cast_mxfp4_to_nvfp4(block_scaled(QuantFormat::kMxfp4, codes, scales), &report);
  save_matrix(job, matrix);
  job.result<float>("global", DType::kF32, {1})[0] = matrix.global.value;
  job.result<int64_t>("recoded", DType::kI64, {1})[0] = report.recoded;
  job.result<int64_t>("inexact", DType::kI64, {1})[0] = report.inexact;
}

void fold(Job& job) {
  const auto gate = job.matrix<uint8_t>("gate_scales"), up = job.matrix<uint8_t>("up_scales");
  const std::vector<uint8_t> codes(static_cast<size_t>(gate.rows * gate.cols * 8), 0x11);
  const int64_t cols = gate.cols * 16;
  const auto view = [&](const MatrixView<const uint8_t>& scales, float global) {
    return BlockScaledView{QuantFormat::kNvfp4,
                           scales.rows,
                           cols,
                           {codes.data(), scales.rows, cols / 2},
                           scales.data,
                           scales.cols,
                           ScaleLayout::kRowMajor,
                           {global, GlobalScaleKind::kMultiplier}};
  };
  Expert expert;
  expert.gate = view(gate, job.values<float>("gate_global")[0]);
  expert.up = view(up, job.values<float>("up_global")[0]);
  ExpertWeights weights{cols, gate.rows, {expert}, std::nullopt, nullptr};
  FoldReport report;
  const ExpertWeights folded = fold_gate_up(weights, &report);
  for (const auto& [name, half] :
       {std::pair("gate_scales", folded.experts[0].gate), std::pair("up_scales", folded.experts[0].up)}) {
    const auto& blocks = std::get<BlockScaledView>(half);
    uint8_t* out = job.result<uint8_t>(name, DType::kU8, {gate.rows, gate.cols});
    for (int64_t row = 0; row < gate.rows; ++row) {
      for (int64_t col = 0; col < gate.cols; ++col) out[row * gate.cols + col] = blocks.scale_code(row, col);
    }
  }
  const auto gate_global = global_multiplier(folded.experts[0].gate),
             up_global = global_multiplier(folded.experts[0].up);
  if (gate_global != up_global) throw std::runtime_error("fold: two global scales are left");
  job.result<float>("global", DType::kF32, {1})[0] = gate_global;
  job.result<int64_t>("changed", DType::kI64, {1})[0] = report.changed;
}

void save_bytes(Job& job, const std::string& name, const std::vector<uint8_t>& bytes) {
  job.result(name, DType::kU8, {ssize_of(bytes)}, bytes);
}

void save_per_expert(Job& job, const std::vector<uint8_t>& bytes, int64_t experts) {
  job.result("swizzled", DType::kU8, {experts, ssize_of(bytes) / experts}, bytes);
}

void unswizzle(Job& job) {
  const int64_t rows = std::stoll(job.option("rows")), cols = std::stoll(job.option("cols"));
  job.result("scales", DType::kU8, {rows, cols},
             unswizzle_scales(job.values<uint8_t>("swizzled"), rows, cols));
}

void permute(Job& job) {
  const int64_t experts = std::stoll(job.option("experts"));
  const std::vector<int64_t> shape = job.shape("topk_ids");
  const size_t slots = static_cast<size_t>(shape[0] * shape[1]);
  const std::vector<float> weights(slots, 1.0f);
  const auto wide = job.values<int64_t>("topk_ids");
  const auto narrow = job.values<int32_t>("topk_ids");
  Routing routing;
  if (narrow.size() == slots) {
    routing.topk_ids = MatrixView<const int32_t>(narrow.data(), shape[0], shape[1]);
  } else {
    routing.topk_ids = MatrixView<const int64_t>(wide.data(), shape[0], shape[1]);
  }
  routing.topk_weights = {weights.data(), shape[0], shape[1]};
  const Permutation permutation = permute_by_expert(routing, experts);
  job.result("group_offsets", DType::kI32, {experts + 1}, permutation.group_offsets);
  job.result("slot_of_row", DType::kI32, {permutation.rows()}, permutation.slot_of_row);
  job.result("row_of_slot", DType::kI32, {static_cast<int64_t>(slots)}, permutation.row_of_slot);
  job.result<int32_t>("status", DType::kI32, {1})[0] = permutation.status;
}

ActivationFunction activation_of(const Job& job) {
  static const std::map<std::string, ActivationKind> kinds = {
      {"swiglu", ActivationKind::kSwiglu},
      {"swiglu_step", ActivationKind::kSwigluStep},
      {"geglu", ActivationKind::kGeglu},
      {"geglu_tanh", ActivationKind::kGegluTanh},
      {"relu_squared", ActivationKind::kReluSquared},
      {"silu", ActivationKind::kSilu},
      {"gelu", ActivationKind::kGelu},
  };
  ActivationFunction function;
  function.kind = kinds.at(job.option("kind", "swiglu"));
  if (!job.option("limit").empty()) function.limit = std::stof(job.option("limit"));
  if (!job.option("alpha").empty()) function.alpha = std::stof(job.option("alpha"));
  if (!job.option("beta").empty()) function.beta = std::stof(job.option("beta"));
  return function;
}

void swiglu(Job& job) {
  const auto h = job.matrix<Bf16>("h");
  const ActivationFunction function = activation_of(job);
  const int64_t cols = is_gated(function.kind) ? h.cols / 2 : h.cols;
  reference::activate(function, h, {job.result<Bf16>("a", DType::kBf16, {h.rows, cols}), h.rows, cols});
}

void combine(Job& job) {
  const auto z = job.matrix<Bf16>("z");
  const auto rows = job.values<int32_t>("row_of_slot");
  const auto weights = job.matrix<float>("topk_weights");
  const LayerConfig config;
  const std::vector<int64_t> shape = {weights.rows, z.cols};
  reference::combine(z, rows, weights, config, {},
                     MatrixView<Bf16>(job.result<Bf16>("y", DType::kBf16, shape), shape[0], shape[1]));
  reference::combine(z, rows, weights, config, {},
                     MatrixView<float>(job.result<float>("y32", DType::kF32, shape), shape[0], shape[1]));
}

Accumulation accumulation_of(const Job& job) {
  return job.option("accumulate", "f32") == "f64" ? Accumulation::kFloat64 : Accumulation::kFloat32;
}

/// Swizzled scales whose padding is 0x7F, e4m3's NaN: a GEMM that reads padding shows it.
std::vector<uint8_t> with_poisoned_padding(std::vector<uint8_t> swizzled, const std::vector<uint8_t>& used) {
  for (size_t i = 0; i < swizzled.size(); ++i) {
    if (used[i] == 0) swizzled[i] = kE4m3NanCode;
  }
  return swizzled;
}

void grouped_gemm(Job& job, bool grouped) {
  const auto a_codes = job.matrix<uint8_t>("a_codes"), a_scales = job.matrix<uint8_t>("a_scales");
  const auto b_codes = job.matrix<uint8_t>("b_codes"), b_scales = job.matrix<uint8_t>("b_scales");
  const bool swizzled = job.option("layout", "row_major") == "swizzled";
  const auto alphas = job.values<float>(grouped ? "alphas" : "alpha");
  const int64_t experts = ssize_of(alphas), rows = job.shape("b_codes")[grouped ? 1 : 0],
                cols = a_codes.cols * 2;
  std::vector<int32_t> offsets = {0, static_cast<int32_t>(a_codes.rows)};
  if (grouped) offsets = job.values<int32_t>("group_offsets");

  const std::vector<uint8_t> ones_a(static_cast<size_t>(a_scales.rows * a_scales.cols), 1);
  const std::vector<uint8_t> ones_b(static_cast<size_t>(b_scales.rows * b_scales.cols), 1);
  const MatrixView<const uint8_t> used_a{ones_a.data(), a_scales.rows, a_scales.cols};
  const MatrixView<const uint8_t> used_b{ones_b.data(), b_scales.rows, b_scales.cols};
  const auto a_swizzled =
      with_poisoned_padding(swizzle_scale_groups(a_scales, offsets), swizzle_scale_groups(used_a, offsets));
  const auto b_swizzled =
      with_poisoned_padding(swizzle_expert_scales(b_scales, experts), swizzle_expert_scales(used_b, experts));

  ActivationView a;
  a.format = ActivationFormat::kNvfp4;
  a.rows = a_codes.rows;
  a.cols = cols;
  a.codes = a_codes;
  a.scale_layout = swizzled ? ScaleLayout::kSwizzled128x4 : ScaleLayout::kRowMajor;
  a.scales = swizzled ? a_swizzled.data() : a_scales.data;
  const auto b = stacked_nvfp4_weights(b_codes.data, swizzled ? b_swizzled.data() : b_scales.data,
                                       a.scale_layout, alphas, rows, cols);
  OutputView d;
  if (job.option("out", "bf16") == "bf16") {
    d = MatrixView<Bf16>(job.result<Bf16>("d", DType::kBf16, {a.rows, rows}), a.rows, rows);
  } else {
    d = MatrixView<float>(job.result<float>("d", DType::kF32, {a.rows, rows}), a.rows, rows);
  }
  if (grouped) {
    reference::grouped_gemm({a, b, offsets, d, accumulation_of(job)});
  } else {
    reference::gemm({a, b.front(), d, accumulation_of(job)});
  }
}

/// What was staged, as results of the job; bf16 activations are not.
void save_staged(Job& job, const std::string& name, const StagedBuffers& staged) {
  const StagedActivations& views = staged.views;
  const auto save = [&](const std::string& suffix, const MatrixView<uint8_t>& view,
                        const std::vector<uint8_t>& bytes) {
    if (view.cols > 0) job.result(name + suffix, DType::kU8, {view.rows, view.cols}, bytes);
  };
  save("_codes", views.codes, staged.codes);
  save("_scales", views.scales, staged.scales);
  save("_residual_codes", views.residual_codes, staged.residual_codes);
  save("_residual_scales", views.residual_scales, staged.residual_scales);
  if (views.codes.cols > 0) {
    job.result(name + "_row_scales", DType::kF32, {ssize_of(staged.row_scales)}, staged.row_scales);
  }
}

ExpertWeights experts_of(Job& job) {
  ExpertWeights weights;
  for (int e = 0; job.has(fmt::format("{}.gate.codes", e)); ++e) {
    Expert expert;
    expert.name = fmt::format("expert {}", e);
    const auto read = [&](const std::string& which, std::optional<float>& input_scale) {
      const std::string prefix = fmt::format("{}.{}.", e, which);
      const auto codes = job.matrix<uint8_t>(prefix + "codes"),
                 scales = job.matrix<uint8_t>(prefix + "scales");
      if (job.has(prefix + "input_scale")) input_scale = job.values<float>(prefix + "input_scale")[0];
      return block_scaled(QuantFormat::kNvfp4, codes, scales, job.values<float>(prefix + "global")[0]);
    };
    expert.gate = read("gate", expert.gate_input_scale);
    expert.up = read("up", expert.up_input_scale);
    expert.down = read("down", expert.down_input_scale);
    weights.experts.push_back(expert);
  }
  weights.hidden = cols_of(weights.experts.front().gate);
  weights.intermediate = rows_of(weights.experts.front().gate);
  return weights;
}

void layer(Job& job) {
  const ExpertWeights weights = experts_of(job);
  const auto x = job.matrix<Bf16>("x");
  const auto ids = job.matrix<int32_t>("topk_ids");
  const LayerConfig config{weights.hidden, weights.intermediate, weights.count(), ids.cols,
                           activation_of(job)};
  LayerOptions options;
  options.activations = parse_activation_format(job.option("activations", "nvfp4")).value();
  options.x_scale = options.intermediate_scale =
      parse_scale_policy(job.option("policy", "dynamic-token")).value();
  options.accumulation = accumulation_of(job);

  LayerInputs inputs;
  inputs.tokens = x.rows;
  inputs.hidden = x.cols;
  inputs.top_k = ids.cols;
  inputs.x.assign(x.data, x.data + x.rows * x.cols);
  inputs.topk_ids = job.values<int32_t>("topk_ids");
  inputs.topk_weights = job.values<float>("topk_weights");

  const LayerTrace run = trace(*reference_backend().make_layer(weights, config, options), inputs);
  job.result("group_offsets", DType::kI32, {config.experts + 1}, run.permutation.group_offsets);
  job.result("slot_of_row", DType::kI32, {run.rows}, run.permutation.slot_of_row);
  save_staged(job, "staged_x", run.staged_x);
  save_staged(job, "staged_a", run.staged_intermediate);
  job.result("h", DType::kBf16, {run.rows, 2 * config.intermediate}, run.h);
  job.result("a", DType::kBf16, {run.rows, config.intermediate}, run.activation);
  job.result("z", DType::kBf16, {run.rows, config.hidden}, run.z);
  job.result("y", DType::kBf16, {run.tokens, config.hidden}, run.y);
}

DenseView dense_view(const MatrixView<const Bf16>& matrix) {
  return {ElementType::kBf16, reinterpret_cast<const std::byte*>(matrix.data),
          matrix.rows,        matrix.cols,
          matrix.cols * 2,    {}};
}

DenseView dense_vector(const MatrixView<const float>& vector) {
  return {ElementType::kF32,
          reinterpret_cast<const std::byte*>(vector.data),
          1,
          vector.cols,
          vector.cols * 4,
          {}};
}

void route_tokens(Job& job) {
  static const std::map<std::string, RouterScore> scores = {{"softmax", RouterScore::kSoftmax},
                                                            {"softmax_of_topk", RouterScore::kSoftmaxOfTopK},
                                                            {"sigmoid", RouterScore::kSigmoid},
                                                            {"sqrt_softplus", RouterScore::kSqrtSoftplus}};
  RouterConfig config;
  config.score = scores.at(job.option("score"));
  config.top_k = std::stoll(job.option("top_k"));
  config.renormalise = job.option("renormalise", "1") == "1";
  config.scaling_factor = std::stof(job.option("scaling_factor", "1"));
  config.groups = std::stoll(job.option("groups", "1"));
  config.top_groups = std::stoll(job.option("top_groups", "1"));
  RouterWeights weights;
  weights.weight = dense_view(job.matrix<Bf16>("weight"));
  if (job.has("bias")) weights.bias = dense_vector(job.matrix<float>("bias"));
  if (job.has("correction_bias"))
    weights.correction_bias = dense_vector(job.matrix<float>("correction_bias"));
  std::vector<int64_t> token_ids;
  if (job.has("experts_of_token")) {
    weights.experts_of_token = job.matrix<int64_t>("experts_of_token");
    token_ids = job.values<int64_t>("token_ids");
  }
  const auto x = job.matrix<Bf16>("x");
  const RoutingDecision decision = route(config, weights, x, token_ids);
  job.result("logits", DType::kF32, {x.rows, weights.weight.rows}, router_logits(x, weights));
  job.result("topk_ids", DType::kI32, {x.rows, config.top_k}, decision.topk_ids);
  job.result("topk_weights", DType::kF32, {x.rows, config.top_k}, decision.topk_weights);
}

int run(int argc, char** argv) {
  static const std::map<std::string, std::function<void(Job&)>> operations = {
      {"decode", decode},
      {"encode", encode},
      {"quantize", quantize},
      {"quantize_mxfp4", quantize_mx},
      {"quantize_fp8", quantize_fp8},
      {"cast", cast},
      {"fold", fold},
      {"swizzle",
       [](Job& job) { save_bytes(job, "swizzled", swizzle_scales(job.matrix<uint8_t>("scales"))); }},
      {"unswizzle", unswizzle},
      {"swizzle_groups",
       [](Job& job) {
         save_bytes(
             job, "swizzled",
             swizzle_scale_groups(job.matrix<uint8_t>("scales"), job.values<int32_t>("group_offsets")));
       }},
      {"swizzle_experts",
       [](Job& job) {
         const int64_t experts = job.shape("scales")[0];
         save_per_expert(job, swizzle_expert_scales(job.matrix<uint8_t>("scales"), experts), experts);
       }},
      {"swizzle_experts_transposed",
       [](Job& job) {
         const int64_t experts = job.shape("scales")[0];
         save_per_expert(job, swizzle_expert_scales_from_transposed(job.matrix<uint8_t>("scales"), experts),
                         experts);
       }},
      {"permute", permute},
      {"swiglu", swiglu},
      {"route", route_tokens},
      {"combine", combine},
      {"gemm", [](Job& job) { grouped_gemm(job, false); }},
      {"grouped_gemm", [](Job& job) { grouped_gemm(job, true); }},
      {"layer", layer},
  };
  if (argc < 4 || !operations.contains(argv[1])) {
    fmt::print(stderr, "usage: oracle_driver OP IN.safetensors OUT.safetensors [key=value ...]\n");
    return 2;
  }
  std::map<std::string, std::string> options;
  for (int i = 4; i < argc; ++i) {
    const std::string text = argv[i];
    options[text.substr(0, text.find('='))] = text.substr(text.find('=') + 1);
  }
  try {
    Job job(argv[2], options);
    operations.at(argv[1])(job);
    job.save(argv[3]);
    return 0;
  } catch (const std::exception& error) {
    fmt::print(stderr, "oracle_driver: {}\n", error.what());
    return 1;
  }
}

}  // namespace
}  // namespace fourfold

int main(int argc, char** argv) {
  return fourfold::run(argc, argv);
}
