// How the tokens of a test are routed: as the input says, by the checkpoint's own router, or at random.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fourfold/checkpoint.h"
#include "fourfold/model_family.h"
#include "tools/layer_inputs.h"

namespace fourfold {

struct RoutingTask {
  const Checkpoint& checkpoint;
  int64_t layer = 0;
  const ExpertLayer& experts;  ///< those under test
  const LayerRules& rules;
  bool router_given = false;  ///< on the command line: then there must be one
  uint64_t seed = 0;          ///< of random routings and made-up token ids
  /// Whether a random routing will do where the input has none and the checkpoint has no router.
  bool may_be_random = true;
};

/// Fills in what `inputs` lack of top_k, topk_ids, topk_weights and routing_origin, and makes ids positions
/// among the experts under test; -1 for the others. Returns notes for the report. Throws Error where the
/// rules do not say how to route, and for ids and routers that do not fit the checkpoint.
std::vector<std::string> route_inputs(const RoutingTask& task, LayerInputs& inputs);

}  // namespace fourfold
