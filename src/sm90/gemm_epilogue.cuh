// What becomes of a tile's sums: partial sums added, alpha and bias, rounding, SwiGLU, and the way to memory.
//
// A thread's accumulators are 16-bit columns of tokens; memory wants rows of channels. A few tokens at a time
// go through shared memory, transposed by stmatrix, and leave in 16-byte pieces ("chunks", 8 channels). Gate
// and up of a channel are in the same thread (RowOrder::kGateUpPaired), which activates them before.
#pragma once

#include <cstdint>
#include <type_traits>

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
    Biases biases;
#pragma unroll
    for (int b = 0; b < kRowBlocks; ++b) {
      biases[b][0] = bias(b, 0);
      biases[b][1] = bias(b, 1);
    }
    if constexpr (kPaired) {
      if (args_.h != nullptr) write_h(sums, biases);
      if (args_.d == nullptr) return;
    } else if (args_.d_is_float32) {
#pragma unroll
      for (int round = 0; round < kRounds; ++round) {
        if (round * kRound >= tile_.rows) break;
        store_float32(sums, biases, round);
      }
      ptx::bar_sync(kFirstStaging + row_part_, 128);  // all have read the alphas
      return;
    }
    // Two buffers take turns: a round is staged while the one before is written, and one barrier a round is
    // enough. Whoever stages into a buffer has passed the barrier that all others reached after reading it;
    // between tiles, publish_alphas() has it.
    stage_round<0>(sums, biases);
    // A loop where there are many rounds, whose writing is then there once.
#pragma unroll(kRounds > 4 ? 1 : kRounds)
    for (int round = 0; round < kRounds; ++round) {
      ptx::bar_sync(kFirstStaging + row_part_, 128);
      const bool last = (round + 1) * kRound >= tile_.rows;
      if (!last) at_round(round + 1, [&](auto at) { stage_round<decltype(at)::value>(sums, biases); });
      write_round(round);
      if (last) return;
    }
  }

 private:
  static constexpr int kHalves = kPaired ? 2 : 1;
  static constexpr int kRowBlocks = Traits::kRowBlocks;
  static constexpr int kRound = Traits::kStagingTokens;  ///< tokens staged at a time
  static constexpr int kRounds = Traits::kTokens / kRound;
  static constexpr int kEights = kRound / 8;            ///< of tokens
  static constexpr int kSumChunks = 8 * kRowBlocks;     ///< of a token's sums
  static constexpr int kChunks = kSumChunks / kHalves;  ///< of a token of the result
  static constexpr int kSums = Traits::kTokens / 2;     ///< of a row block
  using Biases = float[kRowBlocks][2];
  static_assert(kRound * (kSumChunks + 1) * 16 <= Traits::kStagingBytes / 2);

  // Barriers of the CTA: two for partial sums, then one a row part.
  static constexpr int kPartialsFree = 1, kPartialsFull = 2, kFirstStaging = 3;
  static constexpr int kPartialThreads = 128 * Traits::kConsumers;

  __device__ __forceinline__ uint32_t partials(int part) const {
    return shared_ + Traits::kPartialOffset +
           (row_part_ * (Traits::kDepthParts - 1) + part - 1) * Traits::kPartialBytes + thread_ * 4;
  }

  __device__ __forceinline__ void hand_over(const Sums<Traits>& sums) const {
#pragma unroll
    for (int i = 0; i < kRowBlocks * kSums; ++i) {
      ptx::st_shared_f32(partials(depth_part_) + i * 512, sums.of[i / kSums][i % kSums]);
    }
  }

  /// Adds the other parts' sums in order.
  __device__ __forceinline__ void collect(Sums<Traits>& sums) const {
#pragma unroll
    for (int part = 1; part < Traits::kDepthParts; ++part) {
#pragma unroll
      for (int i = 0; i < kRowBlocks * kSums; ++i) {
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
    return tile_.row_tile * Traits::kTileBlocks + row_part_ * kRowBlocks;
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

  __device__ __forceinline__ void store_float32(const Sums<Traits>& sums, const Biases& biases,
                                                int round) const {
    const int lane = thread_ % 32;
    float* d = static_cast<float*>(args_.d);
#pragma unroll
    for (int i = 0; i < kRound / 2; ++i) {
      const int token = round * kRound + i / 4 * 8 + lane % 4 * 2 + i % 2, upper = i / 2 % 2;
      const float alpha = ptx::ld_shared_f32(alphas() + token * 4);
#pragma unroll
      for (int b = 0; b < kRowBlocks; ++b) {
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

  /// Where chunk `chunk` of staged token `token` lies, of kRowChunks. 16 bytes between rows spread the chunks
  /// of eight neighbouring tokens over all banks.
  template <int kRowChunks>
  static __device__ __forceinline__ uint32_t staged(uint32_t buffer, int token, int chunk) {
    return buffer + (token * (kRowChunks + 1) + chunk) * 16;
  }

  /// `action` of an integral constant: sums are registers, so that every round has code of its own.
  template <int kFirst = 0, class Action>
  static __device__ __forceinline__ void at_round(int round, const Action& action) {
    if constexpr (kFirst < kRounds) {
      if (round == kFirst) {
        action(std::integral_constant<int, kFirst>{});
      } else {
        at_round<kFirst + 1>(round, action);
      }
    }
  }

  /// Two tokens' alphas: of eight tokens `eight`, the two whose sums this thread has.
  __device__ __forceinline__ float2 two_alphas(int half, int eight) const {
    return ptx::ld_shared_v2_f32(alphas() + (half * Traits::kTokens + eight * 8 + thread_ % 4 * 2) * 4);
  }

  /// The lower (0) or upper (1) row's results for those two tokens, rounded.
  static __device__ __forceinline__ uint32_t rounded(const Sums<Traits>& sums, const Biases& biases,
                                                     float2 alpha, int block, int upper, int eight) {
    const float* const two = &sums.of[block][eight * 4 + upper * 2];
    return ptx::cvt_rn_bf16x2(scaled(alpha.y, two[1], biases[block][upper]),
                              scaled(alpha.x, two[0], biases[block][upper]));
  }

  template <int kThis>
  __device__ __forceinline__ void stage_round(const Sums<Traits>& sums, const Biases& biases) const {
    if constexpr (kPaired) {
      stage_activated<kThis>(sums, biases);
    } else {
      stage_sums<kThis>(sums, biases, staging_buffer(kThis));
    }
  }

  /// Both rows of every slab, chunks 2i and 2i + 1.
  template <int kThis>
  __device__ __forceinline__ void stage_sums(const Sums<Traits>& sums, const Biases& biases,
                                             uint32_t buffer) const {
    constexpr int kTogether = kEights == 1 ? 1 : 2;  // eights of tokens that a store takes
    const int lane = thread_ % 32;
#pragma unroll
    for (int c = 0; c < kEights; c += kTogether) {
      float2 alpha[kTogether][kHalves];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) alpha[i][half] = two_alphas(half, kThis * kEights + c + i);
      }
#pragma unroll
      for (int b = 0; b < kRowBlocks; ++b) {
        uint32_t m[kTogether][2];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
#pragma unroll
          for (int upper = 0; upper < 2; ++upper) {
            m[i][upper] =
                rounded(sums, biases, alpha[i][kPaired ? upper : 0], b, upper, kThis * kEights + c + i);
          }
        }
        // Lane i of matrix lane / 8 names the chunk of token i; matrices are lower, upper (, then 8 tokens
        // on).
        const int chunk = b * 8 + thread_ / 32 * 2 + lane / 8 % 2;
        if constexpr (kTogether == 1) {
          ptx::stmatrix_x2_trans(staged<kSumChunks>(buffer, lane % 8, chunk), m[0][0], m[0][1]);
        } else {
          const int token = c * 8 + lane / 16 * 8 + lane % 8;
          ptx::stmatrix_x4_trans(staged<kSumChunks>(buffer, token, chunk), m[0][0], m[0][1], m[1][0],
                                 m[1][1]);
        }
      }
    }
  }

  /// SwiGLU of both rows of every slab, a chunk.
  template <int kThis>
  __device__ __forceinline__ void stage_activated(const Sums<Traits>& sums, const Biases& biases) const {
    static_assert(kEights == 1 || kEights == 2 || kEights == 4);
    uint32_t m[kRowBlocks][kEights];
#pragma unroll
    for (int c = 0; c < kEights; ++c) {
      const int eight = kThis * kEights + c;
      const float2 gate = two_alphas(0, eight), up = two_alphas(1, eight);
#pragma unroll
      for (int b = 0; b < kRowBlocks; ++b) {
        m[b][c] = swiglu_pair(args_.swiglu, rounded(sums, biases, gate, b, 0, eight),
                              rounded(sums, biases, up, b, 1, eight));
      }
    }
    // Lane i of matrix lane / 8 names the chunk of token i; matrices are eights of tokens.
    const int token = thread_ % (kEights * 8);
#pragma unroll
    for (int b = 0; b < kRowBlocks; ++b) {
      const uint32_t to = staged<kChunks>(staging_buffer(kThis), token, b * 4 + thread_ / 32);
      if constexpr (kEights == 1) {
        ptx::stmatrix_x1_trans(to, m[b][0]);
      } else if constexpr (kEights == 2) {
        ptx::stmatrix_x2_trans(to, m[b][0], m[b][1]);
      } else {
        ptx::stmatrix_x4_trans(to, m[b][0], m[b][1], m[b][2], m[b][3]);
      }
    }
  }

  /// Every thread writes one chunk of each kStride-th token of a round.
  static constexpr int kStride = 128 / kChunks, kWrites = (kRound + kStride - 1) / kStride;

  __device__ __forceinline__ void write_round(int round) const {
    const int chunk = thread_ % kChunks, first = thread_ / kChunks;
    const int channel = first_block() * (kUnitRows / kHalves) + chunk * 8;
    const int left =
        min(tile_.rows - round * kRound, kRound) - first;  // tokens, this thread's first among them
    if (left <= 0 || channel >= args_.channels) return;
    const int64_t row = int64_t{tile_.first_row} + round * kRound + first;
    auto* d = static_cast<uint16_t*>(args_.d) + row * args_.d_stride + channel;
    const uint32_t from = staged<kChunks>(staging_buffer(round), first, chunk);
    constexpr int kStep = kStride * (kChunks + 1) * 16;
    uint4 values[kWrites];
#pragma unroll
    for (int i = 0; i < kWrites; ++i) {
      values[i] = ptx::ld_shared_v4(from + i * kStep);
    }
    if constexpr (kPaired) {
      if (args_.requantize_scales != nullptr) {
#pragma unroll
        for (int i = 0; i < kWrites; ++i) {
          if (i * kStride < left)
            write_quantized(values[i], d + i * kStride * args_.d_stride, row + i * kStride, channel);
        }
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < kWrites; ++i) {
      if (i * kStride < left) *reinterpret_cast<uint4*>(d + i * kStride * args_.d_stride) = values[i];
    }
  }

  /// h, for its tap or for an activation that is a kernel of its own; gate's columns first.
  __device__ __forceinline__ void write_h(const Sums<Traits>& sums, const Biases& biases) const {
    const int chunk = thread_ % kSumChunks;
    const int channel = first_block() * (kUnitRows / 2) + chunk / 2 * 8;
    Bf16* h = args_.h + int64_t{tile_.first_row} * args_.h_stride + chunk % 2 * args_.channels + channel;
#pragma unroll 1
    for (int round = 0; round * kRound < tile_.rows; ++round) {
      const uint32_t buffer = staging_buffer(0);
      at_round(round, [&](auto at) { stage_sums<decltype(at)::value>(sums, biases, buffer); });
      ptx::bar_sync(kFirstStaging + row_part_, 128);
      const int tokens = channel < args_.channels ? min(tile_.rows - round * kRound, kRound) : 0;
      for (int token = thread_ / kSumChunks; token < tokens; token += 128 / kSumChunks) {
        *reinterpret_cast<uint4*>(h + (round * kRound + token) * args_.h_stride) =
            ptx::ld_shared_v4(staged<kSumChunks>(buffer, token, chunk));
      }
      ptx::bar_sync(kFirstStaging + row_part_, 128);
    }
  }

  /// Half a block of sixteen channels; the neighbouring lane has the other.
  __device__ __forceinline__ void write_quantized(const uint4& activated, uint16_t* d, int64_t row,
                                                  int channel) const {
    const uint32_t words[4] = {activated.x, activated.y, activated.z, activated.w};
    HalfBlock values = HalfBlock::unpack(words);
    uint32_t decoded[4];
    values.round(scales_.requantize, decoded);
    store(decoded, d);
    if (channel == 0) args_.d_row_scales[row] = scales_.requantize;
    if (args_.residual == nullptr) return;
    values.subtract(HalfBlock::unpack(decoded), scales_.requantize);
    values.round(scales_.requantize, decoded);
    store(decoded, args_.residual + row * args_.d_stride + channel);
  }

  static __device__ __forceinline__ void store(const uint32_t (&words)[4], void* to) {
    *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  }

  const GemmKernelArgs& args_;
  uint32_t shared_;
  int row_part_, depth_part_, thread_;
  const WorkTile& tile_;
  const TileScales<Traits>& scales_;
};

}  // namespace fourfold::sm90
