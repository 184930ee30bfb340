#include "diagnosis/error_map.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace fourfold::diagnosis {
namespace {

constexpr size_t kShown = 12;
/// The median error of a period's worst phase against the mean of all, above what chance does to flat errors;
/// of two phases, at most 2.
constexpr double kStandsOut = 3.0, kHalfOfColumns = 1.6;
/// Twice the period has half the columns: where all errors lie in one phase, its error doubles.
constexpr double kClearlyMore = 1.3;

/// Squared errors of columns, each token's error counted alike.
std::vector<double> column_errors(const std::vector<float>& found, const std::vector<float>& due,
                                  size_t hidden) {
  std::vector<double> errors(hidden);
  for (size_t first = 0; first < found.size(); first += hidden) {
    std::vector<double> row(hidden);
    for (size_t c = 0; c < hidden; ++c) {
      const double difference = double{found[first + c]} - due[first + c];
      if (std::isfinite(difference)) row[c] = difference * difference;
    }
    const double sum = std::accumulate(row.begin(), row.end(), 0.0);
    for (size_t c = 0; c < hidden && sum > 0.0; ++c) errors[c] += row[c] / sum;
  }
  return errors;
}

/// The shortest run of columns that holds nine tenths of the error, where that is half of them or fewer.
void find_range(const std::vector<double>& errors, double total, ErrorMap& map) {
  size_t first = 0, best_first = 0, best_length = errors.size() + 1;
  double sum = 0.0;
  for (size_t last = 0; last < errors.size(); ++last) {
    sum += errors[last];
    while (sum - errors[first] >= 0.9 * total && first < last) sum -= errors[first++];
    if (sum >= 0.9 * total && last - first + 1 < best_length) {
      best_length = last - first + 1;
      best_first = first;
    }
  }
  if (best_length > errors.size() / 2) return;
  map.first_bad_column = static_cast<int64_t>(best_first);
  map.last_bad_column = static_cast<int64_t>(best_first + best_length - 1);
}

/// The lower one of two.
double median_of(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>((values.size() - 1) / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

/// The shortest period whose worst phase is bad in most of its columns: a single bad column makes none.
int64_t find_period(const std::vector<double>& errors, double total) {
  const double mean = total / static_cast<double>(errors.size());
  double best = 0.0;
  int64_t found = 0;
  for (size_t period = 2; 8 * period <= errors.size(); period *= 2) {
    double worst = 0.0;
    for (size_t phase = 0; phase < period; ++phase) {
      std::vector<double> of_phase;
      for (size_t c = phase; c < errors.size(); c += period) of_phase.push_back(errors[c]);
      worst = std::max(worst, median_of(std::move(of_phase)) / mean);
    }
    const bool stands_out = worst > (period == 2 ? kHalfOfColumns : kStandsOut);
    if (!stands_out || worst < kClearlyMore * best) continue;
    best = worst;
    found = static_cast<int64_t>(period);
  }
  return found;
}

/// The aligned blocks that hold 95% of the error, where they are at most half of all: of the size that leaves
/// the fewest columns, the larger of two alike.
void find_blocks(const std::vector<double>& errors, double total, ErrorMap& map) {
  size_t fewest = errors.size() / 2 + 1;
  for (const size_t size : {128u, 64u, 32u, 16u}) {
    if (errors.size() < 4 * size) continue;
    const size_t count = (errors.size() + size - 1) / size;
    std::vector<std::pair<double, int64_t>> blocks;
    for (size_t b = 0; b < count; ++b) {
      const auto first = errors.begin() + static_cast<std::ptrdiff_t>(b * size);
      const auto last = errors.begin() + static_cast<std::ptrdiff_t>(std::min(errors.size(), (b + 1) * size));
      blocks.emplace_back(std::accumulate(first, last, 0.0), b);
    }
    std::sort(blocks.rbegin(), blocks.rend());
    std::vector<int64_t> bad;
    for (double held = 0.0; held < 0.95 * total && bad.size() < blocks.size();) {
      held += blocks[bad.size()].first;
      bad.push_back(blocks[bad.size()].second);
    }
    if (bad.size() * size >= fewest) continue;
    fewest = bad.size() * size;
    map.block = static_cast<int64_t>(size);
    std::sort(bad.begin(), bad.end());
    map.bad_blocks = bad;
  }
}

std::string list(const std::vector<int64_t>& numbers) {
  const std::vector<int64_t> shown(
      numbers.begin(), numbers.begin() + static_cast<std::ptrdiff_t>(std::min(kShown, numbers.size())));
  return fmt::format("{}{}", fmt::join(shown, ", "), numbers.size() > kShown ? ", ..." : "");
}

void find_rows(const Subject& subject, const std::vector<int64_t>& tokens, const std::vector<float>& found,
               const std::vector<float>& due, double limit, ErrorMap& map) {
  const auto hidden = static_cast<size_t>(subject.hidden());
  std::vector<int64_t> good(static_cast<size_t>(subject.experts())), bad(good.size());
  for (size_t s = 0; s < tokens.size(); ++s) {
    double difference = 0.0, norm = 0.0;
    bool is_finite = true;
    for (size_t i = s * hidden; i < (s + 1) * hidden; ++i) {
      map.not_finite += !std::isfinite(found[i]);
      is_finite = is_finite && std::isfinite(found[i]);
      difference += (double{found[i]} - due[i]) * (double{found[i]} - due[i]);
      norm += double{found[i]} * found[i];
    }
    if (!is_finite) map.not_finite_tokens.push_back(tokens[s]);
    const bool is_bad = !(difference <= limit * limit * norm);
    if (is_bad) map.bad_tokens.push_back(tokens[s]);
    for (int64_t k = 0; k < subject.top_k; ++k) {
      const int32_t id = subject.topk_ids[static_cast<size_t>(tokens[s] * subject.top_k + k)];
      if (id >= 0) ++(is_bad ? bad : good)[static_cast<size_t>(id)];
    }
  }
  if (map.bad_tokens.size() == tokens.size()) return;
  for (size_t e = 0; e < good.size(); ++e) {
    if (bad[e] > 0 && good[e] == 0) map.bad_experts.push_back(static_cast<int64_t>(e));
  }
}

}  // namespace

ErrorMap map_errors(const Subject& subject, const std::vector<int64_t>& tokens,
                    const std::vector<float>& found, const std::vector<float>& due, double limit) {
  ErrorMap map;
  map.elements = static_cast<int64_t>(found.size());
  find_rows(subject, tokens, found, due, limit, map);
  const std::vector<double> errors = column_errors(found, due, static_cast<size_t>(subject.hidden()));
  const double total = std::accumulate(errors.begin(), errors.end(), 0.0);
  if (total == 0.0) return map;
  std::vector<double> sorted = errors;
  std::sort(sorted.rbegin(), sorted.rend());
  const auto tenth = static_cast<std::ptrdiff_t>((sorted.size() + 9) / 10);
  map.share_of_worst_columns = std::accumulate(sorted.begin(), sorted.begin() + tenth, 0.0) / total;
  find_range(errors, total, map);
  map.period = find_period(errors, total);
  find_blocks(errors, total, map);
  return map;
}

std::vector<std::string> describe(const ErrorMap& map, int64_t tokens) {
  std::vector<std::string> lines;
  if (map.not_finite > 0) {
    lines.push_back(fmt::format("{} of {} elements are NaN or infinite, in tokens {}", map.not_finite,
                                map.elements, list(map.not_finite_tokens)));
  }
  lines.push_back(fmt::format("{} of {} tokens are off{}", map.bad_tokens.size(), tokens,
                              map.bad_tokens.empty() ? "" : fmt::format(": {}", list(map.bad_tokens))));
  if (!map.bad_experts.empty()) {
    lines.push_back(
        fmt::format("every token that goes to expert {} is off, others are not", list(map.bad_experts)));
  }
  lines.push_back(fmt::format("the worst tenth of the columns holds {:.0f}% of the squared error",
                              100.0 * map.share_of_worst_columns));
  if (map.first_bad_column >= 0)
    lines.push_back(
        fmt::format("nine tenths of it lie in columns {} to {}", map.first_bad_column, map.last_bad_column));
  if (map.block > 0)
    lines.push_back(fmt::format("19 twentieths of it lie in {} of the blocks of {} columns: {}",
                                map.bad_blocks.size(), map.block, list(map.bad_blocks)));
  if (map.period > 0)
    lines.push_back(fmt::format("it repeats along columns with a period of {}", map.period));
  return lines;
}

}  // namespace fourfold::diagnosis
