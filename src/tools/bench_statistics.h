// Medians and percentiles of timings.
#pragma once

#include <span>

namespace fourfold {

/// When enough has been timed: both are reached.
struct TimingLimits {
  double min_seconds = 0.3;
  int min_samples = 10;
};

/// A timing that takes longer than this many times TimingLimits::min_seconds stops at kLeastSamples.
inline constexpr double kMostOvertime = 10.0;
inline constexpr int kLeastSamples = 3;

/// Whether `samples` timings that took `seconds` in all are enough.
bool is_enough(const TimingLimits& limits, int samples, double seconds);

struct Spread {
  double median = 0.0, p10 = 0.0, p90 = 0.0;
  int samples = 0;
};

/// The value below which the fraction `quantile` of `sorted` lies, interpolated between neighbours
/// (numpy's default). Throws Error when `sorted` is empty.
double percentile(std::span<const double> sorted, double quantile);

Spread spread_of(std::span<const double> samples);

}  // namespace fourfold
