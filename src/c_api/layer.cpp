// Layers, workspaces and forward passes through the C interface.
#include <algorithm>
#include <functional>

#include "c_api/guard.h"
#include "c_api/handles.h"

using namespace fourfold;

static_assert(FOURFOLD_WORKSPACE_ALIGNMENT == kWorkspaceAlignment);
static_assert(static_cast<int>(FOURFOLD_EXPERT_OUT_OF_RANGE) == kStatusExpertOutOfRange);
// bf16 values cross the interface as their bits.
static_assert(sizeof(Bf16) == sizeof(uint16_t) && alignof(Bf16) == alignof(uint16_t));

namespace {

using c_api::LoadedLayer;
using c_api::MadeLayer;

bool is_on_device(const MadeLayer& made) {
  return made.memory->device().kind != Device::Kind::kHost;
}

/// Empty: all of them.
std::vector<int64_t> experts_in(const fourfold_layer_options& options) {
  if (options.expert_count < 0) reject("expert_count", "at least 0", options.expert_count);
  if (options.experts == nullptr && options.expert_count == 0) return {};
  c_api::require_array(options.experts, options.expert_count, "experts");
  if (options.expert_count == 0) reject("experts", "at least one, or null for all", "none");
  std::vector<int64_t> experts(options.experts, options.experts + options.expert_count);
  if (std::adjacent_find(experts.begin(), experts.end(), std::greater_equal<>()) != experts.end()) {
    reject("experts", "ascending numbers", fmt::format("{}", fmt::join(experts, ", ")));
  }
  return experts;
}

ScalePolicy policy_in(const char* text, const char* what, ScalePolicy otherwise) {
  return c_api::parse_option(text, parse_scale_policy, what,
                             "static, max-over-experts, dynamic-tensor or dynamic-token")
      .value_or(otherwise);
}

std::optional<float> max_scale_in(float scale, const char* what) {
  if (scale == 0.0f) return std::nullopt;
  if (!is_usable_input_scale(scale)) reject(what, "a positive finite number", scale);
  return scale;
}

LayerOptions layer_options_in(const fourfold_layer_options& options, const ExpertWeights& weights) {
  LayerOptions made;
  made.activations = c_api::parse_option(options.activations, parse_activation_format, "activations",
                                         "nvfp4, nvfp4x2, fp8 or bf16")
                         .value_or(ActivationFormat::kNvfp4);
  const std::string x = c_api::text_or_empty(options.x_scale),
                    intermediate = c_api::text_or_empty(options.intermediate_scale);
  if (!is_nvfp4(made.activations) && !(x.empty() && intermediate.empty())) {
    reject("x_scale and intermediate_scale", fmt::format("none with {}", to_string(made.activations)),
           fmt::format("'{}' and '{}'", x, intermediate));
  }
  made.activation_rule = c_api::parse_option(options.activation_rule, parse_scale_rule, "activation_rule",
                                             "amax, four-over-six or mse")
                             .value_or(ScaleRule::kAmax);
  // Asked for only where it is needed: without usable input scales there is no default.
  const bool both_given = !x.empty() && !intermediate.empty();
  const DefaultPolicies defaults =
      both_given ? DefaultPolicies() : default_scale_policies(weights, made.activations);
  made.x_scale = policy_in(options.x_scale, "x_scale", defaults.x);
  made.intermediate_scale =
      policy_in(options.intermediate_scale, "intermediate_scale", defaults.intermediate);
  made.x_max_scale = max_scale_in(options.x_max_scale, "x_max_scale");
  made.intermediate_max_scale = max_scale_in(options.intermediate_max_scale, "intermediate_max_scale");
  return made;
}

void adapt(LoadedLayer& loaded, const fourfold_layer_options& options) {
  if (options.top_k < 0) reject("top_k", "at least 1, or 0 for the router's", options.top_k);
  if (options.top_k > 0) loaded.config.top_k = options.top_k;
  if (loaded.config.top_k == 0) {
    fail(ErrorCode::kInvalidArgument,
         "top_k: expected the number of experts of a token, which nothing in the checkpoint tells, found 0");
  }
  if (options.omit_shared != 0) {
    loaded.experts.weights.shared.reset();
    loaded.config.shared_intermediate = 0;
  }
}

/// The model's expert numbers to this layer's, where it does not hold all of them.
void map_experts(const ExpertLayer& experts, MadeLayer& made) {
  if (experts.weights.count() == experts.experts_in_checkpoint) return;
  const int64_t largest = std::max(experts.experts_in_checkpoint - 1, experts.expert_ids.back());
  std::vector<int32_t> local(static_cast<size_t>(largest + 1), static_cast<int32_t>(kAbsentExpert));
  for (size_t e = 0; e < experts.expert_ids.size(); ++e) {
    local[static_cast<size_t>(experts.expert_ids[e])] = static_cast<int32_t>(e);
  }
  const size_t bytes = local.size() * sizeof(int32_t);
  made.local_expert_bytes = made.memory->allocate(bytes);
  made.memory->copy_from_host(made.local_expert_bytes.data(), local.data(), bytes);
  made.local_experts = {reinterpret_cast<const int32_t*>(made.local_expert_bytes.data()), local.size()};
}

std::shared_ptr<const MadeLayer> make_layer(const fourfold_checkpoint& checkpoint, int64_t layer,
                                            const fourfold_layer_options& options) {
  LoadedLayer loaded = c_api::load_layer(checkpoint, layer, experts_in(options));
  adapt(loaded, options);
  const LayerOptions layer_options = layer_options_in(options, loaded.experts.weights);
  auto made = std::make_shared<MadeLayer>();
  made->files = checkpoint.files;
  made->choice = choose_backend(c_api::text_or_empty(options.backend), loaded.experts.weights, loaded.config,
                                layer_options);
  made->memory = &made->choice.backend->memory();
  made->layer = made->choice.backend->make_layer(loaded.experts.weights, loaded.config, layer_options);
  map_experts(loaded.experts, *made);
  checkpoint.files->require_intact();
  return made;
}

/// One of two arrays; neither will do where they would be empty.
template <class First, class Second>
void require_one(const First* first, const Second* second, int64_t tokens, const char* what) {
  if (first != nullptr && second != nullptr) reject(what, "one of them", "both");
  if (first == nullptr && second == nullptr && tokens > 0) reject(what, "one of them", "neither");
}

template <class To, class From>
MatrixView<To> matrix(From* data, int64_t rows, int64_t cols, int64_t stride, Device device) {
  return {reinterpret_cast<To*>(data), rows, cols, stride == 0 ? cols : stride, device};
}

ForwardArgs forward_args(const MadeLayer& made, const fourfold_workspace& workspace,
                         const fourfold_forward_args& given) {
  const int64_t tokens = given.tokens, hidden = made.layer->config().hidden,
                top_k = made.layer->config().top_k;
  if (tokens < 0) reject("tokens", "at least 0", tokens);
  require_one(given.topk_ids, given.topk_ids_i64, tokens, "topk_ids and topk_ids_i64");
  require_one(given.y, given.y_f32, tokens, "y and y_f32");
  if (given.stream != nullptr && !is_on_device(made)) {
    reject("stream", fmt::format("null for the backend '{}'", made.choice.backend->name()), "a stream");
  }
  const Device device = made.memory->device();
  ForwardArgs args;
  args.x = matrix<const Bf16>(given.x, tokens, hidden, given.x_stride, device);
  if (given.topk_ids_i64 != nullptr) {
    args.routing.topk_ids = matrix<const int64_t>(given.topk_ids_i64, tokens, top_k, 0, device);
  } else {
    args.routing.topk_ids = matrix<const int32_t>(given.topk_ids, tokens, top_k, 0, device);
  }
  args.routing.topk_weights = matrix<const float>(given.topk_weights, tokens, top_k, 0, device);
  args.routing.local_experts = made.local_experts;
  if (given.y_f32 != nullptr) {
    args.y = matrix<float>(given.y_f32, tokens, hidden, given.y_stride, device);
  } else {
    args.y = matrix<Bf16>(given.y, tokens, hidden, given.y_stride, device);
  }
  args.workspace = workspace.memory;
  args.stream = given.stream;
  args.status = given.status;
  return args;
}

}  // namespace

fourfold_status fourfold_layer_create(const fourfold_checkpoint* checkpoint, int64_t layer,
                                      const fourfold_layer_options* options, fourfold_layer** created) {
  return c_api::guarded([&] {
    const fourfold_checkpoint& opened = c_api::required(checkpoint, "checkpoint");
    c_api::required(created, "created");
    const auto known = c_api::read_struct(options, "fourfold_layer_options");
    auto handle = std::make_unique<fourfold_layer>();
    handle->made = make_layer(opened, layer, known);
    *created = handle.release();
  });
}

void fourfold_layer_destroy(fourfold_layer* layer) {
  delete layer;
}

fourfold_status fourfold_layer_describe(const fourfold_layer* layer,
                                        fourfold_layer_description* description) {
  return c_api::guarded([&] {
    const MadeLayer& made = *c_api::required(layer, "layer").made;
    fourfold_layer_description known = {};
    known.hidden = made.layer->config().hidden;
    known.experts = made.layer->config().experts;
    known.top_k = made.layer->config().top_k;
    known.on_device = is_on_device(made);
    known.device = made.memory->device().index;
    // Names are literals, so that they end with a zero.
    known.backend = made.choice.backend->name().data();
    known.reason = made.choice.reason.c_str();
    known.activations = to_string(made.layer->options().activations).data();
    known.x_scale = to_string(made.layer->options().x_scale).data();
    known.intermediate_scale = to_string(made.layer->options().intermediate_scale).data();
    known.activation_rule = to_string(made.layer->options().activation_rule).data();
    c_api::write_struct(known, description, "fourfold_layer_description");
  });
}

fourfold_status fourfold_workspace_bytes(const fourfold_layer* layer, int64_t max_tokens, size_t* bytes) {
  return c_api::guarded([&] {
    const MadeLayer& made = *c_api::required(layer, "layer").made;
    c_api::required(bytes, "bytes") = made.layer->plan(max_tokens).workspace_bytes;
  });
}

fourfold_status fourfold_workspace_create(const fourfold_layer* layer, int64_t max_tokens, void* memory,
                                          size_t bytes, fourfold_workspace** workspace) {
  return c_api::guarded([&] {
    const auto& made = c_api::required(layer, "layer").made;
    c_api::required(workspace, "workspace");
    if (memory == nullptr && bytes != 0) {
      reject("workspace memory", "bytes 0 beside null", fmt::format("{} bytes", bytes));
    }
    auto handle = std::make_unique<fourfold_workspace>();
    handle->made = made;
    handle->plan = made->layer->plan(max_tokens);
    if (memory == nullptr) {
      handle->own = made->memory->allocate(handle->plan.workspace_bytes);
      memory = handle->own.data();
      bytes = handle->plan.workspace_bytes;
    }
    if (bytes < handle->plan.workspace_bytes) {
      reject("workspace memory", fmt::format("{} bytes", handle->plan.workspace_bytes), bytes);
    }
    if (reinterpret_cast<uintptr_t>(memory) % kWorkspaceAlignment != 0) {
      reject("workspace memory", fmt::format("an address that is a multiple of {}", kWorkspaceAlignment),
             fmt::format("{}", memory));
    }
    handle->memory = {static_cast<std::byte*>(memory), bytes};
    *workspace = handle.release();
  });
}

void fourfold_workspace_destroy(fourfold_workspace* workspace) {
  delete workspace;
}

fourfold_status fourfold_workspace_describe(const fourfold_workspace* workspace,
                                            fourfold_workspace_info* info) {
  return c_api::guarded([&] {
    const fourfold_workspace& made = c_api::required(workspace, "workspace");
    fourfold_workspace_info known = {};
    known.max_tokens = made.plan.max_tokens;
    known.bytes = made.memory.size();
    known.kernel = made.plan.kernel.c_str();
    known.reason = made.plan.reason.c_str();
    c_api::write_struct(known, info, "fourfold_workspace_info");
  });
}

fourfold_status fourfold_forward(const fourfold_layer* layer, fourfold_workspace* workspace,
                                 const fourfold_forward_args* args) {
  return c_api::guarded([&] {
    const MadeLayer& made = *c_api::required(layer, "layer").made;
    const fourfold_workspace& scratch = c_api::required(workspace, "workspace");
    const auto known = c_api::read_struct(&c_api::required(args, "args"), "fourfold_forward_args");
    if (scratch.made.get() != &made) reject("workspace", "one that was made for this layer", "another's");
    made.layer->forward(scratch.plan, forward_args(made, scratch, known));
  });
}
