// Block-scaled tensor cores read scales as ue4m3, without a sign; e4m3 has one. A negative scale is the same
// numbers with the signs of its sixteen codes turned.
#pragma once

#include <cstdint>

#include "fourfold/number_formats.h"

namespace fourfold::blackwell {

FOURFOLD_HOST_DEVICE constexpr uint8_t unsigned_scale(uint8_t e4m3) {
  return e4m3 & 0x7Fu;
}

/// To be xor-ed onto each eight codes of the block.
FOURFOLD_HOST_DEVICE constexpr uint32_t sign_flip(uint8_t e4m3) {
  return (e4m3 & 0x80u) != 0 ? 0x88888888u : 0u;
}

}  // namespace fourfold::blackwell
