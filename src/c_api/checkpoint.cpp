// Checkpoints through the C interface.
#include "fourfold/checkpoint.h"

#include <algorithm>

#include "c_api/guard.h"
#include "c_api/handles.h"

namespace fourfold::c_api {

LoadedLayer load_layer(const fourfold_checkpoint& checkpoint, int64_t layer,
                       const std::vector<int64_t>& experts) {
  LoadedLayer loaded;
  loaded.experts =
      load_experts(checkpoint.files, layer, experts, checkpoint.gate_up_order, checkpoint.scheme);
  loaded.rules = rules_of(checkpoint.files->config(), checkpoint.overrides);
  loaded.config = layer_config(loaded.experts, loaded.rules);
  return loaded;
}

std::optional<CheckpointRouter> load_layer_router(const fourfold_checkpoint& checkpoint, int64_t layer,
                                                  const LoadedLayer& loaded, std::string& why_not) {
  if (!loaded.rules.router) {
    why_not = fmt::format("nothing says how the router of {} works; name it in the checkpoint's options",
                          identity(checkpoint.files->config()));
    return std::nullopt;
  }
  return load_router(*checkpoint.files, layer, loaded.experts.experts_in_checkpoint,
                     loaded.experts.weights.hidden, *loaded.rules.router, loaded.rules.router_bias, why_not);
}

namespace {

LayerFacts facts_of(const fourfold_checkpoint& checkpoint, int64_t layer) {
  const LoadedLayer loaded = load_layer(checkpoint, layer);
  LayerFacts facts;
  facts.family = loaded.rules.family;
  facts.scheme = loaded.experts.scheme;
  facts.activation = describe(loaded.rules.activation);
  std::string why_not;
  if (const auto router = load_layer_router(checkpoint, layer, loaded, why_not)) {
    facts.router = describe_router(loaded.rules, router->hash_table != nullptr);
  }
  facts.info.hidden = loaded.config.hidden;
  facts.info.intermediate = loaded.config.intermediate;
  facts.info.experts = loaded.experts.experts_in_checkpoint;
  facts.info.top_k = loaded.config.top_k;
  facts.info.shared_intermediate = loaded.config.shared_intermediate;
  facts.info.gated = is_gated(loaded.config.activation.kind);
  facts.info.weight_on_input = loaded.config.weight_on_input;
  checkpoint.files->require_intact();
  return facts;
}

RuleOverrides overrides_of(const fourfold_checkpoint_options& options) {
  RuleOverrides overrides;
  const std::string activation = text_or_empty(options.activation), router = text_or_empty(options.router);
  if (!activation.empty()) overrides.activation = parse_activation(activation);
  if (!router.empty()) overrides.router = parse_router(router);
  overrides.weight_on_input = options.weight_on_input != 0;
  return overrides;
}

}  // namespace
}  // namespace fourfold::c_api

using namespace fourfold;

fourfold_status fourfold_checkpoint_open(const char* path, const fourfold_checkpoint_options* options,
                                         fourfold_checkpoint** checkpoint) {
  return c_api::guarded([&] {
    c_api::required(path, "path");
    c_api::required(checkpoint, "checkpoint");
    const auto known = c_api::read_struct(options, "fourfold_checkpoint_options");
    auto opened = std::make_unique<fourfold_checkpoint>();
    opened->scheme = c_api::parse_option(known.scheme, parse_weight_scheme, "scheme",
                                         "modelopt, compressed-tensors or mxfp4");
    opened->gate_up_order = c_api::parse_option(known.gate_up_order, parse_gate_up_order, "gate_up_order",
                                                "gate-first, up-first or interleaved");
    opened->overrides = c_api::overrides_of(known);
    opened->files = Checkpoint::open(path);
    opened->layers = layers_with_experts(*opened->files);
    *checkpoint = opened.release();
  });
}

void fourfold_checkpoint_close(fourfold_checkpoint* checkpoint) {
  delete checkpoint;
}

fourfold_status fourfold_checkpoint_layers(const fourfold_checkpoint* checkpoint, int64_t* layers,
                                           int64_t capacity, int64_t* count) {
  return c_api::guarded([&] {
    const std::vector<int64_t>& all = c_api::required(checkpoint, "checkpoint").layers;
    c_api::required(count, "count");
    if (capacity < 0) reject("capacity", "at least 0", capacity);
    c_api::require_array(layers, capacity, "layers");
    const auto total = static_cast<int64_t>(all.size());
    std::copy_n(all.begin(), std::min(capacity, total), layers);
    *count = total;
  });
}

fourfold_status fourfold_checkpoint_layer(const fourfold_checkpoint* checkpoint, int64_t layer,
                                          fourfold_layer_info* info) {
  return c_api::guarded([&] {
    const fourfold_checkpoint& opened = c_api::required(checkpoint, "checkpoint");
    const std::lock_guard lock(opened.facts_mutex);
    auto found = opened.facts.find(layer);
    if (found == opened.facts.end()) {
      found = opened.facts.emplace(layer, c_api::facts_of(opened, layer)).first;
    }
    const c_api::LayerFacts& facts = found->second;
    fourfold_layer_info known = facts.info;
    known.family = facts.family.c_str();
    known.scheme = facts.scheme.c_str();
    known.activation = facts.activation.c_str();
    known.router = facts.router.c_str();
    c_api::write_struct(known, info, "fourfold_layer_info");
  });
}
