// A MoE layer as Python holds it: on one backend, with workspaces of its own for callers without any.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "arrays.h"
#include "fourfold/moe_layer.h"

namespace fourfold::python {

/// Buffers that calls borrow and give back: as many as run side by side.
class WorkspacePool {
 public:
  explicit WorkspacePool(const Memory& memory) : memory_(memory) {}
  /// At least `bytes`.
  Buffer take(size_t bytes);
  void give_back(Buffer buffer);

 private:
  const Memory& memory_;
  std::mutex mutex_;
  std::vector<Buffer> free_;
};

/// The arrays of a call, by their names in ForwardArgs; taps by theirs in StageTaps, "staged_x.codes" and so
/// on.
struct ForwardArrays {
  Array x, topk_ids, topk_weights;
  WritableArray y;
  std::optional<WritableArray> workspace, status;
  std::map<std::string, WritableArray> taps;
};

class Layer {
 public:
  /// Throws Error where no backend can compute it. `backend` may be empty, policies too: the defaults.
  Layer(std::shared_ptr<const ExpertWeights> weights, const LayerConfig& config, const LayerOptions& options,
        const std::string& backend);

  const MoeLayer& layer() const { return *layer_; }
  const Backend& backend() const { return *choice_.backend; }
  const std::string& reason() const { return choice_.reason; }
  /// Where it computes.
  Device device() const { return memory_.device(); }

  /// Enqueues (on CPUs: computes). Without a workspace on a GPU it waits for the end of its work, since its
  /// own workspace is used again. Arrays of the host are copied to and from a GPU's memory, and waited for.
  /// Returns the status on CPUs and after a wait, where `status` is absent; else 0.
  int32_t forward(const LayerPlan& plan, const ForwardArrays& arrays, void* stream);
  /// Replaces the weights in place.
  void update_weights(std::shared_ptr<const ExpertWeights> weights);

 private:
  BackendChoice choice_;
  const Memory& memory_;
  std::unique_ptr<MoeLayer> layer_;
  WorkspacePool pool_;
};

}  // namespace fourfold::python
