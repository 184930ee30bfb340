// Operations of the oracle driver on whole layers.
//
// A matrix lies in the input as PREFIX.codes with PREFIX.scales and PREFIX.global (NVFP4; PREFIX.divisor in
// its place: compressed-tensors' kind), with PREFIX.exponents (MXFP4), as PREFIX.fp8 with PREFIX.tile_scales
// or PREFIX.tile_exponents, or as PREFIX.values in bf16 or float32; beside it PREFIX.bias and
// PREFIX.input_scale, where it has them. PREFIX is E.gate, E.up, E.down for expert E, or shared.gate,
// shared.up, shared.down.
#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "fourfold/checkpoint.h"
#include "fourfold/expert_weights.h"
#include "fourfold/model_family.h"
#include "fourfold/moe_layer.h"
#include "fourfold/router.h"
#include "oracle_job.h"
#include "tools/layer_trace.h"

namespace fourfold {

ActivationFunction activation_of(const Job& job, const std::string& prefix) {
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
  function.kind = kinds.at(job.option(prefix + "kind", "swiglu"));
  if (!job.option(prefix + "limit").empty()) function.limit = std::stof(job.option(prefix + "limit"));
  if (!job.option(prefix + "alpha").empty()) function.alpha = std::stof(job.option(prefix + "alpha"));
  if (!job.option(prefix + "beta").empty()) function.beta = std::stof(job.option(prefix + "beta"));
  return function;
}

std::vector<uint8_t> with_poisoned_padding(std::vector<uint8_t> swizzled, const std::vector<uint8_t>& used) {
  for (size_t i = 0; i < swizzled.size(); ++i) {
    if (used[i] == 0) swizzled[i] = kE4m3NanCode;
  }
  return swizzled;
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

namespace {

/// Bytes that matrices view and no input tensor holds.
using Kept = std::deque<std::vector<uint8_t>>;

WeightView nvfp4_weight(Job& job, const std::string& prefix, bool swizzled, Kept& kept) {
  const auto codes = job.matrix<uint8_t>(prefix + ".codes"), scales = job.matrix<uint8_t>(prefix + ".scales");
  const bool divisor = job.has(prefix + ".divisor");
  const GlobalScale global{job.values<float>(prefix + (divisor ? ".divisor" : ".global"))[0],
                           divisor ? GlobalScaleKind::kDivisor : GlobalScaleKind::kMultiplier};
  BlockScaledView view{QuantFormat::kNvfp4, codes.rows,  codes.cols * 2,         codes,
                       scales.data,         scales.cols, ScaleLayout::kRowMajor, global};
  if (swizzled) {
    const std::vector<uint8_t> ones(static_cast<size_t>(scales.rows * scales.cols), 1);
    kept.push_back(with_poisoned_padding(swizzle_scales(scales),
                                         swizzle_scales({ones.data(), scales.rows, scales.cols})));
    view.scales = kept.back().data();
    view.scale_layout = ScaleLayout::kSwizzled128x4;
  }
  return view;
}

WeightView fp8_weight(Job& job, const std::string& prefix) {
  const auto codes = job.matrix<uint8_t>(prefix + ".fp8");
  Fp8View view;
  view.rows = codes.rows;
  view.cols = codes.cols;
  view.codes = codes;
  if (job.has(prefix + ".tile_exponents")) {
    view.scale_type = TileScaleType::kE8m0;
    view.scales = reinterpret_cast<const std::byte*>(job.matrix<uint8_t>(prefix + ".tile_exponents").data);
  } else {
    view.scales = reinterpret_cast<const std::byte*>(job.matrix<float>(prefix + ".tile_scales").data);
  }
  if (!job.option("tile").empty()) view.tile_rows = view.tile_cols = std::stoll(job.option("tile"));
  return view;
}

/// An empty view where the input has no such matrix.
WeightView weight_of(Job& job, const std::string& prefix, Kept& kept) {
  if (job.has(prefix + ".exponents")) {
    const auto codes = job.matrix<uint8_t>(prefix + ".codes");
    const auto exponents = job.matrix<uint8_t>(prefix + ".exponents");
    return BlockScaledView{QuantFormat::kMxfp4, codes.rows,     codes.cols * 2,         codes,
                           exponents.data,      exponents.cols, ScaleLayout::kRowMajor, {}};
  }
  if (job.has(prefix + ".codes")) {
    return nvfp4_weight(job, prefix, job.option("layout") == "swizzled", kept);
  }
  if (job.has(prefix + ".fp8")) return fp8_weight(job, prefix);
  if (!job.has(prefix + ".values")) return DenseView{};
  return dense_view(job.matrix<Bf16>(prefix + ".values"));
}

Expert expert_of(Job& job, const std::string& name, Kept& kept) {
  Expert expert;
  expert.name = "expert " + name;
  const auto read = [&](const std::string& half, std::optional<DenseView>& bias,
                        std::optional<float>& input_scale) {
    const std::string prefix = name + "." + half;
    if (job.has(prefix + ".bias")) bias = dense_vector(job.matrix<float>(prefix + ".bias"));
    if (job.has(prefix + ".input_scale")) input_scale = job.values<float>(prefix + ".input_scale")[0];
    return weight_of(job, prefix, kept);
  };
  expert.gate = read("gate", expert.gate_bias, expert.gate_input_scale);
  expert.up = read("up", expert.up_bias, expert.up_input_scale);
  expert.down = read("down", expert.down_bias, expert.down_input_scale);
  return expert;
}

ExpertWeights experts_of(Job& job, Kept& kept) {
  ExpertWeights weights;
  for (int e = 0;; ++e) {
    Expert expert = expert_of(job, fmt::format("{}", e), kept);
    if (rows_of(expert.up) == 0) break;
    weights.experts.push_back(std::move(expert));
  }
  weights.hidden = cols_of(weights.experts.front().up);
  weights.intermediate = rows_of(weights.experts.front().up);
  SharedExpert shared;
  shared.expert = expert_of(job, "shared", kept);
  shared.intermediate = rows_of(shared.expert.up);
  if (job.has("shared_gate")) shared.gate = dense_view(job.matrix<Bf16>("shared_gate"));
  if (shared.intermediate > 0) weights.shared = std::move(shared);
  return weights;
}

/// The job's routing; ids are I32 or I64.
Routing routing_of(Job& job) {
  Routing routing;
  routing.topk_weights = job.matrix<float>("topk_weights");
  const int64_t tokens = routing.topk_weights.rows, top_k = routing.topk_weights.cols;
  const auto narrow = job.matrix<int32_t>("topk_ids");
  if (narrow.rows == tokens) {
    routing.topk_ids = narrow;
  } else {
    routing.topk_ids = MatrixView<const int64_t>(job.matrix<int64_t>("topk_ids").data, tokens, top_k);
  }
  if (job.has("local_experts")) {
    const auto map = job.matrix<int32_t>("local_experts");
    routing.local_experts = {map.data, static_cast<size_t>(map.rows * map.cols)};
  }
  return routing;
}

LayerOptions options_of(const Job& job) {
  LayerOptions options;
  options.activations = parse_activation_format(job.option("activations", "nvfp4")).value();
  const std::string policy = job.option("policy", "dynamic-token");
  options.x_scale = parse_scale_policy(job.option("x_policy", policy)).value();
  options.intermediate_scale = parse_scale_policy(job.option("intermediate_policy", policy)).value();
  options.activation_rule = parse_scale_rule(job.option("rule", "amax")).value();
  options.accumulation = accumulation_of(job);
  options.dequantize_weights = job.option("dequantize") == "1";
  return options;
}

template <class T>
void fill_bytes(std::vector<T>& values, uint8_t fill) {
  if (!values.empty()) std::memset(static_cast<void*>(values.data()), fill, values.size() * sizeof(T));
}

template <class T>
std::vector<T> filled(int64_t count, uint8_t fill) {
  std::vector<T> values(static_cast<size_t>(count));
  fill_bytes(values, fill);
  return values;
}

/// What a layer of experts writes into taps, `rows` rows of it.
struct Probe {
  StagedBuffers staged_x, staged_intermediate;
  std::vector<Bf16> h, activation, z;
};

/// Every byte is `fill` at first: 0xFF is NaN in every format.
Probe make_probe(int64_t rows, const LayerConfig& config, ActivationFormat format, uint8_t fill) {
  Probe probe{StagedBuffers(format, rows, config.hidden), StagedBuffers(format, rows, config.intermediate),
              filled<Bf16>(rows * config.h_columns(), fill), filled<Bf16>(rows * config.intermediate, fill),
              filled<Bf16>(rows * config.hidden, fill)};
  for (StagedBuffers* staged : {&probe.staged_x, &probe.staged_intermediate}) {
    fill_bytes(staged->values, fill);
    for (auto* bytes : {&staged->codes, &staged->scales, &staged->residual_codes, &staged->residual_scales}) {
      fill_bytes(*bytes, fill);
    }
    fill_bytes(staged->row_scales, fill);
  }
  return probe;
}

/// The first `rows` rows of a tap as a result of the job.
void save_rows(Job& job, const std::string& name, std::vector<Bf16>& values, int64_t rows, int64_t cols) {
  values.resize(static_cast<size_t>(rows * cols));
  job.result(name, DType::kBf16, {rows, cols}, values);
}

/// What was staged, as results of the job; bf16 activations are not.
void save_staged(Job& job, const std::string& name, StagedBuffers& staged, int64_t rows) {
  staged.trim(rows);
  const StagedActivations& views = staged.views;
  const auto save = [&](const std::string& suffix, const MatrixView<uint8_t>& view,
                        const std::vector<uint8_t>& bytes) {
    if (view.cols > 0) job.result(name + suffix, DType::kU8, {view.rows, view.cols}, bytes);
  };
  save("_codes", views.codes, staged.codes);
  save("_scales", views.scales, staged.scales);
  save("_residual_codes", views.residual_codes, staged.residual_codes);
  save("_residual_scales", views.residual_scales, staged.residual_scales);
  if (views.codes.cols > 0) job.result(name + "_row_scales", DType::kF32, {rows}, staged.row_scales);
}

void save_probe(Job& job, const std::string& prefix, Probe& probe, int64_t rows, const LayerConfig& config) {
  save_staged(job, prefix + "staged_x", probe.staged_x, rows);
  save_staged(job, prefix + "staged_a", probe.staged_intermediate, rows);
  save_rows(job, prefix + "h", probe.h, rows, config.h_columns());
  save_rows(job, prefix + "a", probe.activation, rows, config.intermediate);
  save_rows(job, prefix + "z", probe.z, rows, config.hidden);
}

/// Runs `layer` with every stage tapped and saves it all; y is a result already.
void run_tapped(Job& job, const MoeLayer& layer, const SharedExpert* shared, ForwardArgs args) {
  const auto fill = static_cast<uint8_t>(std::stoi(job.option("fill", "255")));
  const LayerConfig& config = layer.config();
  const int64_t tokens = args.routing.tokens(), slots = tokens * config.top_k;
  const LayerPlan plan = layer.plan(tokens);
  const AlignedWorkspace workspace(plan.workspace_bytes);
  std::fill(workspace.span().begin(), workspace.span().end(), std::byte{fill});
  args.workspace = workspace.span();

  Probe probe = make_probe(slots, config, layer.options().activations, fill);
  auto group_offsets = filled<int32_t>(config.experts + 1, fill), slot_of_row = filled<int32_t>(slots, fill);
  args.taps.group_offsets = group_offsets;
  args.taps.slot_of_row = slot_of_row;
  args.taps.staged_x = &probe.staged_x.views;
  args.taps.staged_intermediate = &probe.staged_intermediate.views;
  args.taps.h = {probe.h.data(), slots, config.h_columns()};
  args.taps.activation = {probe.activation.data(), slots, config.intermediate};
  args.taps.z = {probe.z.data(), slots, config.hidden};

  std::optional<Probe> shared_probe;
  LayerConfig own;
  auto z_weight = filled<float>(tokens, fill);
  if (shared != nullptr) {
    own = shared_config(config);
    shared_probe = make_probe(tokens, own, shared_options(*shared, layer.options()).activations, fill);
    args.taps.shared = {&shared_probe->staged_x.views,
                        {shared_probe->h.data(), tokens, own.h_columns()},
                        {shared_probe->activation.data(), tokens, own.intermediate},
                        &shared_probe->staged_intermediate.views,
                        {shared_probe->z.data(), tokens, own.hidden},
                        z_weight};
  }
  int32_t* status = job.result<int32_t>("status", DType::kI32, {1});
  args.status = status;
  layer.forward(plan, args);

  const int64_t rows = group_offsets.back();
  slot_of_row.resize(static_cast<size_t>(rows));
  job.result("group_offsets", DType::kI32, {config.experts + 1}, group_offsets);
  job.result("slot_of_row", DType::kI32, {rows}, slot_of_row);
  save_probe(job, "", probe, rows, config);
  if (shared_probe) {
    save_probe(job, "shared_", *shared_probe, tokens, own);
    job.result("shared_z_weight", DType::kF32, {tokens}, z_weight);
  }
}

/// A result [rows, cols] of the job, every byte of it `fill`.
template <class T>
MatrixView<T> filled_result(Job& job, const std::string& name, DType type, int64_t rows, int64_t cols,
                            uint8_t fill) {
  T* data = job.result<T>(name, type, {rows, cols});
  std::fill_n(reinterpret_cast<std::byte*>(data), static_cast<size_t>(rows * cols) * sizeof(T),
              std::byte{fill});
  return {data, rows, cols};
}

/// y as a result of the job: bf16, or float32 with out=f32.
OutputView y_of(Job& job, int64_t tokens, int64_t hidden) {
  const auto fill = static_cast<uint8_t>(std::stoi(job.option("fill", "255")));
  if (job.option("out", "bf16") == "f32") {
    return filled_result<float>(job, "y", DType::kF32, tokens, hidden, fill);
  }
  return filled_result<Bf16>(job, "y", DType::kBf16, tokens, hidden, fill);
}

}  // namespace

void run_layer(Job& job) {
  Kept kept;
  const ExpertWeights weights = experts_of(job, kept);
  const SharedExpert* shared = weights.shared ? &*weights.shared : nullptr;
  LayerConfig config;
  config.hidden = weights.hidden;
  config.intermediate = weights.intermediate;
  config.experts = weights.count();
  config.top_k = job.shape("topk_weights").back();
  config.activation = activation_of(job);
  config.weight_on_input = job.option("weight_on_input") == "1";
  config.shared_intermediate = shared != nullptr ? shared->intermediate : 0;
  config.shared_activation = activation_of(job, "shared_");

  ForwardArgs args;
  args.x = job.matrix<Bf16>("x");
  args.routing = routing_of(job);
  args.y = y_of(job, args.x.rows, config.hidden);
  run_tapped(job, *reference_backend().make_layer(weights, config, options_of(job)), shared, args);
}

void read_checkpoint_weights(Job& job) {
  const auto checkpoint = Checkpoint::open(job.option("checkpoint"));
  const ExpertLayer layer = load_experts(checkpoint, std::stoll(job.option("layer", "0")));
  for (size_t e = 0; e < layer.weights.experts.size(); ++e) {
    const Expert& expert = layer.weights.experts[e];
    for (const auto& [half, weight] :
         {std::pair("gate", &expert.gate), std::pair("up", &expert.up), std::pair("down", &expert.down)}) {
      const int64_t rows = rows_of(*weight), cols = cols_of(*weight);
      auto* out = job.result<float>(std::to_string(e) + "." + half, DType::kF32, {rows, cols});
      for (int64_t row = 0; row < rows; ++row) dequantize_row(*weight, row, out + row * cols);
    }
  }
}

void run_checkpoint_layer(Job& job) {
  const auto checkpoint = Checkpoint::open(job.option("checkpoint"));
  const int64_t layer = std::stoll(job.option("layer", "0"));
  const ExpertLayer experts = load_experts(checkpoint, layer);
  const LayerRules rules = rules_of(checkpoint->config());
  const LayerConfig config = layer_config(experts, rules);
  std::string why_not = "the family has no router";
  std::optional<CheckpointRouter> router;
  if (rules.router) {
    router = load_router(*checkpoint, layer, config.experts, config.hidden, *rules.router, rules.router_bias,
                         why_not);
  }
  if (!router) throw std::runtime_error(why_not);

  const auto x = job.matrix<Bf16>("x");
  std::vector<int64_t> token_ids;
  if (router->hash_table != nullptr) token_ids = job.values<int64_t>("token_ids");
  const RoutingDecision decision = route(router->config, router->weights, x, token_ids);
  job.result("logits", DType::kF32, {x.rows, config.experts}, router_logits(x, router->weights));
  job.result("topk_ids", DType::kI32, {x.rows, config.top_k}, decision.topk_ids);
  job.result("topk_weights", DType::kF32, {x.rows, config.top_k}, decision.topk_weights);

  ForwardArgs args;
  args.x = x;
  args.routing = decision.view();
  args.y = y_of(job, x.rows, config.hidden);
  const SharedExpert* shared = experts.weights.shared ? &*experts.weights.shared : nullptr;
  run_tapped(job, *reference_backend().make_layer(experts.weights, config, options_of(job)), shared, args);
}

}  // namespace fourfold
