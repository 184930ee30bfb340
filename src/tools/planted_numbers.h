// Number formats of the planted engine (planted_engine.h), by formulas and tables of its own.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

namespace fourfold::planted {

float bf16(float value);

/// Values of e4m3 bytes, by sign, exponent and mantissa.
float e4m3_value(int byte, int bias, int largest);
/// Of the bytes 0 to 126, ascending.
const std::array<float, 127>& e4m3_table();

inline constexpr std::array<float, 8> kFp4 = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};

/// Nearest of an ascending table of magnitudes, ties to the even index, the last one beyond its end.
template <size_t kCount>
int nearest(const std::array<float, kCount>& table, float magnitude) {
  const auto above =
      static_cast<size_t>(std::lower_bound(table.begin(), table.end(), magnitude) - table.begin());
  if (above == 0) return 0;
  if (above == kCount) return static_cast<int>(kCount) - 1;
  const double middle = (double{table[above - 1]} + double{table[above]}) / 2.0;
  if (magnitude == middle) return static_cast<int>(above % 2 == 0 ? above : above - 1);
  return static_cast<int>(magnitude < middle ? above - 1 : above);
}

/// 16 values become e2m1 x e4m3, without the global scale; returns the e4m3 code. `divisor`: the global scale
/// that quantizes. Weights have a smallest scale, and 1 where all values are zero. `multiplies`: by
/// reciprocals, where others divide.
uint8_t quantize_block(float* values, float global, float divisor, bool is_weight, bool multiplies);

}  // namespace fourfold::planted
