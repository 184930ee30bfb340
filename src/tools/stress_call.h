// A call of a layer with chosen surroundings: what lies between rows, behind the last one and in the
// workspace before it.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "fourfold/moe_layer.h"
#include "tools/layer_inputs.h"

namespace fourfold {

struct CallSettings {
  int64_t padding = 0;         ///< elements of NaN (of ids: of a number far out of range) behind every row
  uint8_t workspace_byte = 0;  ///< the workspace before the call
  bool float_output = false;
  bool wide_ids = false;  ///< int64
  std::span<const int32_t> local_experts = {};
};

/// What a call wrote.
struct CallOutput {
  std::vector<std::byte> y;  ///< [T, H] without padding, bf16 or float32
  int32_t status = 0;
  std::string trespass;  ///< where it wrote and must not; empty where it kept within its bounds

  std::vector<float> values(bool is_float) const;
};

/// Buffers where the backend computes, at fixed addresses; what they hold can change between calls.
class StressCall {
 public:
  StressCall(const MoeLayer& layer, const Memory& memory, int64_t max_tokens, const CallSettings& settings);

  void set(const LayerInputs& inputs);
  /// Enqueues one call; may be called from any thread.
  void enqueue(void* stream) const;
  /// Waits.
  CallOutput output() const;

 private:
  int64_t y_element() const { return settings_.float_output ? 4 : 2; }

  const MoeLayer& layer_;
  const Memory& memory_;
  CallSettings settings_;
  LayerPlan plan_;
  int64_t max_tokens_ = 0, tokens_ = 0;
  Buffer x_, ids_, weights_, y_, workspace_, status_, local_experts_;
};

/// One call from beginning to end.
CallOutput call_layer(const MoeLayer& layer, const Memory& memory, const LayerInputs& inputs,
                      const CallSettings& settings = {});

}  // namespace fourfold
