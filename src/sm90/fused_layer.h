// Both GEMMs, the activation and combine of a layer in one kernel on Hopper, for few tokens: where a layer
// takes tens of microseconds, half of them are launches, first bytes and last tiles of separate kernels.
//
// Results are those of the stages one by one at their rounding points; only the order of the GEMMs' float32
// sums is the kernel's own. It depends on nothing but K, so that two runs give the same bits.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "fourfold/gemm.h"
#include "fourfold/moe_layer.h"
#include "fourfold/routing.h"
#include "sm90/packed_layout.h"

namespace fourfold::sm90 {

/// One of the layer's two matrices, as in ExpertGemm.
struct FusedMatrix {
  PackedShape shape;  ///< depth a multiple of 64
  const std::byte* packed = nullptr;
  const float* weight_globals = nullptr;  ///< [E, halves]
  const float* bias = nullptr;            ///< [E, halves * channels]; null: none
};

/// Device pointers; M = group_offsets[E] <= tokens * top_k.
struct FusedLayer {
  int64_t experts = 0, tokens = 0, top_k = 0;
  /// Staged and decoded rows [M, H]; or, with slot_of_row, one for every slots_of_x_row slots in turn: [T, H]
  /// or [T * top_k, H]. 16-byte aligned, stride a multiple of 8.
  MatrixView<const Bf16> x;
  int64_t slots_of_x_row = 1;
  const float* x_row_scales = nullptr;  ///< of the rows of x; null: 1
  const int32_t* group_offsets = nullptr;
  const int32_t* slot_of_row = nullptr;
  const int32_t* row_of_slot = nullptr;
  FusedMatrix gate_up;  ///< kGateUpPaired
  FusedMatrix down;
  ActivationFunction activation;               ///< kSwiglu
  MatrixView<Bf16> h;                          ///< [M, 2I]; optional, changes nothing else
  const float* intermediate_scales = nullptr;  ///< [E] by which it is staged to NVFP4; null: it stays bf16
  MatrixView<Bf16> intermediate;  ///< [M, I] what down multiplies; 16-byte aligned, stride a multiple of 8
  MatrixView<Bf16> activated;     ///< [M, I] the activation's output, laid out as that; optional
  MatrixView<Bf16> z;             ///< [M, H]; 16-byte aligned, stride a multiple of 8
  Routing routing;
  OutputView y;  ///< [T, H], any alignment
  /// fused_counters() words, which an earlier kernel of the stream has set to zero; see weights_ahead.
  std::span<int32_t> counters;
  /// Weights, group_offsets and counters are complete before the previous kernel lets this one start, as in
  /// ExpertGemm::overlap_previous: weights are fetched before that kernel ends.
  bool weights_ahead = false;
  /// Of a handful of slots, whose counters were set to zero before the kernel before this one let it start:
  /// rows are found by the router's ids, before group_offsets are there. x is as it was before the slots were
  /// permuted, unless waits_for_x.
  bool finds_own_rows = false;
  bool waits_for_x = false;  ///< x is complete when the kernel before this one has ended
};

/// What the kernel's lists in shared memory have room for.
inline constexpr int64_t kMostFusedSlots = 512, kMostFusedExperts = 512;

/// Rows of a tile, at most: two buffers of them have to fit shared memory beside the weights. 0: not even
/// one.
int32_t fused_tile_tokens(int64_t hidden, int64_t intermediate);

/// Weights of the experts of all slots, were each hit once, up to which one kernel is faster: with more, what
/// it saves in launches is less than what separate kernels gain by streaming faster. Of a handful of slots it
/// may be more, as the permutation of more takes longer (an H200, docs/hopper-tried.md).
inline constexpr int64_t kMostFusedBytes = 100'000'000, kMostFusedBytesOfHandful = 200'000'000;

/// Whether the kernel computes such a layer, and sooner than separate kernels do: weights are few, and
/// experts have so few rows that hardly one needs a second tile, for which its weights would be read again.
/// One token always.
bool can_fuse(const LayerConfig& config, const LayerOptions& options, int64_t slots);

/// Whether kernels may copy rows of x, 16 bytes at a time, from where the caller has them.
bool can_read_in_place(const MatrixView<const Bf16>& x);

/// Words of FusedLayer::counters for `slots` slots or fewer.
int64_t fused_counters(int64_t slots, int64_t hidden);

/// For reports.
std::string describe_fused_layer();

/// Enqueues the kernel; it starts while the stream's previous kernel ends (programmatic dependent launch).
/// Throws Error when CUDA refuses the launch.
void launch_fused_layer(const FusedLayer& args, void* stream);

}  // namespace fourfold::sm90
