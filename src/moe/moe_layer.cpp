// The ordered list of backends, the choice among them, and the checks that all of them share.
#include "fourfold/moe_layer.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>
#include <string>

#include "base/fail.h"

namespace fourfold {
namespace {

std::string names_of(std::span<const Backend* const> list) {
  std::string names;
  for (const Backend* backend : list)
    names += fmt::format("{}{}", names.empty() ? "" : ", ", backend->name());
  return names;
}

const Backend* backend_named(std::string_view name) {
  for (const Backend* backend : backends()) {
    if (backend->name() == name) return backend;
  }
  return nullptr;
}

std::string why_not(const Backend& backend, const ExpertWeights& weights, const LayerConfig& config,
                    const LayerOptions& options) {
  const std::string unavailable = backend.why_unavailable();
  return unavailable.empty() ? backend.why_unsupported(weights, config, options) : unavailable;
}

/// The experts whose activations are quantized: routed ones, and a shared one in NVFP4.
std::vector<const Expert*> quantized_experts(const ExpertWeights& weights) {
  std::vector<const Expert*> experts;
  for (const Expert& expert : weights.experts) experts.push_back(&expert);
  if (weights.shared && is_all_nvfp4(weights.shared->expert)) experts.push_back(&weights.shared->expert);
  return experts;
}

/// Names of experts without a usable scale, as `expert tensor (value)`, at most `kShown` of them.
std::string missing_scales(const ExpertWeights& weights, int64_t& missing, int64_t& total) {
  constexpr int64_t kShown = 6;
  std::string names;
  for (const Expert* quantized : quantized_experts(weights)) {
    const Expert& expert = *quantized;
    const std::pair<const char*, std::optional<float>> scales[] = {
        {"gate", expert.gate_input_scale}, {"up", expert.up_input_scale}, {"down", expert.down_input_scale}};
    for (const auto& [which, scale] : scales) {
      if (which == std::string_view("gate") && !expert.has_gate()) continue;
      ++total;
      if (is_usable_input_scale(scale)) continue;
      if (++missing > kShown) continue;
      names += fmt::format("{}{} {} ({})", names.empty() ? "" : ", ", expert.name, which,
                           scale ? fmt::format("{}", *scale) : "absent");
    }
  }
  if (missing > kShown) names += fmt::format(", and {} more", missing - kShown);
  return names;
}

template <class T>
void require_matrix(const char* what, const MatrixView<T>& matrix, int64_t rows, int64_t cols) {
  if (matrix.rows != rows || matrix.cols != cols || matrix.stride < cols) {
    reject(what, shape_text(rows, cols),
           fmt::format("{} with stride {}", shape_text(matrix.rows, matrix.cols), matrix.stride));
  }
  if (matrix.data == nullptr && rows > 0 && cols > 0) reject(what, "data", "a null pointer");
}

/// A tap is absent, or has room for `rows` rows of `cols`.
template <class T>
void require_tap(const char* what, const MatrixView<T>& tap, int64_t rows, int64_t cols) {
  if (tap.empty()) return;
  if (tap.rows < rows || tap.cols != cols || tap.stride < cols) {
    reject(fmt::format("tap of {}", what), fmt::format("room for {}", shape_text(rows, cols)),
           shape_text(tap.rows, tap.cols));
  }
}

void require_tap(const char* what, std::span<const int32_t> tap, int64_t size) {
  if (!tap.empty() && static_cast<int64_t>(tap.size()) < size) {
    reject(fmt::format("tap of {}", what), fmt::format("room for {}", size), tap.size());
  }
}

void require_staged_tap(const char* what, const StagedActivations* tap, ActivationFormat format, int64_t rows,
                        int64_t cols) {
  if (tap == nullptr) return;
  const bool nvfp4 = is_nvfp4(format), bf16 = format == ActivationFormat::kBf16;
  const auto require = [&](const auto& matrix, bool needed, int64_t width) {
    if (needed && matrix.empty() && rows > 0)
      reject(fmt::format("tap of {}", what), "all of its arrays", "one missing");
    if (needed) require_tap(what, matrix, rows, width);
  };
  require(tap->values, bf16, cols);
  require(tap->codes, !bf16, nvfp4 ? cols / 2 : cols);
  require(tap->scales, nvfp4, cols / 16);
  require(tap->residual_codes, format == ActivationFormat::kNvfp4x2, cols / 2);
  require(tap->residual_scales, format == ActivationFormat::kNvfp4x2, cols / 16);
  if (!bf16 && static_cast<int64_t>(tap->row_scales.size()) < rows) {
    reject(fmt::format("tap of {}: row scales", what), rows, tap->row_scales.size());
  }
}

void require_taps(const StageTaps& taps, const LayerConfig& config, ActivationFormat format, int64_t tokens,
                  int64_t rows) {
  require_tap("group offsets", taps.group_offsets, config.experts + 1);
  require_tap("slot_of_row", taps.slot_of_row, rows);
  require_tap("row_of_slot", taps.row_of_slot, tokens * config.top_k);
  require_staged_tap("staged x", taps.staged_x, format, rows, config.hidden);
  require_tap("h", taps.h, rows, config.h_columns());
  require_tap("activation", taps.activation, rows, config.intermediate);
  require_staged_tap("staged intermediate", taps.staged_intermediate, format, rows, config.intermediate);
  require_tap("z", taps.z, rows, config.hidden);
}

void require_shared_taps(const SharedTaps& taps, const LayerConfig& config, int64_t tokens) {
  if (!config.has_shared()) return;
  const LayerConfig shared = shared_config(config);
  require_tap("the shared expert's h", taps.h, tokens, shared.h_columns());
  require_tap("the shared expert's activation", taps.activation, tokens, shared.intermediate);
  require_tap("the shared expert's z", taps.z, tokens, config.hidden);
  if (!taps.z_weight.empty() && static_cast<int64_t>(taps.z_weight.size()) < tokens) {
    reject("tap of the shared expert's weight", fmt::format("room for {}", tokens), taps.z_weight.size());
  }
}

void require_workspace(const LayerPlan& plan, std::span<std::byte> workspace) {
  if (workspace.size() < plan.workspace_bytes) {
    reject("workspace", fmt::format("{} bytes, as planned", plan.workspace_bytes), workspace.size());
  }
  if (reinterpret_cast<uintptr_t>(workspace.data()) % kWorkspaceAlignment != 0) {
    reject("workspace", fmt::format("an address that is a multiple of {}", kWorkspaceAlignment),
           "another one");
  }
}

void validate_activation(const Expert& expert, const ActivationFunction& function) {
  if (!(function.limit > 0.0f)) reject("activation limit", "a positive number", function.limit);
  if (!std::isfinite(function.alpha)) reject("activation alpha", "a finite number", function.alpha);
  if (!std::isfinite(function.beta)) reject("activation beta", "a finite number", function.beta);
  if (expert.has_gate() != is_gated(function.kind)) {
    reject(fmt::format("{} gate, for {}", expert.name, describe(function)),
           expert.has_gate() ? "none" : "one", expert.has_gate() ? "one" : "none");
  }
}

BackendChoice choose(std::string_view forced, const std::function<std::string(const Backend&)>& why_not,
                     const std::string& task) {
  std::string origin = "--backend";
  if (forced.empty()) {
    const char* variable = std::getenv(kBackendVariable);
    forced = variable ? variable : "";
    origin = kBackendVariable;
  }
  if (!forced.empty()) {
    const Backend* backend = backend_named(forced);
    if (backend == nullptr) {
      reject(origin, "one of the backends compiled in: " + names_of(backends()), fmt::format("'{}'", forced));
    }
    const std::string reason = why_not(*backend);
    if (reason.empty()) return {backend, "forced by " + origin};
    std::string message = fmt::format("{}: backend '{}' can't run {}: {}", origin, forced, task, reason);
    for (const Backend* other : backends()) {
      if (other == backend) continue;
      const std::string other_reason = why_not(*other);
      message += fmt::format("; {}: {}", other->name(), other_reason.empty() ? "can run it" : other_reason);
    }
    throw Error(ErrorCode::kUnsupported, message);
  }
  std::string passed_over;
  for (const Backend* backend : backends()) {
    const std::string reason = why_not(*backend);
    if (reason.empty()) {
      return {backend,
              passed_over.empty() ? "first of: " + names_of(backends()) : "passed over " + passed_over};
    }
    passed_over += fmt::format("{}{}: {}", passed_over.empty() ? "" : "; ", backend->name(), reason);
  }
  fail(ErrorCode::kUnsupported, "no backend can run {}: {}", task, passed_over);
}

}  // namespace

std::span<const Backend* const> backends() {
  static const std::array list = {
#if defined(FOURFOLD_WITH_BLACKWELL)
    &blackwell_backend(),
#endif
#if defined(FOURFOLD_WITH_CUDA)
    &sm90_backend(),
#endif
    &cpu_backend(),
    &reference_backend(),
  };
  return list;
}

const Backend& find_backend(std::string_view name) {
  if (const Backend* backend = backend_named(name)) return *backend;
  reject("backend", "one of those compiled in: " + names_of(backends()), fmt::format("'{}'", name));
}

BackendChoice choose_backend(std::string_view forced, const ExpertWeights& weights, const LayerConfig& config,
                             const LayerOptions& options) {
  return choose(
      forced, [&](const Backend& backend) { return why_not(backend, weights, config, options); },
      "this layer");
}

BackendChoice choose_backend(std::string_view forced) {
  return choose(
      forced, [](const Backend& backend) { return backend.why_unavailable(); }, "on this machine");
}

std::string why_reference_only(const LayerOptions& options) {
  if (options.dequantize_weights) return "dequantized weights are for the reference";
  if (options.accumulation == Accumulation::kFloat64) return "float64 sums are for the reference";
  return "";
}

std::string why_not_activation_rule(const LayerOptions& options) {
  if (options.activation_rule == ScaleRule::kAmax) return "";
  return fmt::format("it stages activations by the rule amax, not {}", to_string(options.activation_rule));
}

LayerConfig shared_config(const LayerConfig& config) {
  LayerConfig shared;
  shared.hidden = config.hidden;
  shared.intermediate = config.shared_intermediate;
  shared.experts = shared.top_k = 1;
  shared.activation = config.shared_activation;
  return shared;
}

LayerOptions with_bf16_activations(const LayerOptions& options) {
  LayerOptions changed = options;
  changed.activations = ActivationFormat::kBf16;
  changed.activation_rule = ScaleRule::kAmax;
  return changed;
}

LayerOptions shared_options(const SharedExpert& shared, const LayerOptions& options) {
  LayerOptions own = is_all_nvfp4(shared.expert) ? options : with_bf16_activations(options);
  own.x_max_scale = own.intermediate_max_scale = std::nullopt;
  return own;
}

std::string describe(const ActivationFunction& function) {
  const bool clamped = function.limit != std::numeric_limits<float>::infinity();
  const std::string up = clamped ? fmt::format("clamp(u, -{0}, {0})", function.limit) : "u";
  switch (function.kind) {
    case ActivationKind::kSwiglu: {
      const std::string g = clamped ? fmt::format("min(g, {})", function.limit) : "g";
      const std::string factor = function.beta == 0.0f ? up : fmt::format("({} + {})", up, function.beta);
      if (function.alpha == 1.0f) return fmt::format("silu({}) * {}", g, factor);
      return clamped ? fmt::format("{} * g' * sigmoid({} g'), g' = {}", factor, function.alpha, g)
                     : fmt::format("{} * g * sigmoid({} g)", factor, function.alpha);
    }
    case ActivationKind::kSwigluStep:
      return clamped ? fmt::format("min(silu(g), {}) * {}", function.limit, up) : "silu(g) * u";
    case ActivationKind::kGeglu:
      return "gelu(g) * u";
    case ActivationKind::kGegluTanh:
      return "gelu_tanh(g) * u";
    case ActivationKind::kReluSquared:
      return "relu(u)^2, no gate";
    case ActivationKind::kSilu:
      return "silu(u), no gate";
    case ActivationKind::kGelu:
      return "gelu(u), no gate";
  }
  return "?";
}

DefaultPolicies default_scale_policies(const ExpertWeights& weights, ActivationFormat format) {
  if (!is_nvfp4(format)) return {};
  int64_t missing = 0, total = 0;
  const std::string names = missing_scales(weights, missing, total);
  if (missing == 0 && total > 0) return {ScalePolicy::kStatic, ScalePolicy::kStatic};
  const auto has_any = [](const Expert& e) {
    return e.gate_input_scale || e.up_input_scale || e.down_input_scale;
  };
  const std::vector<const Expert*> experts = quantized_experts(weights);
  if (std::none_of(experts.begin(), experts.end(), [&](const Expert* e) { return has_any(*e); })) return {};
  fail(ErrorCode::kInvalidArgument,
       "input_scale: expected a positive finite number for every expert, found none usable for {}; "
       "calibrate again, or choose --activation-scale dynamic-token",
       names);
}

void validate(const ExpertWeights& weights, const LayerConfig& config, const LayerOptions& options) {
  validate(weights);
  const int64_t shared_intermediate = weights.shared ? weights.shared->intermediate : 0;
  if (config.shared_intermediate != shared_intermediate) {
    reject("shared expert: intermediate (0: no shared expert)", config.shared_intermediate,
           shared_intermediate);
  }
  if (config.hidden != weights.hidden || config.intermediate != weights.intermediate) {
    reject("layer shape (H, I)", shape_text(config.hidden, config.intermediate),
           shape_text(weights.hidden, weights.intermediate));
  }
  if (config.experts != weights.count()) {
    reject("experts", config.experts, weights.count());
  }
  if (config.top_k < 1) reject("top_k", "at least 1", config.top_k);
  for (const Expert& expert : weights.experts) validate_activation(expert, config.activation);
  if (weights.shared) validate_activation(weights.shared->expert, config.shared_activation);
  if (options.activation_rule != ScaleRule::kAmax && options.activations != ActivationFormat::kNvfp4) {
    reject(fmt::format("activation_rule for {} activations", to_string(options.activations)), "amax",
           to_string(options.activation_rule));
  }
  if (!is_nvfp4(options.activations)) return;
  if (config.hidden % 16 != 0 || config.intermediate % 16 != 0) {
    reject("H and I for nvfp4 activations", "multiples of 16",
           shape_text(config.hidden, config.intermediate));
  }
  const auto is_static = [](ScalePolicy p) {
    return p == ScalePolicy::kStatic || p == ScalePolicy::kMaxOverExperts;
  };
  for (const Expert* quantized : quantized_experts(weights)) {
    const Expert& expert = *quantized;
    const bool x_usable = is_usable_input_scale(expert.up_input_scale) &&
                          (!expert.has_gate() || is_usable_input_scale(expert.gate_input_scale));
    if ((is_static(options.x_scale) && !x_usable) ||
        (is_static(options.intermediate_scale) && !is_usable_input_scale(expert.down_input_scale))) {
      int64_t missing = 0, total = 0;
      reject("input_scale for static activation scales", "a positive finite number for every expert",
             "none usable for " + missing_scales(weights, missing, total));
    }
  }
}

void validate_plan(const LayerConfig& config, int64_t max_tokens) {
  if (max_tokens < 0 || max_tokens > std::numeric_limits<int32_t>::max() / config.top_k) {
    reject(
        "plan: tokens",
        fmt::format("0 to {} with top-{}", std::numeric_limits<int32_t>::max() / config.top_k, config.top_k),
        max_tokens);
  }
}

void validate_update(const ExpertWeights& current, const ExpertWeights& updated) {
  if (current.count() != updated.count()) reject("update_weights: experts", current.count(), updated.count());
  const auto describe_weight = [](const WeightView& weight) {
    const auto* blocks = std::get_if<BlockScaledView>(&weight);
    return fmt::format(
        "{} {}{}", format_name(weight), shape_text(rows_of(weight), cols_of(weight)),
        blocks && blocks->scale_layout == ScaleLayout::kSwizzled128x4 ? ", swizzled scales" : "");
  };
  const auto require_alike = [&](const Expert& before, const Expert& after) {
    for (const auto member : {&Expert::gate, &Expert::up, &Expert::down}) {
      const std::string expected = describe_weight(before.*member), found = describe_weight(after.*member);
      if (expected != found) reject(fmt::format("update_weights: {}", after.name), expected, found);
    }
  };
  for (size_t e = 0; e < current.experts.size(); ++e) require_alike(current.experts[e], updated.experts[e]);
  if (current.shared && updated.shared) require_alike(current.shared->expert, updated.shared->expert);
}

// M is known only after looking at the ids: taps must have room for T * K rows.
void validate(const MoeLayer& layer, const LayerPlan& plan, const ForwardArgs& args) {
  const LayerConfig& config = layer.config();
  const int64_t tokens = args.routing.tokens();
  if (tokens > plan.max_tokens) {
    reject("tokens", fmt::format("at most {}, as planned", plan.max_tokens), tokens);
  }
  require_matrix("x", args.x, tokens, config.hidden);
  require_matrix("topk_weights", args.routing.topk_weights, tokens, config.top_k);
  std::visit([&](const auto& ids) { require_matrix("topk_ids", ids, tokens, config.top_k); },
             args.routing.topk_ids);
  std::visit([&](const auto& y) { require_matrix("y", y, tokens, config.hidden); }, args.y);
  require_workspace(plan, args.workspace);
  require_taps(args.taps, config, layer.options().activations, tokens, tokens * config.top_k);
  require_shared_taps(args.taps.shared, config, tokens);
}

void validate(const MoeLayer& layer, const LayerPlan& plan, const ExpertsArgs& args) {
  const LayerConfig& config = layer.config();
  if (args.activations.format != layer.options().activations) {
    reject("activations", to_string(layer.options().activations), to_string(args.activations.format));
  }
  const int64_t rows = args.activations.rows;
  if (rows < 0 || rows > plan.max_tokens * config.top_k || args.activations.cols != config.hidden) {
    reject("activations", shape_text(plan.max_tokens * config.top_k, config.hidden) + " at most",
           shape_text(rows, args.activations.cols));
  }
  validate(args.activations, static_cast<size_t>(config.experts));
  if (static_cast<int64_t>(args.group_offsets.size()) != config.experts + 1) {
    reject("group offsets", config.experts + 1, args.group_offsets.size());
  }
  require_matrix("z", args.z, rows, config.hidden);
  require_workspace(plan, args.workspace);
  require_taps(args.taps, config, layer.options().activations, 0, rows);
}

}  // namespace fourfold
