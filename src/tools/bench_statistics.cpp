#include "tools/bench_statistics.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/fail.h"

namespace fourfold {

bool is_enough(const TimingLimits& limits, int samples, double seconds) {
  if (samples >= kLeastSamples && seconds >= kMostOvertime * limits.min_seconds) return true;
  return samples >= limits.min_samples && seconds >= limits.min_seconds;
}

double percentile(std::span<const double> sorted, double quantile) {
  if (sorted.empty()) reject("percentile", "at least one sample", "none");
  const double position = quantile * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(position);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return std::lerp(sorted[below], sorted[above], position - static_cast<double>(below));
}

Spread spread_of(std::span<const double> samples) {
  std::vector<double> sorted(samples.begin(), samples.end());
  std::sort(sorted.begin(), sorted.end());
  return {percentile(sorted, 0.5), percentile(sorted, 0.1), percentile(sorted, 0.9),
          static_cast<int>(sorted.size())};
}

}  // namespace fourfold
