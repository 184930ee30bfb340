#include "tools/planted_numbers.h"

#include <bit>
#include <cmath>

namespace fourfold::planted {

float bf16(float value) {
  if (std::isnan(value)) return value;
  const auto bits = std::bit_cast<uint32_t>(value);
  return std::bit_cast<float>((bits + 0x7FFFu + (bits >> 16 & 1u)) & 0xFFFF0000u);
}

float e4m3_value(int byte, int bias, int largest) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  if ((byte & 127) > largest) return byte & 128 ? -240.0f : 240.0f;
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -2 - bias)
                                        : std::ldexp(static_cast<float>(8 + mantissa), exponent - bias - 3);
  return byte & 128 ? -magnitude : magnitude;
}

const std::array<float, 127>& e4m3_table() {
  static const std::array<float, 127> table = [] {
    std::array<float, 127> values{};
    for (int byte = 0; byte < 127; ++byte) values[static_cast<size_t>(byte)] = e4m3_value(byte, 7, 126);
    return values;
  }();
  return table;
}

uint8_t quantize_block(float* values, float global, float divisor, bool is_weight, bool multiplies) {
  float amax = 0.0f;
  for (int k = 0; k < 16; ++k) amax = std::max(amax, std::abs(values[k]));
  const float wanted =
      multiplies && !is_weight ? amax * (1.0f / 6.0f) * (1.0f / divisor) : amax / 6.0f / divisor;
  int code = nearest(e4m3_table(), wanted);
  if (is_weight && code == 0) code = amax == 0.0f ? 0x38 : 1;
  const float scale = e4m3_table()[static_cast<size_t>(code)];
  for (int k = 0; k < 16; ++k) {
    const float x = scale == 0.0f ? 0.0f : values[k] * (1.0f / (scale * (is_weight ? global : divisor)));
    const float rounded = kFp4[static_cast<size_t>(nearest(kFp4, std::abs(x)))] * scale;
    values[k] = x < 0.0f ? -rounded : rounded;
  }
  return static_cast<uint8_t>(code);
}

}  // namespace fourfold::planted
