// Sizes of the fused layer kernel and where its shared memory lies: plain functions for host and device,
// tested on the CPU.
#pragma once

#include <cstdint>

#include "sm90/fused_layer.h"
#include "sm90/packed_layout.h"

namespace fourfold::sm90 {

inline constexpr int kFusedParts = 4;      ///< consumer warpgroups; each has every fourth k unit
inline constexpr int kFusedFinishers = 4;  ///< warps that finish tiles, in turns
inline constexpr int kFusedThreads = 128 * kFusedParts + 32 * (3 + kFusedFinishers);
inline constexpr int kFusedMostStages = 30;
inline constexpr int kFusedMostTokenBuffers = 8;
inline constexpr int kFusedMostTokenTiles = kMostFusedSlots;
inline constexpr int kFusedMostExperts = kMostFusedExperts;
inline constexpr int kFusedMostOwnRows = 32;  ///< that the kernel finds by itself: of a handful of slots
/// The next ticket is taken when no more than so many stages of the last tile are left to be asked for: about
/// the time that takes. Sooner would keep it from a CTA that has nothing left.
inline constexpr int kFusedAheadStages = 5;
/// Tiles of so few stages are taken two ahead and, where there are plenty, two at a ticket.
inline constexpr int kFusedShortStages = 4;
inline constexpr int kFusedAhead = 2;
/// Tiles between the warps. A finisher may be as many tiles behind the consumers as there are finishers, and
/// they as many behind the producer as there are stages.
inline constexpr int kFusedQueue = 64;
static_assert(kFusedQueue > kFusedMostStages + 2 * kFusedFinishers + kFusedAhead);
inline constexpr int kFusedStageBytes = kFusedParts * kUnitBytes;
inline constexpr int kFusedMaxSharedBytes = 227 * 1024;

/// Byte offsets in shared memory, from a multiple of 128. Barriers are 8 bytes each.
struct FusedShared {
  uint32_t tokens, token_row_bytes, token_buffer_bytes;
  uint32_t partials, partial_bytes, stage_tiles, token_tiles, own_slots, queue, full, empty, tokens_full,
      tokens_empty, queued, partials_full, partials_free, nearly_asked, tile_count, end;

  /// Rows of K bf16 in shared memory are 16 bytes longer than they need, so that eight of them, read at the
  /// same k, are in different banks.
  static FOURFOLD_HOST_DEVICE constexpr uint32_t row_bytes(int32_t depth_units) {
    return static_cast<uint32_t>(depth_units) * kUnitDepth * 2 + 16;
  }

  FOURFOLD_HOST_DEVICE constexpr FusedShared(int32_t depth_units, int32_t tile_tokens, int32_t token_buffers,
                                             int32_t stages)
      : tokens(static_cast<uint32_t>(stages) * kFusedStageBytes),
        token_row_bytes(row_bytes(depth_units)),
        token_buffer_bytes(static_cast<uint32_t>(tile_tokens) * token_row_bytes),
        partials(tokens + static_cast<uint32_t>(token_buffers) * token_buffer_bytes),
        partial_bytes(static_cast<uint32_t>(tile_tokens + 1) / 2 * 128 / 4 * 16),
        stage_tiles(partials + kFusedFinishers * kFusedParts * partial_bytes),
        token_tiles(stage_tiles + static_cast<uint32_t>(stages) * 16),
        own_slots(token_tiles + kFusedMostTokenTiles * 8),
        queue(own_slots + kFusedMostOwnRows * 4),
        full(queue + kFusedQueue * 16),
        empty(full + static_cast<uint32_t>(stages) * 8),
        tokens_full(empty + static_cast<uint32_t>(stages) * 8),
        tokens_empty(tokens_full + kFusedMostTokenBuffers * 8),
        queued(tokens_empty + kFusedMostTokenBuffers * 8),
        partials_full(queued + kFusedQueue * 8),
        partials_free(partials_full + kFusedFinishers * 8),
        nearly_asked(partials_free + kFusedFinishers * 8),
        tile_count(nearly_asked + kFusedAhead * 8),
        end(tile_count + 8) {}

  /// Where a warpgroup's sums of 16 rows are, for the lane that has them (a lane has those of two tokens):
  /// only lanes of tokens that a tile may have write any.
  FOURFOLD_HOST_DEVICE constexpr uint32_t partial(uint32_t finisher, uint32_t part, uint32_t slab,
                                                  uint32_t lane) const {
    const uint32_t pairs = partial_bytes / 512;
    return partials + (finisher * kFusedParts + part) * partial_bytes +
           ((slab * 8 + lane / 4) * pairs + lane % 4) * 16;
  }
};

/// As many buffers of token rows as fit beside seven stages of weights, which keep memory busy; then as many
/// stages as fit. `depth_units`: of the longer of both K; `tile_tokens`: at most fused_tile_tokens().
struct FusedSizes {
  int32_t token_buffers = 0, stages = 0;
};

constexpr FusedSizes size_fused_layer(int32_t depth_units, int32_t tile_tokens) {
  constexpr int32_t kEnoughStages = 7;
  const auto fit = [&](int32_t buffers, int32_t stages) {
    return FusedShared(depth_units, tile_tokens, buffers, stages).end <= kFusedMaxSharedBytes;
  };
  FusedSizes sizes{2, 1};
  while (sizes.token_buffers < kFusedMostTokenBuffers && fit(sizes.token_buffers + 1, kEnoughStages)) {
    ++sizes.token_buffers;
  }
  while (sizes.stages < kFusedMostStages && fit(sizes.token_buffers, sizes.stages + 1)) ++sizes.stages;
  return sizes;
}

}  // namespace fourfold::sm90
