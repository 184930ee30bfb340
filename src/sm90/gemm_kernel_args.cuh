// What the grouped GEMM kernel takes, and the shapes that it is compiled for.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "fourfold/number_formats.h"
#include "sm90/gemm_choice.h"
#include "sm90/packed_decode.h"
#include "sm90/swiglu.cuh"
#include "sm90/tile_schedule.h"

namespace fourfold::sm90 {

/// How a kernel reads the token rows of a stage: of[term][i] has boxes of 64 k x (i + 1) box granules of
/// tokens, of as many k units as a stage has. The matrix is then seen as (64, rows, K / 64); where K is no
/// multiple of 64, it is (K, rows, 1) and a box has one unit.
struct TokenMaps {
  CUtensorMap of[2][kMostTokenMaps];
  bool stage_in_a_box = false;
};

/// Token rows that a kernel gathers itself: row m of the GEMM is row slot_of_row[m] / top_k.
struct GatheredTokens {
  const Bf16* rows;
  int64_t stride;
  int32_t cols;
  const int32_t* slot_of_row;
  int32_t top_k;
};

/// Members as in ExpertGemm; strides in elements.
struct GemmKernelArgs {
  const uint8_t* packed;
  int64_t packed_bytes_per_expert;
  int32_t experts;
  RowBand band;         ///< of the experts that this launch multiplies
  int32_t row_blocks;   ///< of 64 packed rows
  int32_t depth_units;  ///< of 64 k
  int32_t channels;
  const int32_t* group_offsets;
  int32_t* tickets;   ///< null: tiles are dealt out in turn
  int32_t* progress;  ///< [experts] counts the rows x row blocks that are written; null: nobody asks
  /// The `progress` of the GEMM that writes the token rows, and its row blocks: an expert's rows are all
  /// there when it says so. Null: they are when the kernel before this one has ended.
  const int32_t* awaited;
  int32_t awaited_row_blocks;
  const float* row_scales;
  const float* weight_globals;
  const float* bias;
  void* d;
  int64_t d_stride;
  Bf16* h;
  int64_t h_stride;
  const float* requantize_scales;  ///< [experts]; null: d is SwiGLU's output itself
  Bf16* residual;                  ///< null: one term; strides are d's
  float* d_row_scales;
  SwigluArgs swiglu;
  GatheredTokens gathered;  ///< where it `gathers`
  bool d_is_float32;
  bool paired;   ///< rows are in RowOrder::kGateUpPaired, the epilogue is SwiGLU
  bool gathers;  ///< token rows come through GatheredTokens, by plain copies, instead of TokenMaps
  /// The kernel before this one is another launch of the same GEMM, of which nothing is read here, or the
  /// GEMM whose progress is `awaited`. What else is read was complete before that kernel let this one start:
  /// each of its CTAs does so after its own griddepcontrol.wait, or was itself let start by a kernel that
  /// did. So one CTA waits for it, at the end: who waits for this launch has waited for all.
  bool waits_at_end;
  DecodeMasks masks;
};

/// GemmKernelArgs::gathers, as a constant where the kernel cannot.
template <class Traits>
__device__ __forceinline__ bool gathers(const GemmKernelArgs& args) {
  return Traits::kMayGather && args.gathers;
}

/// Shape of a kernel. Consumer warpgroup w multiplies row part w / kDepthParts of the tile with every
/// kDepthParts-th k unit, starting with unit w % kDepthParts; partial sums are added in order of the parts.
template <int kRowParts_, int kRowBlocks_, int kDepthParts_, int kStageUnits_, int kTokens_, int kGranule_,
          int kTerms_, bool kMayGather_>
struct GemmTraits {
  static constexpr int kRowParts = kRowParts_;                     ///< warpgroups side by side
  static constexpr int kRowBlocks = kRowBlocks_;                   ///< blocks of 64 rows a warpgroup
  static constexpr int kDepthParts = kDepthParts_;                 ///< warpgroups that share a tile's k
  static constexpr int kStageUnits = kStageUnits_;                 ///< k units of a stage, of all depth parts
  static constexpr int kMyStageUnits = kStageUnits / kDepthParts;  ///< those of one
  static constexpr int kTokens = kTokens_;                         ///< most tokens of a tile
  static constexpr int kGranule = kGranule_;  ///< what the tokens that a tile multiplies are rounded up to
  static constexpr int kBoxGranule = box_granule(kTokens, kGranule);  ///< and those that it has in memory
  /// Rows that the tokens of a tile take in shared memory.
  static FOURFOLD_HOST_DEVICE constexpr int box_rows(int tokens) {
    return (tokens + kBoxGranule - 1) / kBoxGranule * kBoxGranule;
  }
  static constexpr int kTerms = kTerms_;
  static constexpr bool kMayGather = kMayGather_;  ///< GemmKernelArgs::gathers may be set
  static constexpr int kGatherThreads = 64;        ///< of the producer warpgroup

  static constexpr int kConsumers = kRowParts * kDepthParts;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kTileBlocks = kRowParts * kRowBlocks;
  /// Registers go from the producers to the consumers where they hold many sums.
  static constexpr bool kManyRegisters = kRowBlocks * kTokens > 64;
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = kConsumers == 2 ? 224 : 104;
  /// k-steps a WGMMA commit group: two, where registers allow.
  static constexpr int kGroup = kRowBlocks * kTokens > 96 ? 1 : 2;
  static constexpr int kUnrolled =
      kMyStageUnits > 2 ? kMyStageUnits : 2;  ///< k units multiplied without a branch

  // Shared memory, in bytes from a multiple of 1024.
  static constexpr int kTokenBoxBytes = kTokens * kUnitDepth * 2;  ///< one term of one k unit
  static constexpr int kTokenStageBytes = kTerms * kStageUnits * kTokenBoxBytes;
  static constexpr int kWeightStageBytes = kTileBlocks * kStageUnits * kUnitBytes;
  /// Tokens that go through shared memory at a time: enough for every thread to have something to write,
  /// where tiles are wide; fewer where large stages want the room.
  static constexpr int kStagingTokens = kTokens <= 32 ? 8 : kTokens <= 64 ? 16 : 32;
  static constexpr int kStagingRowBytes = kRowBlocks * kUnitRows * 2 + 16;  ///< at most (gemm_epilogue.cuh)
  static constexpr int kStagingBytes = 2 * kStagingTokens * kStagingRowBytes;  ///< of a row part; two buffers
  static constexpr int kAlphaBytes = 2 * kTokens * 4;                          ///< of a row part
  static constexpr int kPartialBytes = kRowBlocks * kUnitRows * kTokens * 4;   ///< of a warpgroup
  /// Tiles between the warp that finds them and all others, 16 bytes and two barriers each: more than there
  /// are stages (sm90/gemm_queue.cuh).
  static constexpr int kQueuedTiles = 32;
  static constexpr int kFixedBytes =
      1024 + kQueuedTiles * 32 + 8 + 2 * 8 +
      kRowParts * (kStagingBytes + kAlphaBytes + (kDepthParts - 1) * kPartialBytes);
  static constexpr int kStageBytes = kTokenStageBytes + kWeightStageBytes + 2 * 8;
  static constexpr int kMaxSharedBytes = 227 * 1024;
  static constexpr int kStages = (kMaxSharedBytes - kFixedBytes) / kStageBytes;

  static constexpr int kWeightOffset = kStages * kTokenStageBytes;
  static constexpr int kStagingOffset = kWeightOffset + kStages * kWeightStageBytes;
  static constexpr int kAlphaOffset = kStagingOffset + kRowParts * kStagingBytes;
  static constexpr int kPartialOffset = kAlphaOffset + kRowParts * kAlphaBytes;
  static constexpr int kQueueOffset = kPartialOffset + kRowParts * (kDepthParts - 1) * kPartialBytes;
  static constexpr int kFullOffset = kQueueOffset + kQueuedTiles * 16;
  static constexpr int kEmptyOffset = kFullOffset + kStages * 8;
  static constexpr int kQueuedOffset = kEmptyOffset + kStages * 8;
  static constexpr int kReadyOffset = kQueuedOffset + kQueuedTiles * 8;
  static constexpr int kAskedOffset = kReadyOffset + kQueuedTiles * 8;
  static constexpr int kWrittenOffset = kAskedOffset + 8;
  static constexpr int kSharedBytes = 1024 + kWrittenOffset + 2 * 8;

  static_assert(kStageUnits % kDepthParts == 0 && kUnrolled % kMyStageUnits == 0);
  static_assert(!kMayGather || (kTerms == 1 && kDepthParts == 1));
  static_assert(kTokens % kStagingTokens == 0);
  static_assert(kTokens % kBoxGranule == 0 && kTokens / kBoxGranule <= kMostTokenMaps &&
                kTokenBoxBytes % 1024 == 0);
  static_assert(kStages >= 3 && kStages < kQueuedTiles && kSharedBytes <= kMaxSharedBytes);
  static_assert(kStagingBytes % 32 == 0 && kWeightOffset % 128 == 0 && kUnitBytes % 128 == 0);
};

}  // namespace fourfold::sm90
