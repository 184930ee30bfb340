#include "c_api_expected.h"

#include <algorithm>
#include <cstdio>

#include "fourfold/checkpoint.h"
#include "fourfold/model_family.h"
#include "fourfold/moe_layer.h"
#include "tools/synthesize.h"

using namespace fourfold;

namespace {

template <class Body>
int report(const Body& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "the C++ interface: %s\n", error.what());
    return 1;
  }
}

}  // namespace

int make_model(const char* directory) {
  return report([&] {
    SynthesizeRequest request;
    request.directory = directory;
    request.experts = 8;
    request.hidden = 128;
    request.intermediate = 64;
    request.top_k = 2;
    request.layers = 2;
    request.whole_family = true;
    request.tokens = 4;
    request.force = true;
    synthesize(request);
  });
}

int expected_forward(const char* model, int64_t layer, const char* activations, const int64_t* experts,
                     int64_t expert_count, int omit_shared, int64_t tokens, const uint16_t* x,
                     const int32_t* topk_ids, const float* topk_weights, uint16_t* y) {
  return report([&] {
    const auto checkpoint = Checkpoint::open(model);
    ExpertLayer loaded = load_experts(checkpoint, layer, {experts, experts + expert_count});
    LayerConfig config = layer_config(loaded, rules_of(checkpoint->config()));
    if (omit_shared) {
      loaded.weights.shared.reset();
      config.shared_intermediate = 0;
    }
    LayerOptions options;
    options.activations = parse_activation_format(activations).value();
    const DefaultPolicies policies = default_scale_policies(loaded.weights, options.activations);
    options.x_scale = policies.x;
    options.intermediate_scale = policies.intermediate;
    const auto made = cpu_backend().make_layer(loaded.weights, config, options);
    const LayerPlan plan = made->plan(tokens);
    const Buffer workspace = host_memory().allocate(plan.workspace_bytes);
    ForwardArgs args;
    args.x = {reinterpret_cast<const Bf16*>(x), tokens, config.hidden};
    args.routing.topk_ids = MatrixView<const int32_t>(topk_ids, tokens, config.top_k);
    args.routing.topk_weights = {topk_weights, tokens, config.top_k};
    args.y = MatrixView<Bf16>(reinterpret_cast<Bf16*>(y), tokens, config.hidden);
    args.workspace = {workspace.data(), workspace.bytes()};
    made->forward(plan, args);
  });
}

int expected_routing(const char* model, int64_t layer, int64_t tokens, const uint16_t* x,
                     const int64_t* token_ids, float* logits, int32_t* topk_ids, float* topk_weights) {
  return report([&] {
    const auto checkpoint = Checkpoint::open(model);
    const LayerRules rules = rules_of(checkpoint->config());
    std::string why_not;
    const CheckpointRouter router =
        load_router(*checkpoint, layer, 8, 128, rules.router.value(), rules.router_bias, why_not).value();
    const MatrixView<const Bf16> rows(reinterpret_cast<const Bf16*>(x), tokens, 128);
    const std::vector<float> all = router_logits(rows, router.weights);
    const RoutingDecision decision =
        route(router.config, router.weights, rows, {token_ids, static_cast<size_t>(tokens)});
    std::copy(all.begin(), all.end(), logits);
    std::copy(decision.topk_ids.begin(), decision.topk_ids.end(), topk_ids);
    std::copy(decision.topk_weights.begin(), decision.topk_weights.end(), topk_weights);
  });
}
