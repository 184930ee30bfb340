// What the fused layer kernel takes.
#pragma once

#include <cstdint>

#include "cuda/combine_row.cuh"
#include "cuda/expert_ids.cuh"
#include "fourfold/number_formats.h"
#include "sm90/packed_decode.h"
#include "sm90/swiglu.cuh"

namespace fourfold::sm90 {

/// Members as in FusedMatrix.
struct FusedMatrixArgs {
  const uint8_t* packed;
  int64_t packed_bytes_per_expert;
  int32_t row_blocks;   ///< of 64 packed rows: a tile each
  int32_t depth_units;  ///< of 64 k
  int32_t channels;
  const float* weight_globals;
  const float* bias;
};

/// Members as in FusedLayer; strides in elements.
struct FusedLayerArgs {
  FusedMatrixArgs gate_up, down;
  int32_t experts, tokens;
  int32_t tile_tokens;    ///< most rows of a tile
  int32_t token_buffers;  ///< for the rows of so many tiles
  int32_t stages;         ///< of the ring of weights
  const int32_t* group_offsets;
  const int32_t* slot_of_row;  ///< null: x has a row for each of ours
  bool finds_own_rows;         ///< by `ids`; group_offsets and slot_of_row may not be there yet
  bool waits_for_x;            ///< for the previous kernel
  cuda::ExpertIds ids;
  const Bf16* x;
  int64_t x_stride;
  int32_t slots_of_x_row;
  const float* x_row_scales;         ///< null: 1
  const float* intermediate_scales;  ///< null: the activation's output stays bf16
  Bf16* intermediate;                ///< what down multiplies; strides as of `activated`
  Bf16* h;
  int64_t h_stride;
  Bf16* activated;  ///< null: not wanted
  int64_t activated_stride;
  Bf16* z;
  cuda::SlotRows slots;  ///< z again, and what combine needs
  void* y;
  int64_t y_stride;
  bool y_is_float32;
  SwigluArgs swiglu;
  DecodeMasks masks;
  bool weights_wait;  ///< for the previous kernel
  /// Tickets taken; then, by the first row of a token tile, how many of its gate/up tiles are done; then, by
  /// tile of down's rows, how many token tiles are done.
  int32_t* tickets;
  int32_t* activated_tiles;
  int32_t* z_tiles;
};

}  // namespace fourfold::sm90
