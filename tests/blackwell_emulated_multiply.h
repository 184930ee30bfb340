// The arithmetic of mma.sync.m16n8k64 with block scales, for e2m1 codes and ue4m3 scales of 16, lane for
// lane: on the host in blackwell_layout_test.cpp, on a GPU without the instruction in
// blackwell_emulation.cuh.
#pragma once

#include <cstdint>

#include "fourfold/number_formats.h"

namespace fourfold::emulation {

/// Products of eight pairs of codes, summed: multiples of 1/4 below 2^9, exact.
FOURFOLD_HOST_DEVICE inline float dot_eight(uint32_t a, uint32_t b) {
  float sum = 0.0f;
  for (int i = 0; i < 8; ++i) {
    sum += decode_e2m1(static_cast<uint8_t>(a >> (4 * i) & 15u)) *
           decode_e2m1(static_cast<uint8_t>(b >> (4 * i) & 15u));
  }
  return sum;
}

/// Byte `index` of a word of scales, which are unsigned: the sign bit is not looked at.
FOURFOLD_HOST_DEVICE inline float scale_of(uint32_t word, int index) {
  return decode_e4m3(static_cast<uint8_t>(word >> (8 * index) & 0x7Fu));
}

/// What lane `lane` adds to its four sums: rows g and g + 8, columns 2q and 2q + 1, where lane = 4g + q.
/// `warp` reads registers of other lanes: a(register, lane), b(register, lane), a_scales(lane),
/// b_scales(lane). A block of 16 is exact before it is added.
template <class Warp>
FOURFOLD_HOST_DEVICE void multiply_lane(int lane, const Warp& warp, float (&sums)[4]) {
  const int group = lane / 4, quad = lane % 4;
  for (int block = 0; block < 4; ++block) {  // of 16 along K: two lanes of a quad hold eight each
    const int half = block / 2, first = block % 2 * 2;
    for (int i = 0; i < 4; ++i) {
      const int upper = i / 2, column = quad * 2 + i % 2;
      float sum = 0.0f;
      for (int q = first; q < first + 2; ++q) {
        sum += dot_eight(warp.a(half * 2 + upper, group * 4 + q), warp.b(half, column * 4 + q));
      }
      sums[i] += sum * scale_of(warp.a_scales(group * 4 + upper), block) *
                 scale_of(warp.b_scales(column * 4), block);
    }
  }
}

}  // namespace fourfold::emulation
