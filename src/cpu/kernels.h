// The multiplications, one table an instruction set.
//
// All of them multiply rows of activations (operands.h) by a pair of panels (panel_layout.h) and give
// sums [row][32]: 16 columns of the first panel, 16 of the second. Global scales are the caller's.
// Codes and scales of the pair are finite and not negative: others are irregular_multiply.h's.
//
// Sums of ints: for every row and column, block after block, sum = fma(integer * weight scale, row scale,
// sum) in float32, where the integer is the block's exact sum and its product with the weight's scale is
// exact: all instruction sets give the same bits. Sums of floats, bf16 products and tiles have an order of
// their own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "cpu/isa.h"
#include "cpu/operands.h"
#include "fourfold/number_formats.h"

namespace fourfold::cpu {

/// Bytes of scratch that kernels take, 64-byte aligned, like sums.
inline constexpr int64_t kKernelScratchBytes = 32 << 10;
/// Chunks of which floats are decoded at a time: 32 KB of weights stay in the first-level cache.
inline constexpr int64_t kFloatChunks = 4;
inline constexpr int64_t kFloatDepth = kFloatChunks * kChunkDepth;
static_assert(kFloatDepth * kPairRows * int64_t{sizeof(float)} <= kKernelScratchBytes);

/// Up to so many rows multiply_few_floats takes.
inline constexpr int64_t kFewFloatRows = 6;

/// What the next calls of multiply_tiles read, and is brought nearer meanwhile.
struct NextTiles {
  const uint8_t* pair = nullptr;    ///< of as many chunks; null: there is none
  const std::byte* rows = nullptr;  ///< operands that are asked for during this call
  int64_t row_bytes = 0;
};

/// What multiply_tiles has left in its scratch.
struct DecodedAhead {
  const uint8_t* pair = nullptr;  ///< its beginning lies decoded; null: none does
  int64_t half = 0;               ///< of the scratch, in which it lies or the next pair is to begin
};

struct Kernels {
  Isa isa = Isa::kPortable;
  /// sums [row_count][32] = rows x pair. Rows are `chunks * kBlocksPerChunk` blocks apart.
  void (*multiply_ints)(const uint8_t* pair, int64_t chunks, const IntBlock* rows, int64_t row_count,
                        std::byte* scratch, float* sums) = nullptr;
  /// weights [chunks * 64][32] = values of the pair; exact.
  void (*decode_floats)(const uint8_t* pair, int64_t chunks, float* weights) = nullptr;
  /// sums [row_count][32] += rows [row_count][depth] x weights [depth][32].
  void (*multiply_floats)(const float* weights, int64_t depth, const float* rows, int64_t row_stride,
                          int64_t row_count, float* sums) = nullptr;
  /// sums [row_count][32] = rows x pair, the bits that decode_floats and multiply_floats give kFloatChunks at
  /// a time, for at most kFewFloatRows rows. Null where those are as good.
  void (*multiply_few_floats)(const uint8_t* pair, int64_t chunks, const float* rows, int64_t row_count,
                              float* sums) = nullptr;
  /// sums [row_count][32] = rows x pair; a row is `chunks * 64` values. Null where there are no bf16
  /// products.
  void (*multiply_bf16)(const uint8_t* pair, int64_t chunks, const Bf16* rows, int64_t row_count,
                        std::byte* scratch, float* sums) = nullptr;
  /// sums [row_tiles * 16][32] = tiles x pair. Between begin_tiles and end_tiles. Null where there are no
  /// tiles. Begins to decode `next.pair` for the next call, which gets the same scratch and `ahead`.
  void (*multiply_tiles)(const uint8_t* pair, const NextTiles& next, int64_t chunks, const std::byte* tiles,
                         int64_t row_tiles, int terms, std::byte* scratch, DecodedAhead& ahead,
                         float* sums) = nullptr;
  /// Around multiply_tiles, on each thread; null where there are no tiles.
  void (*begin_tiles)() = nullptr;
  void (*end_tiles)() = nullptr;
};

const Kernels& kernels_of(Isa isa);
/// Those of kAmx with the tile instructions computed in plain C++: for tests, where the CPU has AVX-512 and
/// no tiles.
const Kernels& kernels_with_emulated_tiles();
/// Why they can't run here; empty when they can.
std::string why_no_emulated_tiles();

/// Floats over the whole depth of a pair of NVFP4 panels: sums [row_count][32] = rows x pair.
void multiply_pair_floats(const Kernels& kernels, const uint8_t* pair, int64_t chunks, const float* rows,
                          int64_t row_count, std::byte* scratch, float* sums);

// The entries of the tables, each in a file named after it.
namespace portable {
void multiply_ints(const uint8_t* pair, int64_t chunks, const IntBlock* rows, int64_t row_count,
                   std::byte* scratch, float* sums);
void decode_floats(const uint8_t* pair, int64_t chunks, float* weights);
void multiply_floats(const float* weights, int64_t depth, const float* rows, int64_t row_stride,
                     int64_t row_count, float* sums);
}  // namespace portable

namespace avx2 {
void multiply_ints(const uint8_t* pair, int64_t chunks, const IntBlock* rows, int64_t row_count,
                   std::byte* scratch, float* sums);
void decode_floats(const uint8_t* pair, int64_t chunks, float* weights);
void multiply_floats(const float* weights, int64_t depth, const float* rows, int64_t row_stride,
                     int64_t row_count, float* sums);
}  // namespace avx2

namespace avx512 {
void multiply_ints(const uint8_t* pair, int64_t chunks, const IntBlock* rows, int64_t row_count,
                   std::byte* scratch, float* sums);
void decode_floats(const uint8_t* pair, int64_t chunks, float* weights);
void multiply_floats(const float* weights, int64_t depth, const float* rows, int64_t row_stride,
                     int64_t row_count, float* sums);
void multiply_few_floats(const uint8_t* pair, int64_t chunks, const float* rows, int64_t row_count,
                         float* sums);
}  // namespace avx512

namespace avx512_bf16 {
void multiply_bf16(const uint8_t* pair, int64_t chunks, const Bf16* rows, int64_t row_count,
                   std::byte* scratch, float* sums);
}  // namespace avx512_bf16

namespace amx {
void multiply_tiles(const uint8_t* pair, const NextTiles& next, int64_t chunks, const std::byte* tiles,
                    int64_t row_tiles, int terms, std::byte* scratch, DecodedAhead& ahead, float* sums);
void begin_tiles();
void end_tiles();
void multiply_emulated_tiles(const uint8_t* pair, const NextTiles& next, int64_t chunks,
                             const std::byte* tiles, int64_t row_tiles, int terms, std::byte* scratch,
                             DecodedAhead& ahead, float* sums);
}  // namespace amx

}  // namespace fourfold::cpu
