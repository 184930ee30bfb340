#include "cpu/kernels.h"

#include <algorithm>

namespace fourfold::cpu {

namespace {

constexpr Kernels kPortable = {.isa = Isa::kPortable,
                               .multiply_ints = portable::multiply_ints,
                               .decode_floats = portable::decode_floats,
                               .multiply_floats = portable::multiply_floats};
constexpr Kernels kAvx2 = {.isa = Isa::kAvx2,
                           .multiply_ints = avx2::multiply_ints,
                           .decode_floats = avx2::decode_floats,
                           .multiply_floats = avx2::multiply_floats};
constexpr Kernels kAvx512 = {.isa = Isa::kAvx512,
                             .multiply_ints = avx512::multiply_ints,
                             .decode_floats = avx512::decode_floats,
                             .multiply_floats = avx512::multiply_floats,
                             .multiply_few_floats = avx512::multiply_few_floats};

constexpr Kernels with_pairs() {
  Kernels kernels = kAvx512;
  kernels.isa = Isa::kAvx512Bf16;
  kernels.multiply_bf16 = avx512_bf16::multiply_bf16;
  return kernels;
}
constexpr Kernels with_tiles() {
  Kernels kernels = kAvx512;
  kernels.isa = Isa::kAmx;
  kernels.multiply_tiles = amx::multiply_tiles;
  kernels.begin_tiles = amx::begin_tiles;
  kernels.end_tiles = amx::end_tiles;
  return kernels;
}
constexpr Kernels with_emulated_tiles() {
  Kernels kernels = kAvx512;
  kernels.isa = Isa::kAmx;
  kernels.multiply_tiles = amx::multiply_emulated_tiles;
  return kernels;
}

constexpr Kernels kAvx512Bf16 = with_pairs(), kAmx = with_tiles(), kEmulatedTiles = with_emulated_tiles();

}  // namespace

const Kernels& kernels_of(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
      return kAmx;
    case Isa::kAvx512Bf16:
      return kAvx512Bf16;
    case Isa::kAvx512:
      return kAvx512;
    case Isa::kAvx2:
      return kAvx2;
    case Isa::kPortable:
      break;
  }
  return kPortable;
}

const Kernels& kernels_with_emulated_tiles() {
  return kEmulatedTiles;
}

void multiply_pair_floats(const Kernels& kernels, const uint8_t* pair, int64_t chunks, const float* rows,
                          int64_t row_count, std::byte* scratch, float* sums) {
  if (kernels.multiply_few_floats != nullptr && row_count <= kFewFloatRows) {
    return kernels.multiply_few_floats(pair, chunks, rows, row_count, sums);
  }
  auto* const weights = reinterpret_cast<float*>(scratch);
  std::fill_n(sums, row_count * kPairRows, 0.0f);
  for (int64_t chunk = 0; chunk < chunks; chunk += kFloatChunks) {
    const int64_t count = std::min(kFloatChunks, chunks - chunk);
    kernels.decode_floats(pair + chunk * kPairChunkBytes, count, weights);
    kernels.multiply_floats(weights, count * kChunkDepth, rows + chunk * kChunkDepth, chunks * kChunkDepth,
                            row_count, sums);
  }
}

}  // namespace fourfold::cpu
