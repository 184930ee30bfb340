// The tile kernel with its tile instructions in plain C++, by the operation sections of the Intel SDM.
#include <cpuid.h>

#include <cstring>

#include "cpu/tile_multiply.h"
#include "fourfold/number_formats.h"

namespace fourfold::cpu::amx {
namespace {

struct TileData {
  alignas(64) std::byte bytes[kTileRows][64];
};
thread_local TileData registers[8];

/// TDPBF16PS treats subnormal inputs as zero.
float widen(uint16_t bits) {
  const float value = static_cast<float>(Bf16{bits});
  return (bits & 0x7F80u) == 0 ? 0.0f : value;
}

void multiply_emulated(TileData& c, const TileData& a, const TileData& b) {
  constexpr int kPairs = 16, kColumns = 16;
  for (int row = 0; row < kTileRows; ++row) {
    float even[kColumns] = {}, odd[kColumns] = {};
    for (int pair = 0; pair < kPairs; ++pair) {
      uint16_t left[2], right[2 * kColumns];
      std::memcpy(left, a.bytes[row] + 4 * pair, sizeof(left));
      std::memcpy(right, b.bytes[pair], sizeof(right));
      for (int column = 0; column < kColumns; ++column) {
        even[column] += widen(left[0]) * widen(right[2 * column]);
        odd[column] += widen(left[1]) * widen(right[2 * column + 1]);
      }
    }
    float sums[kColumns];
    std::memcpy(sums, c.bytes[row], sizeof(sums));
    for (int column = 0; column < kColumns; ++column) sums[column] += even[column] + odd[column];
    std::memcpy(c.bytes[row], sums, sizeof(sums));
  }
}

struct EmulatedTiles {
  template <int kTile>
  static void zero() {
    std::memset(&registers[kTile], 0, sizeof(TileData));
  }
  template <int kTile>
  static void load(const void* from, int64_t stride_bytes) {
    for (int row = 0; row < kTileRows; ++row) {
      std::memcpy(registers[kTile].bytes[row], static_cast<const std::byte*>(from) + row * stride_bytes, 64);
    }
  }
  template <int kTile>
  static void store(void* to, int64_t stride_bytes) {
    for (int row = 0; row < kTileRows; ++row) {
      std::memcpy(static_cast<std::byte*>(to) + row * stride_bytes, registers[kTile].bytes[row], 64);
    }
  }
  template <int kC, int kA, int kB>
  static void multiply() {
    multiply_emulated(registers[kC], registers[kA], registers[kB]);
  }
};

}  // namespace

FOURFOLD_AVX512_FP16 void multiply_emulated_tiles(const uint8_t* pair, int64_t chunks, const std::byte* tiles,
                                                  int64_t row_tiles, int terms, std::byte* scratch,
                                                  float* sums) {
  multiply_pair<EmulatedTiles>(pair, chunks, tiles, row_tiles, terms, scratch, sums);
}

}  // namespace fourfold::cpu::amx

namespace fourfold::cpu {

std::string why_no_emulated_tiles() {
  if (!why_not(Isa::kAvx512).empty()) return why_not(Isa::kAvx512);
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr uint32_t kFp16Bit = 1u << 23;  // CPUID 7.0 EDX
  const bool known = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0;
  return known && (edx & kFp16Bit) != 0 ? "" : "the CPU has no avx512_fp16, with which tiles are decoded";
}

}  // namespace fourfold::cpu
