// What becomes of a tile's sums: partial sums added, alpha and bias, rounding, SwiGLU, and the way to memory.
//
// A thread's accumulators are 16-bit columns of tokens; memory wants rows of channels. A few tokens at a time
// go through shared memory, transposed by stmatrix, and leave in 16-byte pieces ("chunks", 8 packed rows):
// half a pair when rows are in RowOrder::kGateUpPaired, where chunk 2i is gate and 2i+1 up of 8 channels.
#pragma once

#include <cstdint>

#include "sm90/block_part.cuh"
#include "sm90/gemm_kernel_args.cuh"
#include "sm90/ptx.cuh"
#include "sm90/swiglu.cuh"
#include "sm90/tile_schedule.h"

namespace fourfold::sm90 {

/// A thread's accumulators. of[b][4 c + 2 u + i] is row 8 u + g of the warp's 16-row slab in row block b
/// (lane 4 g + t), token 8 c + 2 t + i.
template <class Traits>
struct Sums {
  float of[Traits::kRowBlocks][Traits::kTokens / 2];
};

/// What a thread of depth part 0 knows of a tile's scales. Loaded before the multiplication, so that it is
/// there at its end.
template <class Traits>
struct TileScales {
  static constexpr int kRowsPerThread = (Traits::kTokens + 127) / 128;

  float of_row[kRowsPerThread];  ///< of rows thread, thread + 128, ...
  float globals[2];              ///< gate's and up's, or the matrix's
  float requantize = 1.0f;

  __device__ __forceinline__ TileScales(const GemmKernelArgs& args, int depth_part, const WorkTile& tile) {
    if (depth_part != 0) return;
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const int row = i * 128 + static_cast<int>(threadIdx.x) % 128;
      of_row[i] = 1.0f;
      if (args.row_scales == nullptr || row >= tile.rows) continue;
      int32_t token = tile.first_row + row;
      if (gathers<Traits>(args)) token = args.gathered.slot_of_row[token] / args.gathered.top_k;
      of_row[i] = args.row_scales[token];
    }
    globals[0] = args.weight_globals[args.paired ? 2 * tile.expert : tile.expert];
    if (!args.paired) return;
    globals[1] = args.weight_globals[2 * tile.expert + 1];
    if (args.requantize_scales != nullptr) requantize = args.requantize_scales[tile.expert];
  }
};

/// Lanes 2i and 2i + 1 write the same row, and channels come in sixteens: both are there or neither.
using HalfBlock = BlockPart<2>;

/// kPaired: GemmKernelArgs::paired.
template <class Traits, bool kPaired>
class Epilogue {
 public:
  __device__ __forceinline__ Epilogue(const GemmKernelArgs& args, uint32_t shared, int row_part,
                                      int depth_part, const WorkTile& tile, const TileScales<Traits>& scales)
      : args_(args),
        shared_(shared),
        row_part_(row_part),
        depth_part_(depth_part),
        thread_(static_cast<int>(threadIdx.x) % 128),
        tile_(tile),
        scales_(scales) {}

  /// Called by every consumer warpgroup; those of other depth parts only hand over their sums.
  __device__ __forceinline__ void finish(Sums<Traits>& sums) {
    if constexpr (Traits::kDepthParts > 1) {
      // All parts meet at the same two instructions: synccheck takes others for divergence.
      ptx::bar_sync(kPartialsFree, kPartialThreads);
      if (depth_part_ != 0) hand_over(sums);
      ptx::bar_sync(kPartialsFull, kPartialThreads);
      if (depth_part_ != 0) return;
      collect(sums);
    }
    publish_alphas();
    float biases[Traits::kRowBlocks][2];
#pragma unroll
    for (int b = 0; b < Traits::kRowBlocks; ++b) {
      biases[b][0] = bias(b, 0);
      biases[b][1] = bias(b, 1);
    }
    if (!kPaired && args_.d_is_float32) {
#pragma unroll
      for (int round = 0; round < Traits::kTokens / kRound; ++round) {
        if (round * kRound >= tile_.rows) break;
        store_float32(sums, biases, round);
      }
      ptx::bar_sync(kFirstStaging + row_part_, 128);  // all have read the alphas
      return;
    }
    // Two buffers take turns: a round is staged while the one before is written, and one barrier a round is
    // enough. Whoever stages into a buffer has passed the barrier that all others reached after reading it;
    // between tiles, publish_alphas() has it.
    const Piece piece = my_piece();
    stage_round(sums, biases, 0);
#pragma unroll
    for (int round = 0; round < Traits::kTokens / kRound; ++round) {
      ptx::bar_sync(kFirstStaging + row_part_, 128);
      const bool last = (round + 1) * kRound >= tile_.rows;
      if (round + 1 < Traits::kTokens / kRound && !last) stage_round(sums, biases, round + 1);
      write_round(piece, round);
      if (last) return;
    }
  }

 private:
  static constexpr int kHalves = kPaired ? 2 : 1;
  static constexpr int kChunks = Traits::kRowBlocks * 8;  ///< 16-byte pieces of a staged token
  static constexpr int kRound = Traits::kStagingTokens;   ///< tokens staged at a time
  static constexpr int kSums = Traits::kTokens / 2;       ///< of a row block

  // Barriers of the CTA: two for partial sums, then one a row part.
  static constexpr int kPartialsFree = 1, kPartialsFull = 2, kFirstStaging = 3;
  static constexpr int kPartialThreads = 128 * Traits::kConsumers;

  __device__ __forceinline__ uint32_t partials(int part) const {
    return shared_ + Traits::kPartialOffset +
           (row_part_ * (Traits::kDepthParts - 1) + part - 1) * Traits::kPartialBytes + thread_ * 4;
  }

  __device__ __forceinline__ void hand_over(const Sums<Traits>& sums) const {
#pragma unroll
    for (int i = 0; i < Traits::kRowBlocks * kSums; ++i) {
      ptx::st_shared_f32(partials(depth_part_) + i * 512, sums.of[i / kSums][i % kSums]);
    }
  }

  /// Adds the other parts' sums in order.
  __device__ __forceinline__ void collect(Sums<Traits>& sums) const {
#pragma unroll
    for (int part = 1; part < Traits::kDepthParts; ++part) {
#pragma unroll
      for (int i = 0; i < Traits::kRowBlocks * kSums; ++i) {
        sums.of[i / kSums][i % kSums] += ptx::ld_shared_f32(partials(part) + i * 512);
      }
    }
  }

  __device__ __forceinline__ uint32_t alphas() const {
    return shared_ + Traits::kAlphaOffset + row_part_ * Traits::kAlphaBytes;
  }

  /// alpha of every token and half, including what the decode left out. Scaling by a power of two commutes
  /// with rounding, unless alpha is beyond 2^121.
  __device__ __forceinline__ void publish_alphas() const {
#pragma unroll
    for (int i = 0; i < TileScales<Traits>::kRowsPerThread; ++i) {
      const int token = i * 128 + thread_;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        if (token < Traits::kTokens) {
          ptx::st_shared_f32(alphas() + (half * Traits::kTokens + token) * 4,
                             scales_.of_row[i] * scales_.globals[half] * kDecodedToValue);
        }
      }
    }
    ptx::bar_sync(kFirstStaging + row_part_, 128);
  }

  __device__ __forceinline__ int first_block() const {
    return tile_.row_tile * Traits::kTileBlocks + row_part_ * Traits::kRowBlocks;
  }

  /// Bias of the lower (0) or upper (1) row of this thread in a row block. Absent: -0, which changes no sum.
  __device__ __forceinline__ float bias(int block, int upper) const {
    if (args_.bias == nullptr) return -0.0f;
    const int slab = (first_block() + block) * 4 + thread_ / 32, g = thread_ % 32 / 4;
    const int channel = kPaired ? slab * 8 + g : slab * 16 + upper * 8 + g;
    if (channel >= args_.channels) return -0.0f;
    const int64_t row = int64_t{tile_.expert} * kHalves + (kPaired ? upper : 0);
    return args_.bias[row * args_.channels + channel];
  }

  /// alpha * sum + bias with the specified roundings.
  static __device__ __forceinline__ float scaled(float alpha, float sum, float bias) {
    return __fadd_rn(__fmul_rn(alpha, sum), bias);
  }

  __device__ __forceinline__ void store_float32(const Sums<Traits>& sums,
                                                const float (&biases)[Traits::kRowBlocks][2],
                                                int round) const {
    const int lane = thread_ % 32;
    float* d = static_cast<float*>(args_.d);
#pragma unroll
    for (int i = 0; i < kRound / 2; ++i) {
      const int token = round * kRound + i / 4 * 8 + lane % 4 * 2 + i % 2, upper = i / 2 % 2;
      const float alpha = ptx::ld_shared_f32(alphas() + token * 4);
#pragma unroll
      for (int b = 0; b < Traits::kRowBlocks; ++b) {
        const int channel = (first_block() + b) * kUnitRows + thread_ / 32 * 16 + upper * 8 + lane / 4;
        if (token < tile_.rows && channel < args_.channels) {
          d[(int64_t{tile_.first_row} + token) * args_.d_stride + channel] =
              scaled(alpha, sums.of[b][round * kRound / 2 + i], biases[b][upper]);
        }
      }
    }
  }

  __device__ __forceinline__ uint32_t staging_buffer(int round) const {
    return shared_ + Traits::kStagingOffset + row_part_ * Traits::kStagingBytes +
           round % 2 * (Traits::kStagingBytes / 2);
  }

  /// Where chunk `chunk` of staged token `token` lies; the swizzle spreads a column over all banks.
  static __device__ __forceinline__ uint32_t staged(uint32_t buffer, int token, int chunk) {
    return buffer + token * Traits::kStagingRowBytes + (chunk ^ (token % 8)) * 16;
  }

  __device__ __forceinline__ void stage_round(const Sums<Traits>& sums,
                                              const float (&biases)[Traits::kRowBlocks][2], int round) const {
    const uint32_t buffer = staging_buffer(round);
    const int lane = thread_ % 32;
#pragma unroll
    for (int b = 0; b < Traits::kRowBlocks; ++b) {
      uint32_t pairs[kRound / 8][2];
#pragma unroll
      for (int c = 0; c < kRound / 8; ++c) {
        const int first = (round * kRound + c * 8) / 2;  // of the eight tokens' sums
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
          const int half = kPaired ? upper : 0;
          const float2 alpha = ptx::ld_shared_v2_f32(
              alphas() + (half * Traits::kTokens + round * kRound + c * 8 + lane % 4 * 2) * 4);
          pairs[c][upper] =
              ptx::cvt_rn_bf16x2(scaled(alpha.y, sums.of[b][first + upper * 2 + 1], biases[b][upper]),
                                 scaled(alpha.x, sums.of[b][first + upper * 2], biases[b][upper]));
        }
      }
      // Lane i of matrix m = lane / 8 names the chunk of token i; matrices are lower, upper (, then 8 tokens
      // on).
      const int chunk = b * 8 + thread_ / 32 * 2 + lane / 8 % 2, token = lane / 16 * 8 % kRound + lane % 8;
      if constexpr (kRound == 8) {
        ptx::stmatrix_x2_trans(staged(buffer, token, chunk), pairs[0][0], pairs[0][1]);
      } else {
#pragma unroll
        for (int c = 0; c < kRound / 8; c += 2) {
          ptx::stmatrix_x4_trans(staged(buffer, c * 8 + token, chunk), pairs[c][0], pairs[c][1],
                                 pairs[c + 1][0], pairs[c + 1][1]);
        }
      }
    }
  }

  /// What one thread writes of every round: 8 channels of every kStride-th token.
  struct Piece {
    int token;    ///< of the round: the first
    int channel;  ///< the first
    bool there;   ///< has channels and tokens at all
    int64_t row;  ///< of the output, for round 0
  };
  static constexpr int kPieces = kChunks / kHalves;  ///< of a token
  static constexpr int kStride = 128 / kPieces;

  __device__ __forceinline__ Piece my_piece() const {
    const int token = thread_ / kPieces;
    const int channel = first_block() * (kUnitRows / kHalves) + thread_ % kPieces * 8;
    return {token, channel, token < kRound && channel < args_.channels, int64_t{tile_.first_row} + token};
  }

  __device__ __forceinline__ void write_round(const Piece& piece, int round) const {
    const uint32_t buffer = staging_buffer(round);
#pragma unroll
    for (int token = 0; token < kRound; token += kStride) {
      if (!piece.there || round * kRound + token + piece.token >= tile_.rows) continue;
      const int64_t row = piece.row + (round * kRound + token);
      const int chunk = thread_ % kPieces * kHalves;
      const uint4 first = ptx::ld_shared_v4(staged(buffer, token + piece.token, chunk));
      auto* d = static_cast<uint16_t*>(args_.d) + row * args_.d_stride + piece.channel;
      if constexpr (kPaired) {
        const uint4 up = ptx::ld_shared_v4(staged(buffer, token + piece.token, chunk + 1));
        if (args_.d != nullptr) {
          const uint4 activated = {activate(first.x, up.x), activate(first.y, up.y), activate(first.z, up.z),
                                   activate(first.w, up.w)};
          if (args_.requantize_scales != nullptr) {
            write_quantized(activated, d, row, piece.channel);
          } else {
            *reinterpret_cast<uint4*>(d) = activated;
          }
        }
        if (args_.h != nullptr) {
          Bf16* h = args_.h + row * args_.h_stride + piece.channel;
          *reinterpret_cast<uint4*>(h) = first;
          *reinterpret_cast<uint4*>(h + args_.channels) = up;
        }
      } else {
        *reinterpret_cast<uint4*>(d) = first;
      }
    }
  }

  /// Half a block of sixteen channels; the neighbouring lane has the other.
  __device__ __forceinline__ void write_quantized(const uint4& activated, uint16_t* d, int64_t row,
                                                  int channel) const {
    const uint32_t words[4] = {activated.x, activated.y, activated.z, activated.w};
    HalfBlock values = HalfBlock::unpack(words);
    const HalfBlock decoded = values.rounded(scales_.requantize);
    store(decoded, d);
    if (channel == 0) args_.d_row_scales[row] = scales_.requantize;
    if (args_.residual == nullptr) return;
    values.subtract(decoded, scales_.requantize);
    store(values.rounded(scales_.requantize), args_.residual + row * args_.d_stride + channel);
  }

  static __device__ __forceinline__ void store(const HalfBlock& values, void* to) {
    uint32_t words[4];
    values.pack(words);
    *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  }

  __device__ __forceinline__ uint32_t activate(uint32_t gates, uint32_t ups) const {
    return ptx::cvt_rn_bf16x2(swiglu(args_.swiglu, high_bf16(gates), high_bf16(ups)),
                              swiglu(args_.swiglu, low_bf16(gates), low_bf16(ups)));
  }

  const GemmKernelArgs& args_;
  uint32_t shared_;
  int row_part_, depth_part_, thread_;
  const WorkTile& tile_;
  const TileScales<Traits>& scales_;
};

}  // namespace fourfold::sm90
