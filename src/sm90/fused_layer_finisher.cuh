// The finishers of the fused layer kernel, warps that take tiles in turns: add up the parts of k, and write h
// and the activation, or z and, where it was the last tile of some columns, y.
#pragma once

#include <cstdint>

#include "sm90/block_part.cuh"
#include "sm90/fused_layer_args.cuh"
#include "sm90/fused_layer_layout.h"
#include "sm90/fused_layer_producer.cuh"
#include "sm90/ptx.cuh"

namespace fourfold::sm90 {

class FusedFinisher {
 public:
  __device__ __forceinline__ FusedFinisher(const FusedLayerArgs& args, const FusedShared& layout,
                                           uint32_t shared, int finisher)
      : args_(args),
        layout_(layout),
        shared_(shared),
        finisher_(finisher),
        lane_(static_cast<int>(threadIdx.x) % 32) {}

  __device__ __forceinline__ void run() const {
    for (int n = finisher_;; n += kFusedFinishers) {
      const FusedTile tile = wait_for_tile(layout_, shared_, n);
      if (tile.work.rows == 0) {
        if (tile.work.expert == 1) combine_without_rows();
        return;
      }
      tile.down ? finish_down(tile.work, n) : finish_gate_up(tile.work, n);
    }
  }

 private:
  static constexpr int kSlabs = kUnitRows / 16;

  /// of[s][2 u + i]: row 16 s + 8 u + g of the tile, token 2 t + i (lane 4 g + t).
  struct Sums {
    float of[kSlabs][4];
  };

  __device__ __forceinline__ int token(int i) const { return lane_ % 4 * 2 + i; }

  /// Waits for the parts and adds them in order.
  __device__ __forceinline__ Sums add_parts(int n) const {
    ptx::mbarrier_wait_parity(shared_ + layout_.partials_full + finisher_ * 8, n / kFusedFinishers % 2);
    Sums sums = {};
    if (token(0) < args_.tile_tokens) {
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
        for (int part = 0; part < kFusedParts; ++part) {
          const uint4 words = ptx::ld_shared_v4(shared_ + layout_.partial(finisher_, part, slab, lane_));
          sums.of[slab][0] += __uint_as_float(words.x);
          sums.of[slab][1] += __uint_as_float(words.y);
          sums.of[slab][2] += __uint_as_float(words.z);
          sums.of[slab][3] += __uint_as_float(words.w);
        }
      }
    }
    ptx::mbarrier_arrive(shared_ + layout_.partials_free + finisher_ * 8);
    return sums;
  }

  /// alpha * sum + bias with the specified roundings.
  static __device__ __forceinline__ float scaled(float alpha, float sum, float bias) {
    return __fadd_rn(__fmul_rn(alpha, sum), bias);
  }
  static __device__ __forceinline__ float alpha(float scale, float weight_global) {
    return scale * weight_global * kDecodedToValue;
  }
  /// Absent: -0, which changes no sum.
  static __device__ __forceinline__ float bias(const FusedMatrixArgs& matrix, int64_t index) {
    return matrix.bias != nullptr ? matrix.bias[index] : -0.0f;
  }

  /// Half a block of 16 channels for one token: slabs 2 b and 2 b + 1 of eight lanes.
  using Block = BlockPart<8, 4>;

  /// As bf16, which holds the values exactly.
  static __device__ __forceinline__ void store(const Block (&blocks)[kSlabs / 2], Bf16* to) {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      to[slab * 8].bits = static_cast<uint16_t>(__float_as_uint(blocks[slab / 2].of[slab % 2]) >> 16);
    }
  }

  __device__ __forceinline__ void finish_gate_up(const WorkTile& work, int n) const {
    const FusedMatrixArgs& matrix = args_.gate_up;
    // Loaded before the sums are there; biases, which few models have, after.
    const float gate_global = matrix.weight_globals[2 * work.expert];
    const float up_global = matrix.weight_globals[2 * work.expert + 1];
    const float requantize =
        args_.intermediate_scales != nullptr ? args_.intermediate_scales[work.expert] : 0.0f;
    float scales[2] = {1.0f, 1.0f};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (args_.x_row_scales != nullptr && token(i) < work.rows) {
        const int row = work.first_row + token(i);
        scales[i] =
            args_.x_row_scales[args_.slot_of_row != nullptr ? args_.slot_of_row[row] / args_.slots_of_x_row
                                                            : row];
      }
    }
    const int first_channel = work.row_tile * (kUnitRows / 2) + lane_ / 4;
    const int64_t first_bias = int64_t{2} * work.expert * matrix.channels + first_channel;
    const Sums sums = add_parts(n);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (token(i) >= work.rows) break;  // with all lanes of the token's blocks
      const int64_t row = work.first_row + token(i);
      const float gate_alpha = alpha(scales[i], gate_global), up_alpha = alpha(scales[i], up_global);
      uint32_t pairs[kSlabs];  // gate in the low half, up in the high one
      Block blocks[kSlabs / 2];
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
        const float gate = scaled(gate_alpha, sums.of[slab][i], bias(matrix, first_bias + slab * 8));
        const float up =
            scaled(up_alpha, sums.of[slab][2 + i], bias(matrix, first_bias + matrix.channels + slab * 8));
        pairs[slab] = ptx::cvt_rn_bf16x2(up, gate);
        const float activated = swiglu(args_.swiglu, ptx::low_bf16(pairs[slab]), ptx::high_bf16(pairs[slab]));
        blocks[slab / 2].of[slab % 2] = ptx::low_bf16(ptx::cvt_rn_bf16x2(0.0f, activated));
      }
      if (args_.h != nullptr) {
        Bf16* h = args_.h + row * args_.h_stride + first_channel;
#pragma unroll
        for (int slab = 0; slab < kSlabs; ++slab) {
          h[slab * 8].bits = static_cast<uint16_t>(pairs[slab]);
          h[matrix.channels + slab * 8].bits = static_cast<uint16_t>(pairs[slab] >> 16);
        }
      }
      const int64_t at = row * args_.activated_stride + first_channel;
      if (args_.activated != nullptr) store(blocks, args_.activated + at);
      if (args_.intermediate_scales != nullptr) {
#pragma unroll
        for (Block& block : blocks) {
          uint32_t words[1];
          block.round(requantize, words);
          block = Block::unpack(words);
        }
      }
      store(blocks, args_.intermediate + at);
    }
    __syncwarp();
    if (lane_ == 0) ptx::red_release_gpu_add(args_.activated_tiles + work.first_row, 1);
  }

  __device__ __forceinline__ void finish_down(const WorkTile& work, int n) const {
    const FusedMatrixArgs& matrix = args_.down;
    const float scale = args_.intermediate_scales != nullptr ? args_.intermediate_scales[work.expert] : 1.0f;
    const float a = alpha(scale, matrix.weight_globals[work.expert]);
    const Sums sums = add_parts(n);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (token(i) >= work.rows) break;
      const int first_channel = work.row_tile * kUnitRows + lane_ / 4;
      const int64_t first_bias = int64_t{work.expert} * matrix.channels + first_channel;
      Bf16* z = args_.z + (int64_t{work.first_row} + token(i)) * args_.slots.z_stride + first_channel;
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
        const uint32_t pair =
            ptx::cvt_rn_bf16x2(scaled(a, sums.of[slab][2 + i], bias(matrix, first_bias + slab * 16 + 8)),
                               scaled(a, sums.of[slab][i], bias(matrix, first_bias + slab * 16)));
        z[slab * 16].bits = static_cast<uint16_t>(pair);
        z[slab * 16 + 8].bits = static_cast<uint16_t>(pair >> 16);
      }
    }
    __syncwarp();
    combine_if_last(work.row_tile);
  }

  /// Counts the tile; whoever counts the last one of these 64 columns has all their z, and combines them.
  __device__ __forceinline__ void combine_if_last(int row_tile) const {
    int last = 0;
    if (lane_ == 0) {
      const int token_tiles = __float_as_int(ptx::ld_shared_f32(shared_ + layout_.tile_count));
      last = ptx::atom_acq_rel_gpu_inc(args_.z_tiles + row_tile) == token_tiles - 1;
    }
    if (__shfl_sync(~0u, last, 0) == 0) return;
    __syncwarp();  // what lane 0 acquired is there for all lanes
    for (int piece = lane_; piece < args_.tokens * kPieces; piece += 32) {
      combine(piece / kPieces, row_tile * kPieces + piece % kPieces);
    }
  }

  /// No token has a row: y is zero. The CTAs share the columns.
  __device__ __forceinline__ void combine_without_rows() const {
    const int columns = args_.down.channels / cuda::kColumns;
    const int first = (static_cast<int>(blockIdx.x) * kFusedFinishers + finisher_) * 32 + lane_;
    const int step = static_cast<int>(gridDim.x) * kFusedFinishers * 32;
    for (int piece = first; piece < args_.tokens * columns; piece += step) {
      combine(piece / columns, piece % columns);
    }
  }

  static constexpr int kSlotsAtOnce = 4;                      ///< as many as the registers allow
  static constexpr int kPieces = kUnitRows / cuda::kColumns;  ///< of a row tile and token

  /// Eight columns of y.
  __device__ __forceinline__ void combine(int64_t token, int column) const {
    float sums[cuda::kColumns] = {};
    cuda::add_slots<kSlotsAtOnce>(args_.slots, token, column, sums);
    const int64_t at = token * args_.y_stride + int64_t{column} * cuda::kColumns;
    if (args_.y_is_float32) {
      cuda::store_row(static_cast<float*>(args_.y) + at, sums);
    } else {
      cuda::store_row(static_cast<Bf16*>(args_.y) + at, sums);
    }
  }

  const FusedLayerArgs& args_;
  const FusedShared& layout_;
  uint32_t shared_;
  int finisher_, lane_;
};

}  // namespace fourfold::sm90
