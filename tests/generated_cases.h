// For property tests: generated cases, the same ones every run unless FOURFOLD_SEED says otherwise.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "sanitized.h"

namespace fourfold {

/// Draws what a case is made of. One generator a case, so that a failing case can be run alone.
class Draw {
 public:
  explicit Draw(uint64_t seed) : random_(seed) {}

  /// Uniform in [low, high].
  int64_t integer(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }
  /// Uniform in [low, high].
  float real(float low, float high) { return std::uniform_real_distribution<float>(low, high)(random_); }
  float normal(float sigma) { return std::normal_distribution<float>(0.0f, sigma)(random_); }
  uint8_t byte() { return static_cast<uint8_t>(random_()); }
  bool chance(double probability) { return std::bernoulli_distribution(probability)(random_); }

  /// 0 .. count-1 in some order.
  std::vector<int64_t> order(int64_t count) {
    std::vector<int64_t> numbers(static_cast<size_t>(count));
    std::iota(numbers.begin(), numbers.end(), 0);
    std::shuffle(numbers.begin(), numbers.end(), random_);
    return numbers;
  }

  /// `count` groups of 0 to `most` rows, as offsets [count + 1]; one in three is empty.
  std::vector<int32_t> group_offsets(int64_t count, int64_t most) {
    std::vector<int32_t> offsets = {0};
    for (int64_t group = 0; group < count; ++group) {
      offsets.push_back(offsets.back() + static_cast<int32_t>(chance(1.0 / 3) ? 0 : integer(0, most)));
    }
    return offsets;
  }

 private:
  std::mt19937_64 random_;
};

/// Runs `property(draw)` on `cases` cases, a quarter of them under sanitizers. A failure names the case's
/// seed; FOURFOLD_SEED starts there.
template <class Property>
void for_generated_cases(int cases, const Property& property) {
  const char* const given = std::getenv("FOURFOLD_SEED");
  const uint64_t first = given != nullptr ? std::strtoull(given, nullptr, 10) : 1;
  if (kSanitized) cases = (cases + 3) / 4;
  for (uint64_t seed = first; seed < first + static_cast<uint64_t>(cases); ++seed) {
    SCOPED_TRACE(testing::Message() << "FOURFOLD_SEED=" << seed);
    Draw draw(seed);
    property(draw);
    if (testing::Test::HasFailure()) return;
  }
}

}  // namespace fourfold
