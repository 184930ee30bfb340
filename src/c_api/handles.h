// What the opaque handles of fourfold/fourfold.h point to.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "fourfold/checkpoint.h"
#include "fourfold/fourfold.h"
#include "fourfold/model_family.h"
#include "fourfold/moe_layer.h"

namespace fourfold::c_api {

/// Texts of a fourfold_layer_info, and its numbers.
struct LayerFacts {
  std::string family, scheme, activation, router;
  fourfold_layer_info info = {};
};

/// A layer of a checkpoint, loaded as its options say.
struct LoadedLayer {
  ExpertLayer experts;
  LayerRules rules;
  LayerConfig config;
};

/// `experts` as load_experts takes them: empty are all.
LoadedLayer load_layer(const fourfold_checkpoint& checkpoint, int64_t layer,
                       const std::vector<int64_t>& experts = {});

/// nullopt, with the reason in `why_not`, where there is none.
std::optional<CheckpointRouter> load_layer_router(const fourfold_checkpoint& checkpoint, int64_t layer,
                                                  const LoadedLayer& loaded, std::string& why_not);

/// A layer on a backend. Shared by its handle and its workspaces, which may go in any order.
struct MadeLayer {
  std::shared_ptr<const Checkpoint> files;
  BackendChoice choice;
  const Memory* memory = nullptr;  ///< of the device that was the creating thread's current one
  std::unique_ptr<MoeLayer> layer;
  Buffer local_expert_bytes;               ///< where the backend computes
  std::span<const int32_t> local_experts;  ///< as of Routing; empty where it holds all experts
};

}  // namespace fourfold::c_api

struct fourfold_checkpoint {
  std::shared_ptr<const fourfold::Checkpoint> files;
  fourfold::RuleOverrides overrides;
  std::optional<fourfold::GateUpOrder> gate_up_order;
  std::optional<fourfold::WeightScheme> scheme;
  std::vector<int64_t> layers;

  /// Of layers that were asked for; their texts stay where they are.
  mutable std::mutex facts_mutex;
  mutable std::map<int64_t, fourfold::c_api::LayerFacts> facts;
};

struct fourfold_router {
  std::shared_ptr<const fourfold::Checkpoint> files;
  fourfold::CheckpointRouter router;
};

struct fourfold_layer {
  std::shared_ptr<const fourfold::c_api::MadeLayer> made;
};

struct fourfold_workspace {
  std::shared_ptr<const fourfold::c_api::MadeLayer> made;
  fourfold::LayerPlan plan;
  fourfold::Buffer own;  ///< empty where the caller gave memory
  std::span<std::byte> memory;
};
