// Routers through the C interface.
#include "fourfold/router.h"

#include <algorithm>

#include "c_api/guard.h"
#include "c_api/handles.h"

using namespace fourfold;

namespace {

int64_t experts_of(const fourfold_router& router) {
  return router.router.weights.weight.rows;
}

void require_tokens(int64_t tokens) {
  if (tokens < 0) reject("tokens", "at least 0", tokens);
}

}  // namespace

fourfold_status fourfold_router_create(const fourfold_checkpoint* checkpoint, int64_t layer,
                                       fourfold_router** router) {
  return c_api::guarded([&] {
    const fourfold_checkpoint& opened = c_api::required(checkpoint, "checkpoint");
    c_api::required(router, "router");
    const c_api::LoadedLayer loaded = c_api::load_layer(opened, layer);
    std::string why_not;
    auto found = c_api::load_layer_router(opened, layer, loaded, why_not);
    if (!found) {
      fail(ErrorCode::kNotFound, "{}, layer {}: expected a router, found none: {}",
           opened.files->path().string(), layer, why_not);
    }
    *router = std::make_unique<fourfold_router>(opened.files, std::move(*found)).release();
  });
}

void fourfold_router_destroy(fourfold_router* router) {
  delete router;
}

fourfold_status fourfold_router_describe(const fourfold_router* router, fourfold_router_info* info) {
  return c_api::guarded([&] {
    const fourfold_router& made = c_api::required(router, "router");
    fourfold_router_info known = {};
    known.hidden = made.router.weights.weight.cols;
    known.experts = experts_of(made);
    known.top_k = made.router.config.top_k;
    known.vocabulary = made.router.weights.experts_of_token.rows;
    c_api::write_struct(known, info, "fourfold_router_info");
  });
}

fourfold_status fourfold_router_logits(const fourfold_router* router, const uint16_t* x, int64_t tokens,
                                       float* logits) {
  return c_api::guarded([&] {
    const fourfold_router& made = c_api::required(router, "router");
    require_tokens(tokens);
    c_api::require_array(x, tokens, "x");
    c_api::require_array(logits, tokens, "logits");
    const MatrixView<const Bf16> rows(reinterpret_cast<const Bf16*>(x), tokens,
                                      made.router.weights.weight.cols);
    const std::vector<float> computed = router_logits(rows, made.router.weights);
    std::copy(computed.begin(), computed.end(), logits);
  });
}

fourfold_status fourfold_route(const fourfold_router* router, const float* logits, int64_t tokens,
                               const int64_t* token_ids, int32_t* topk_ids, float* topk_weights) {
  return c_api::guarded([&] {
    const fourfold_router& made = c_api::required(router, "router");
    require_tokens(tokens);
    c_api::require_array(logits, tokens, "logits");
    c_api::require_array(topk_ids, tokens, "topk_ids");
    c_api::require_array(topk_weights, tokens, "topk_weights");
    if (!made.router.weights.experts_of_token.empty()) c_api::require_array(token_ids, tokens, "token_ids");
    const RoutingDecision decision = route(
        made.router.config, made.router.weights, MatrixView<const float>(logits, tokens, experts_of(made)),
        std::span(token_ids, token_ids == nullptr ? 0 : static_cast<size_t>(tokens)));
    std::copy(decision.topk_ids.begin(), decision.topk_ids.end(), topk_ids);
    std::copy(decision.topk_weights.begin(), decision.topk_weights.end(), topk_weights);
  });
}
