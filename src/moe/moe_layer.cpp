// The ordered list of backends, the choice among them, and the checks that all of them share.
#include "fourfold/moe_layer.h"

#include <algorithm>
#include <array>
#include <cstdlib>
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

std::string why_not(const Backend& backend, const ExpertWeights& weights, const LayerConfig& config,
                    const LayerOptions& options) {
  const std::string unavailable = backend.why_unavailable();
  return unavailable.empty() ? backend.why_unsupported(weights, config, options) : unavailable;
}

/// Names of experts without a usable scale, as `expert tensor (value)`, at most `kShown` of them.
std::string missing_scales(const ExpertWeights& weights, int64_t& missing, int64_t& total) {
  constexpr int64_t kShown = 6;
  std::string names;
  for (const Expert& expert : weights.experts) {
    const std::pair<const char*, std::optional<float>> scales[] = {
        {"gate", expert.gate_input_scale}, {"up", expert.up_input_scale}, {"down", expert.down_input_scale}};
    for (const auto& [which, scale] : scales) {
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

void require_workspace(const LayerPlan& plan, std::span<std::byte> workspace) {
  if (workspace.size() < plan.workspace_bytes) {
    reject("workspace", fmt::format("{} bytes, as planned", plan.workspace_bytes), workspace.size());
  }
}

}  // namespace

std::span<const Backend* const> backends() {
  static const std::array<const Backend*, 1> list = {&reference_backend()};
  return list;
}

const Backend& find_backend(std::string_view name) {
  for (const Backend* backend : backends()) {
    if (backend->name() == name) return *backend;
  }
  reject("backend", "one of those compiled in: " + names_of(backends()), fmt::format("'{}'", name));
}

BackendChoice choose_backend(std::string_view forced, const ExpertWeights& weights, const LayerConfig& config,
                             const LayerOptions& options) {
  std::string origin = "--backend";
  if (forced.empty()) {
    const char* variable = std::getenv(kBackendVariable);
    forced = variable ? variable : "";
    origin = kBackendVariable;
  }
  if (!forced.empty()) {
    const Backend& backend = find_backend(forced);
    const std::string reason = why_not(backend, weights, config, options);
    if (reason.empty()) return {&backend, "forced by " + origin};
    std::string message = fmt::format("backend '{}' can't run this layer: {}", forced, reason);
    for (const Backend* other : backends()) {
      if (other == &backend) continue;
      const std::string other_reason = why_not(*other, weights, config, options);
      message += fmt::format("; {}: {}", other->name(), other_reason.empty() ? "can run it" : other_reason);
    }
    throw Error(ErrorCode::kUnsupported, message);
  }
  std::string passed_over;
  for (const Backend* backend : backends()) {
    const std::string reason = why_not(*backend, weights, config, options);
    if (reason.empty()) {
      return {backend,
              passed_over.empty() ? "first of: " + names_of(backends()) : "passed over " + passed_over};
    }
    passed_over += fmt::format("{}{}: {}", passed_over.empty() ? "" : "; ", backend->name(), reason);
  }
  fail(ErrorCode::kUnsupported, "no backend can run this layer: {}", passed_over);
}

DefaultPolicies default_scale_policies(const ExpertWeights& weights, ActivationFormat format) {
  if (!is_nvfp4(format)) return {};
  int64_t missing = 0, total = 0;
  const std::string names = missing_scales(weights, missing, total);
  if (missing == 0 && total > 0) return {ScalePolicy::kStatic, ScalePolicy::kStatic};
  const auto has_any = [](const Expert& e) {
    return e.gate_input_scale || e.up_input_scale || e.down_input_scale;
  };
  if (std::none_of(weights.experts.begin(), weights.experts.end(), has_any)) return {};
  fail(ErrorCode::kInvalidArgument,
       "input_scale: expected a positive finite number for every expert, found none usable for {}; "
       "calibrate again, or choose --activation-scale dynamic-token",
       names);
}

void validate(const ExpertWeights& weights, const LayerConfig& config, const LayerOptions& options) {
  validate(weights);
  if (config.hidden != weights.hidden || config.intermediate != weights.intermediate) {
    reject("layer shape (H, I)", shape_text(config.hidden, config.intermediate),
           shape_text(weights.hidden, weights.intermediate));
  }
  if (config.experts != weights.count()) {
    reject("experts", config.experts, weights.count());
  }
  if (config.top_k < 1) reject("top_k", "at least 1", config.top_k);
  if (!is_nvfp4(options.activations)) return;
  if (config.hidden % 16 != 0 || config.intermediate % 16 != 0) {
    reject("H and I for nvfp4 activations", "multiples of 16",
           shape_text(config.hidden, config.intermediate));
  }
  const auto is_static = [](ScalePolicy p) {
    return p == ScalePolicy::kStatic || p == ScalePolicy::kMaxOverExperts;
  };
  for (const Expert& expert : weights.experts) {
    const bool x_usable =
        is_usable_input_scale(expert.gate_input_scale) && is_usable_input_scale(expert.up_input_scale);
    if ((is_static(options.x_scale) && !x_usable) ||
        (is_static(options.intermediate_scale) && !is_usable_input_scale(expert.down_input_scale))) {
      int64_t missing = 0, total = 0;
      reject("input_scale for static activation scales", "a positive finite number for every expert",
             "none usable for " + missing_scales(weights, missing, total));
    }
  }
}

void validate(const MoeLayer& layer, const LayerPlan& plan, const ForwardArgs& args) {
  const LayerConfig& config = layer.config();
  const int64_t tokens = args.routing.tokens();
  if (tokens > plan.max_tokens) {
    reject("tokens", fmt::format("at most {}, as planned", plan.max_tokens), tokens);
  }
  if (args.x.rows != tokens || args.x.cols != config.hidden) {
    reject("x", shape_text(tokens, config.hidden), shape_text(args.x.rows, args.x.cols));
  }
  std::visit(
      [&](const auto& ids) {
        if (ids.rows != tokens || ids.cols != config.top_k) {
          reject("topk_ids", shape_text(tokens, config.top_k), shape_text(ids.rows, ids.cols));
        }
      },
      args.routing.topk_ids);
  if (args.routing.top_k() != config.top_k) {
    reject("topk_weights", shape_text(tokens, config.top_k), shape_text(tokens, args.routing.top_k()));
  }
  std::visit(
      [&](const auto& y) {
        if (y.rows != tokens || y.cols != config.hidden) {
          reject("y", shape_text(tokens, config.hidden), shape_text(y.rows, y.cols));
        }
      },
      args.y);
  require_workspace(plan, args.workspace);
}

void validate(const MoeLayer& layer, const LayerPlan& plan, const ExpertsArgs& args) {
  const LayerConfig& config = layer.config();
  if (args.activations.format != layer.options().activations) {
    reject("activations", to_string(layer.options().activations), to_string(args.activations.format));
  }
  if (args.activations.rows > plan.max_tokens * config.top_k || args.activations.cols != config.hidden) {
    reject("activations", shape_text(plan.max_tokens * config.top_k, config.hidden) + " at most",
           shape_text(args.activations.rows, args.activations.cols));
  }
  if (static_cast<int64_t>(args.group_offsets.size()) != config.experts + 1) {
    reject("group offsets", config.experts + 1, args.group_offsets.size());
  }
  if (args.z.rows != args.activations.rows || args.z.cols != config.hidden) {
    reject("z", shape_text(args.activations.rows, config.hidden), shape_text(args.z.rows, args.z.cols));
  }
  require_workspace(plan, args.workspace);
}

}  // namespace fourfold
