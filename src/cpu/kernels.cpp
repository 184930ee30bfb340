#include "cpu/kernels.h"

#include <algorithm>

namespace fourfold::cpu {

const Kernels& kernels_of(Isa isa) {
  static constexpr Kernels kAvx512 = {Isa::kAvx512, avx512::multiply_ints, avx512::decode_floats,
                                      avx512::multiply_floats, avx512::multiply_few_floats};
  static constexpr Kernels kAmx = {Isa::kAmx,
                                   avx512::multiply_ints,
                                   avx512::decode_floats,
                                   avx512::multiply_floats,
                                   avx512::multiply_few_floats,
                                   amx::multiply_tiles,
                                   amx::begin_tiles,
                                   amx::end_tiles};
  static constexpr Kernels kAvx2 = {Isa::kAvx2, avx2::multiply_ints, avx2::decode_floats,
                                    avx2::multiply_floats};
  static constexpr Kernels kPortable = {Isa::kPortable, portable::multiply_ints, portable::decode_floats,
                                        portable::multiply_floats};
  switch (isa) {
    case Isa::kAmx:
      return kAmx;
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
  static constexpr Kernels kEmulated = {Isa::kAmx,
                                        avx512::multiply_ints,
                                        avx512::decode_floats,
                                        avx512::multiply_floats,
                                        avx512::multiply_few_floats,
                                        amx::multiply_emulated_tiles};
  return kEmulated;
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
