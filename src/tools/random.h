// Reproducible random numbers: xoshiro256++ streams, one a row, so that data do not depend on threads.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <numbers>

namespace fourfold {

class Random {
 public:
  enum class Purpose : uint8_t {
    kWeight,
    kRouter,
    kToken,
    kChannel,
    kRouting,
    kOperand,
    kGroups,
    kTokenId,
    kHashTable,
    kBias,
    kSharedWeight,
    kSharedGate,
  };

  /// Streams of different purpose or number are independent. index < 2^56.
  Random(uint64_t seed, Purpose purpose, uint64_t index) {
    const uint64_t stream = (uint64_t{static_cast<uint8_t>(purpose)} << 56) + index;
    uint64_t x = seed ^ (stream * 0x9E3779B97F4A7C15u + 0xD1B54A32D192ED03u);
    for (uint64_t& word : state_) word = split_mix(x);
  }

  uint64_t bits() {
    const uint64_t result = std::rotl(state_[0] + state_[3], 23) + state_[0];
    const uint64_t t = state_[1] << 17;
    state_[2] ^= state_[0];
    state_[3] ^= state_[1];
    state_[1] ^= state_[2];
    state_[0] ^= state_[3];
    state_[2] ^= t;
    state_[3] = std::rotl(state_[3], 45);
    return result;
  }

  /// In [0, 1).
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }

  /// In [0, count).
  int64_t below(int64_t count) { return static_cast<int64_t>(uniform() * static_cast<double>(count)); }

  /// N(0, 1), by Box and Muller.
  double normal() {
    if (has_spare_) {
      has_spare_ = false;
      return spare_;
    }
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform())),
                 angle = 2.0 * std::numbers::pi * uniform();
    spare_ = radius * std::sin(angle);
    has_spare_ = true;
    return radius * std::cos(angle);
  }

  /// Student's t with `degrees` degrees of freedom: heavy tails.
  double student_t(int degrees) {
    double chi_squared = 0.0;
    for (int i = 0; i < degrees; ++i) {
      const double z = normal();
      chi_squared += z * z;
    }
    return normal() / std::sqrt(chi_squared / degrees);
  }

 private:
  static uint64_t split_mix(uint64_t& x) {
    uint64_t z = (x += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }

  std::array<uint64_t, 4> state_{};
  double spare_ = 0.0;
  bool has_spare_ = false;
};

}  // namespace fourfold
