// When a layer goes through the fused kernel, and what it needs: no GPU.
#include "sm90/fused_layer.h"

#include <algorithm>

#include "sm90/fused_layer_layout.h"

namespace fourfold::sm90 {

namespace {

/// What two buffers of token rows take of shared memory, at most; and more rows to a tile would leave too few
/// buffers for short ones.
constexpr int64_t kTokenBytes = 120 * 1024;
constexpr int64_t kMostTileTokens = 4;

bool is_computed(const LayerConfig& config, const LayerOptions& options) {
  const bool known_scales = options.activations == ActivationFormat::kNvfp4 &&
                            (options.intermediate_scale == ScalePolicy::kStatic ||
                             options.intermediate_scale == ScalePolicy::kMaxOverExperts);
  return (options.activations == ActivationFormat::kBf16 || known_scales) &&
         config.activation.kind == ActivationKind::kSwiglu && !config.weight_on_input &&
         config.hidden % kUnitDepth == 0 && config.intermediate % kUnitDepth == 0 &&
         config.experts <= kMostFusedExperts && fused_tile_tokens(config.hidden, config.intermediate) > 0;
}

}  // namespace

int32_t fused_tile_tokens(int64_t hidden, int64_t intermediate) {
  const int64_t row_bytes = std::max(hidden, intermediate) * static_cast<int64_t>(sizeof(Bf16)) + 16;
  return static_cast<int32_t>(std::min(kTokenBytes / (2 * row_bytes), kMostTileTokens));
}

bool can_fuse(const LayerConfig& config, const LayerOptions& options, int64_t slots) {
  if (slots == 0 || config.experts == 0 || !is_computed(config, options)) return false;
  if (slots > kMostFusedSlots) return false;
  if (slots <= config.top_k) return true;  // one token has a row an expert
  const PackedShape gate_up{RowOrder::kGateUpPaired, config.intermediate, config.hidden};
  const PackedShape down{RowOrder::kPlain, config.hidden, config.intermediate};
  const int64_t tile = fused_tile_tokens(config.hidden, config.intermediate);
  const int64_t most_bytes = slots <= kFusedMostOwnRows ? kMostFusedBytesOfHandful : kMostFusedBytes;
  return 3 * slots <= config.experts * tile && slots * (gate_up.bytes() + down.bytes()) <= most_bytes;
}

bool can_read_in_place(const MatrixView<const Bf16>& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride % 8 == 0;
}

int64_t fused_counters(int64_t slots, int64_t hidden) {
  return 1 + slots + (hidden + kUnitRows - 1) / kUnitRows;
}

std::string describe_fused_layer() {
  return "sm90 fused: both GEMMs, activation and combine in one kernel, 64 rows x up to 4 tokens, "
         "k split over 4 warpgroups";
}

}  // namespace fourfold::sm90
