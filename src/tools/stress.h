// layertest --stress: does a backend keep its promises where callers lean on them? Poisoned padding and
// workspaces, empty and crowded experts, no tokens, repeats, calls side by side, graphs, threads, and layers
// split over ranks.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "fourfold/moe_layer.h"
#include "tools/layer_inputs.h"

namespace fourfold {

/// A layer to stress, and the inputs that it is stressed with.
struct StressSubject {
  std::string name;
  ExpertWeights weights;
  std::vector<int64_t> expert_ids;  ///< number of each expert in the checkpoint, for reports
  LayerConfig config;
  LayerOptions options;
  LayerInputs inputs;
};

struct StressRequest {
  const Backend* backend = nullptr;
  std::vector<StressSubject> subjects;
  std::function<void(std::string_view)> progress = [](std::string_view) {};
};

/// One case on one layer.
struct StressCase {
  enum class State : uint8_t { kOk, kFailed, kLeftOut };
  std::string name, layer;
  State state = State::kOk;
  std::string text;  ///< what was found, or why it was left out
};

struct StressReport {
  std::string backend;
  std::vector<StressCase> cases;  ///< layer by layer
};

/// Layers of tiny and odd sizes, with padded rows of weights and with swizzled scales; what lies in between
/// is NaN. `format`: of the activations, with static scales.
std::vector<StressSubject> stress_layers(ActivationFormat format, uint64_t seed);

/// An Error of a case is a failure of the case.
StressReport run_stress(const StressRequest& request);

/// 0 where no case failed, else 3.
int exit_code_of(const StressReport& report);

/// A line a case; a line for every layer where it failed.
std::string format_stress_table(const StressReport& report);
/// The schema of docs/layertest.md, section "--stress".
std::string format_stress_json(const StressReport& report);

}  // namespace fourfold
