// The fused layer kernel for few tokens: y = combine(down(swiglu(gate_up(x)))).
// shapes:   x [T,H] bf16; gate/up and down packed (sm90/packed_layout.h); M rows sorted by expert; y [T,H]
// needs:    H and I multiples of 64; SwiGLU; bf16 activations, or NVFP4 by scales known before
// numerics: docs/formats.md, section 7; k split over four warpgroups, their sums added in order
// oracle:   the reference layer in tests/sm90_fused_layer_test.cpp
//
// A tile is 64 rows of weights by the rows of an expert, or some of them. Tickets stand for the gate/up tiles
// of all experts, then for all down tiles; CTAs take them as they go. In each CTA
//
//   schedule   one warp takes tickets and queues their tiles for the others
//
//   weights    one thread fills a ring with the tiles' weights, across tiles and both matrices
//
//   tokens     one warp brings x; for down, the activation, once all gate/up tiles of its rows are counted
//
//   consumers  four warpgroups multiply, and hand their sums to
//
//   finishers  four warps; gate/up: activation -> memory, count; down: z -> memory, count; the last tile of
//              some columns combines them into y
//
// A handful of slots (finds_own_rows) is sorted by every CTA for itself, while the permutation sorts them for
// the finishers: nothing of it is used before it has ended but the counters, which are zero before this
// kernel is let start. Where x is staged beside the permutation, the token warp waits for that, too.
//
// No stage waits for the whole of another, so that weights come at the memory's speed from the first byte to
// the last.
#include <cuda_runtime.h>

#include <algorithm>
#include <variant>

#include "cuda/check.cuh"
#include "cuda/device.h"
#include "cuda/launch.cuh"
#include "cuda/permute.h"
#include "sm90/fused_layer.h"
#include "sm90/fused_layer_args.cuh"
#include "sm90/fused_layer_consumer.cuh"
#include "sm90/fused_layer_finisher.cuh"
#include "sm90/fused_layer_layout.h"
#include "sm90/fused_layer_producer.cuh"
#include "sm90/ptx.cuh"

namespace fourfold::sm90 {
namespace {

static_assert(kFusedMostOwnRows == cuda::kHandfulOfSlots);

FOURFOLD_HOST_DEVICE int32_t longest_depth(const FusedLayerArgs& args) {
  return args.gate_up.depth_units > args.down.depth_units ? args.gate_up.depth_units : args.down.depth_units;
}

FOURFOLD_HOST_DEVICE FusedShared layout_of(const FusedLayerArgs& args) {
  return {longest_depth(args), args.tile_tokens, args.token_buffers, args.stages};
}

/// By one thread of every warp: a fence goes with each initialisation of an mbarrier, and the compiler puts
/// those of a warp's lanes one after the other.
__device__ void init_barriers(const FusedLayerArgs& args, const FusedShared& layout, uint32_t shared,
                              int warp) {
  constexpr int kConsumerThreads = 128 * kFusedParts;
  const auto init = [&](uint32_t first, int count, int arrivals) {
    for (int i = warp; i < count; i += kFusedThreads / 32) {
      ptx::mbarrier_init(shared + first + i * 8, arrivals);
    }
  };
  init(layout.full, args.stages, 1);
  init(layout.empty, args.stages, kConsumerThreads);
  init(layout.tokens_full, args.token_buffers, 32);
  init(layout.tokens_empty, args.token_buffers, kConsumerThreads);
  init(layout.queued, kFusedQueue, 1);
  init(layout.partials_full, kFusedFinishers, kConsumerThreads);
  init(layout.partials_free, kFusedFinishers, 32);
  init(layout.nearly_asked, kFusedAhead, 1);
  ptx::fence_mbarrier_init();
}

__global__ void __launch_bounds__(kFusedThreads, 1)
    fused_layer_kernel(const __grid_constant__ FusedLayerArgs args) {
  extern __shared__ __align__(128) uint8_t raw_shared[];
  const uint32_t shared = ptx::shared_address(raw_shared);
  const FusedShared layout = layout_of(args);
  constexpr int kConsumerWarps = 4 * kFusedParts;
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  FusedSchedule schedule(args, layout, shared);
  if (threadIdx.x % 32 == 0) init_barriers(args, layout, shared, warp);
  if (warp == kConsumerWarps) schedule.begin();
  __syncthreads();
  if (warp < kConsumerWarps) {
    FusedConsumer(args, layout, shared, warp / 4).run();
  } else if (warp == kConsumerWarps) {
    schedule.run();
  } else if (warp == kConsumerWarps + 1) {
    if (threadIdx.x % 32 == 0) run_fused_weights(args, layout, shared);
  } else if (warp == kConsumerWarps + 2) {
    run_fused_tokens(args, layout, shared);
  } else {
    ptx::griddepcontrol_wait();
    ptx::griddepcontrol_launch_dependents();
    FusedFinisher(args, layout, shared, warp - kConsumerWarps - 3).run();
  }
}

FusedMatrixArgs matrix_args(const FusedMatrix& matrix) {
  return {reinterpret_cast<const uint8_t*>(matrix.packed),
          matrix.shape.bytes(),
          static_cast<int32_t>(matrix.shape.row_blocks()),
          static_cast<int32_t>(matrix.shape.depth_units()),
          static_cast<int32_t>(matrix.shape.channels),
          matrix.weight_globals,
          matrix.bias};
}

FusedLayerArgs kernel_args(const FusedLayer& layer) {
  FusedLayerArgs args{};
  args.gate_up = matrix_args(layer.gate_up);
  args.down = matrix_args(layer.down);
  args.experts = static_cast<int32_t>(layer.experts);
  args.tokens = static_cast<int32_t>(layer.tokens);
  args.group_offsets = layer.group_offsets;
  args.slot_of_row = layer.slot_of_row;
  args.finds_own_rows = layer.finds_own_rows;
  args.ids = cuda::ExpertIds(layer.routing, layer.experts);
  args.x = layer.x.data;
  args.x_stride = layer.x.stride;
  args.slots_of_x_row = static_cast<int32_t>(layer.slots_of_x_row);
  args.waits_for_x = layer.waits_for_x;
  args.x_row_scales = layer.x_row_scales;
  args.intermediate_scales = layer.intermediate_scales;
  args.intermediate = layer.intermediate.data;
  args.weights_wait = !layer.weights_ahead && !layer.finds_own_rows;
  args.h = layer.h.data;
  args.h_stride = layer.h.stride;
  args.activated = layer.activated.data;
  args.activated_stride = layer.intermediate.stride;
  args.z = layer.z.data;
  args.slots = {layer.z.data,
                layer.z.stride,
                layer.row_of_slot,
                layer.routing.topk_weights.data,
                layer.routing.topk_weights.stride,
                static_cast<int32_t>(layer.top_k)};
  std::visit(
      [&](const auto& y) {
        args.y = y.data;
        args.y_stride = y.stride;
      },
      layer.y);
  args.y_is_float32 = std::holds_alternative<MatrixView<float>>(layer.y);
  args.swiglu = swiglu_args(layer.activation);
  args.tickets = layer.counters.data();
  args.activated_tiles = args.tickets + 1;
  args.z_tiles = args.activated_tiles + layer.tokens * layer.top_k;
  args.tile_tokens = std::min(fused_tile_tokens(layer.z.cols, layer.intermediate.cols), args.tokens);
  const FusedSizes sizes = size_fused_layer(longest_depth(args), args.tile_tokens);
  args.token_buffers = sizes.token_buffers;
  args.stages = sizes.stages;
  return args;
}

}  // namespace

void launch_fused_layer(const FusedLayer& layer, void* stream) {
  const FusedLayerArgs args = kernel_args(layer);
  const uint32_t shared_bytes = layout_of(args).end;
  cuda::check(
      cudaFuncSetAttribute(fused_layer_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
      "cudaFuncSetAttribute");
  cuda::launch_after_previous("fused_layer_kernel", fused_layer_kernel,
                              static_cast<unsigned>(cuda::multiprocessor_count()), kFusedThreads,
                              shared_bytes, stream, args);
}

}  // namespace fourfold::sm90
