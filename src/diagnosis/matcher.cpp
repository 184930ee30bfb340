#include "diagnosis/matcher.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace fourfold::diagnosis {
namespace {

constexpr double kFar = 1e30;
/// Above, rounding decides which of two engines overflows: such elements don't count, nor does NaN.
constexpr double kOverflowing = 1e36;
/// Rounding alone that no engine's choice explains away: not worth a search.
constexpr double kExact = 1e-3;
/// Distances below are the same.
constexpr double kSame = 1e-4;
constexpr double kTokenWork = 3e8;  // multiplications of one replay, about
constexpr int64_t kMostTokens = 6;
constexpr size_t kSeeds = 10;     // single faults from which pairs are made, by each measure
constexpr size_t kFinalists = 6;  // hypotheses that are tried in every staging

struct FitSums {
  double candidate = 0.0, run = 0.0, product = 0.0, difference = 0.0;
};

/// Of one stage; both [tokens x width].
Fit fit_stage(const std::vector<float>& candidate, const std::vector<float>& run, int64_t tokens) {
  const size_t width = candidate.size() / static_cast<size_t>(tokens);
  double distance = 0.0, shape = 0.0;
  for (size_t token = 0; token < static_cast<size_t>(tokens); ++token) {
    FitSums sums;
    for (size_t i = token * width; i < (token + 1) * width; ++i) {
      const double c = candidate[i], r = run[i];
      if (!(std::abs(c) < kOverflowing)) continue;
      if (!std::isfinite(r)) return {kFar, kFar};
      sums.candidate += c * c;
      sums.run += r * r;
      sums.product += c * r;
      sums.difference += (c - r) * (c - r);
    }
    if (sums.difference == 0.0) continue;
    if (sums.candidate == 0.0) return {kFar, kFar};
    distance += sums.difference / sums.candidate;
    shape += sums.run == 0.0 ? 1.0
                             : std::max(0.0, 1.0 - sums.product * sums.product / (sums.candidate * sums.run));
  }
  const auto count = static_cast<double>(tokens);
  return {std::sqrt(distance / count), std::sqrt(shape / count)};
}

std::vector<float> rows_of(const std::vector<float>& all, const std::vector<int64_t>& tokens, int64_t width) {
  std::vector<float> rows;
  if (all.empty()) return rows;
  for (const int64_t token : tokens)
    rows.insert(rows.end(), all.begin() + token * width, all.begin() + (token + 1) * width);
  return rows;
}

double work_of_token(const Subject& subject) {
  return 3.0 * static_cast<double>(subject.top_k) * static_cast<double>(subject.hidden()) *
         static_cast<double>(subject.intermediate());
}

/// `count` of `from`, evenly spread.
std::vector<int64_t> spread(const std::vector<int64_t>& from, size_t count) {
  std::vector<int64_t> chosen;
  for (size_t i = 0; i < std::min(count, from.size()); ++i)
    chosen.push_back(from[i * from.size() / std::min(count, from.size())]);
  return chosen;
}

/// Something that was tried.
struct Trial {
  std::vector<size_t> faults;  // indices
  Staging staging;
  Fit fit;
};

/// Both ascending.
bool contains(const std::vector<size_t>& all, const std::vector<size_t>& part) {
  return std::includes(all.begin(), all.end(), part.begin(), part.end());
}

bool by_distance(const Trial& a, const Trial& b) {
  return a.fit.distance < b.fit.distance;
}

class Matcher {
 public:
  Matcher(const Subject& subject, const Candidate& candidate, const MatcherOptions& options)
      : subject_(subject),
        options_(options),
        faults_(known_faults(subject)),
        replay_(subject, choose_tokens(candidate)),
        candidate_(sample(candidate, subject, replay_.tokens())) {}

  Diagnosis run() {
    diagnosis_.tokens = replay_.tokens();
    find_sound();
    // A fault that leaves the candidate as near as rounding does is none to be found.
    if (diagnosis_.sound.distance > std::max(kExact, diagnosis_.sound.noise)) search();
    judge();
    diagnosis_.replays = replay_.runs();
    return std::move(diagnosis_);
  }

 private:
  double runs_left() const {
    const double work = work_of_token(subject_) * static_cast<double>(replay_.tokens().size());
    return options_.work / work - static_cast<double>(replay_.runs());
  }

  /// Half of them evenly spread, half those that are furthest off in a first look at more.
  std::vector<int64_t> choose_tokens(const Candidate& candidate) const {
    std::vector<int64_t> usable;
    for (int64_t token = 0; token < subject_.tokens; ++token) {
      const auto first = candidate.output.begin() + token * subject_.hidden();
      const auto routed = subject_.topk_ids.begin() + token * subject_.top_k;
      const bool has_expert =
          std::any_of(routed, routed + subject_.top_k, [](int32_t id) { return id >= 0; });
      if (has_expert &&
          std::any_of(first, first + subject_.hidden(), [](float v) { return std::isfinite(v); })) {
        usable.push_back(token);
      }
    }
    if (usable.empty()) usable.push_back(0);
    const auto affordable = static_cast<int64_t>(kTokenWork / work_of_token(subject_));
    const auto count = static_cast<size_t>(std::clamp<int64_t>(affordable, 2, kMostTokens));
    if (usable.size() <= count) return usable;
    Replay look(subject_, spread(usable, 4 * count));
    const Stages found = sample(candidate, subject_, look.tokens());
    const Stages due = look.run({}, options_.stagings.front());
    std::vector<std::pair<double, int64_t>> off;
    const auto width = static_cast<size_t>(subject_.hidden());
    for (size_t s = 0; s < look.tokens().size(); ++s) {
      const auto row = [&](const std::vector<float>& all) {
        return std::vector<float>(all.begin() + static_cast<std::ptrdiff_t>(s * width),
                                  all.begin() + static_cast<std::ptrdiff_t>((s + 1) * width));
      };
      off.emplace_back(-fit_stage(row(found.output), row(due.output), 1).distance, look.tokens()[s]);
    }
    std::sort(off.begin(), off.end());
    std::vector<int64_t> chosen;
    for (size_t i = 0; i < count / 2; ++i) chosen.push_back(off[i].second);
    for (const int64_t token : spread(usable, 2 * count)) {
      if (chosen.size() < count && std::find(chosen.begin(), chosen.end(), token) == chosen.end())
        chosen.push_back(token);
    }
    std::sort(chosen.begin(), chosen.end());
    return chosen;
  }

  Deviation deviation_of(const std::vector<size_t>& faults) const {
    Deviation deviation;
    for (const size_t fault : faults) faults_[fault].apply_to(deviation);
    return deviation;
  }

  Fit try_out(const std::vector<size_t>& faults, const Staging& staging) {
    const auto tokens = static_cast<int64_t>(replay_.tokens().size());
    return fit(candidate_, replay_.run(deviation_of(faults), staging), tokens);
  }

  /// A trial with its noise, and the distance to whichever rounding is closer.
  Explanation explain(const Trial& trial) {
    const auto tokens = static_cast<int64_t>(replay_.tokens().size());
    const Deviation deviation = deviation_of(trial.faults);
    const Stages specified = only_given(replay_.run(deviation, trial.staging));
    const Stages fused = replay_.run(deviation, trial.staging, Rounding::kFused);
    Explanation explanation;
    for (const size_t fault : trial.faults) explanation.faults.push_back(faults_[fault]);
    explanation.staging = trial.staging;
    explanation.distance = std::min(trial.fit.distance, fit(candidate_, fused, tokens).distance);
    explanation.noise = fit(specified, fused, tokens).distance;
    explanation.limit = kNoiseMargin * explanation.noise;
    return explanation;
  }

  void find_sound() {
    options_.progress("the layer without a fault");
    for (const Staging& staging : options_.stagings) sound_.push_back({{}, staging, try_out({}, staging)});
    std::sort(sound_.begin(), sound_.end(), by_distance);
    diagnosis_.sound = explain(sound_.front());
  }

  /// Stagings that singles are tried in: the one that fits best without a fault, and one of each kind.
  std::vector<Staging> coarse_stagings() const {
    std::vector<Staging> stagings = {sound_.front().staging};
    for (const ActivationFormat format : {ActivationFormat::kBf16, ActivationFormat::kNvfp4}) {
      const bool there =
          std::any_of(stagings.begin(), stagings.end(), [&](const Staging& s) { return s.format == format; });
      const auto other = std::find_if(options_.stagings.begin(), options_.stagings.end(),
                                      [&](const Staging& s) { return s.format == format; });
      if (!there && other != options_.stagings.end()) stagings.push_back(*other);
    }
    return stagings;
  }

  bool is_tried(const std::vector<size_t>& faults, const Staging& staging) const {
    return std::any_of(trials_.begin(), trials_.end(),
                       [&](const Trial& t) { return t.faults == faults && t.staging == staging; });
  }

  void add_trial(const std::vector<size_t>& faults, const Staging& staging) {
    const bool idle = std::any_of(faults.begin(), faults.end(), [&](size_t f) {
      return faults_[f].needs_nvfp4_staging && !is_nvfp4(staging.format);
    });
    if (!idle) trials_.push_back({faults, staging, try_out(faults, staging)});
  }

  void search() {
    try_singles();
    // A sound engine's rounding is not worth pairs; nor is what one fault leaves, where that is rounding.
    if (!options_.pairs || (is_fine() && !is_explained())) return;
    if (is_explained()) {
      if (explain(trials_.front()).distance <= explain(trials_.front()).noise) return;
      try_pairs({trials_.front()});
    } else {
      try_pairs(seeds());
      try_finalists();
    }
    if (trials_.front().faults.size() > 1) try_neighbours();
    prefer_one_fault();
  }

  void try_singles() {
    const std::vector<Staging> coarse = coarse_stagings();
    for (size_t fault = 0; fault < faults_.size(); ++fault) {
      options_.progress(fmt::format("fault {} of {}", fault + 1, faults_.size()));
      for (const Staging& staging : coarse) add_trial({fault}, staging);
    }
    diagnosis_.faults_tried = static_cast<int64_t>(faults_.size());
    try_finalists();
    if (is_explained() || is_fine()) return;
    if (has_codes()) try_other_values();
    try_finalists();
    if (is_explained()) return;
    for (size_t fault = 0; fault < faults_.size() && runs_left() > 0.0; ++fault) {
      for (const Staging& staging : options_.stagings) {
        if (!is_tried({fault}, staging)) add_trial({fault}, staging);
      }
    }
    std::sort(trials_.begin(), trials_.end(), by_distance);
  }

  bool has_codes() const { return std::any_of(faults_.begin(), faults_.end(), is_wrong_code); }

  bool is_fine() const { return diagnosis_.sound.distance <= diagnosis_.sound.limit; }

  bool is_explained() {
    if (trials_.empty()) return false;
    std::sort(trials_.begin(), trials_.end(), by_distance);
    return explains(explain(trials_.front()));
  }

  bool explains(const Explanation& explanation) const {
    return explanation.distance <= explanation.limit &&
           explanation.distance <= kClearlyBetter * diagnosis_.sound.distance;
  }

  /// The best in every staging.
  void try_finalists() {
    std::sort(trials_.begin(), trials_.end(), by_distance);
    std::vector<std::vector<size_t>> finalists;
    const auto add = [&](const Trial& trial) {
      if (std::find(finalists.begin(), finalists.end(), trial.faults) == finalists.end())
        finalists.push_back(trial.faults);
    };
    for (size_t i = 0; i < trials_.size() && finalists.size() < kFinalists; ++i) add(trials_[i]);
    std::vector<Trial> by_shape = trials_;
    std::sort(by_shape.begin(), by_shape.end(),
              [](const Trial& a, const Trial& b) { return a.fit.shape_distance < b.fit.shape_distance; });
    for (size_t i = 0; i < by_shape.size() && finalists.size() < 2 * kFinalists; ++i) add(by_shape[i]);
    for (const auto& faults : finalists) {
      for (const Staging& staging : options_.stagings) {
        if (!is_tried(faults, staging)) add_trial(faults, staging);
      }
    }
    std::sort(trials_.begin(), trials_.end(), by_distance);
  }

  /// Is an e2m1 code taken for another value than its neighbours'? Keeps those that come nearer than none.
  void try_other_values() {
    const Staging staging = sound_.front().staging;
    for (int code = 1; code <= 7; ++code) {
      for (const float value : wrong_values_of(code)) {
        faults_.push_back(wrong_code_fault(code, value));
        const Trial trial{{faults_.size() - 1}, staging, try_out({faults_.size() - 1}, staging)};
        const bool is_known = std::any_of(faults_.begin(), faults_.end() - 1,
                                          [&](const Fault& fault) { return fault.id == faults_.back().id; });
        if (!is_known && trial.fit.distance < sound_.front().fit.distance) {
          trials_.push_back(trial);
        } else {
          faults_.pop_back();
        }
      }
    }
  }

  /// Single faults that come closest, by either measure.
  std::vector<Trial> seeds() const {
    std::vector<Trial> sorted = trials_, seeds;
    const auto take = [&](size_t most) {
      for (size_t i = 0, taken = 0; i < sorted.size() && taken < most; ++i) {
        const bool there = std::any_of(seeds.begin(), seeds.end(),
                                       [&](const Trial& t) { return t.faults == sorted[i].faults; });
        if (there || sorted[i].faults.size() != 1) continue;
        seeds.push_back(sorted[i]);
        ++taken;
      }
    };
    take(kSeeds);
    std::sort(sorted.begin(), sorted.end(),
              [](const Trial& a, const Trial& b) { return a.fit.shape_distance < b.fit.shape_distance; });
    take(kSeeds);
    return seeds;
  }

  /// Each seed with every other fault, until one explains.
  void try_pairs(const std::vector<Trial>& seeds) {
    const size_t singles = faults_.size();
    for (const Trial& seed : seeds) {
      for (size_t second = 0; second < singles && runs_left() > 0.0; ++second)
        try_pair(seed.faults[0], second, seed.staging);
      if (is_explained()) break;
    }
    std::sort(trials_.begin(), trials_.end(), by_distance);
  }

  /// The best pair with either of its faults replaced: what does the same should be found, and told.
  void try_neighbours() {
    const Trial best = trials_.front();
    for (const size_t kept : best.faults) {
      for (size_t other = 0; other < faults_.size() && runs_left() > 0.0; ++other)
        try_pair(kept, other, best.staging);
    }
    std::sort(trials_.begin(), trials_.end(), by_distance);
  }

  void try_pair(size_t a, size_t b, const Staging& staging) {
    const std::vector<size_t> pair = {std::min(a, b), std::max(a, b)};
    if (!can_be_combined(faults_[a], faults_[b]) || is_tried(pair, staging)) return;
    add_trial(pair, staging);
    if (++diagnosis_.pairs_tried % 16 == 0)
      options_.progress(fmt::format("pairs of faults: {}", diagnosis_.pairs_tried));
  }

  /// One fault that explains goes before a pair that isn't clearly better.
  void prefer_one_fault() {
    const double enough = trials_.front().fit.distance / kClearlyBetter;
    for (auto trial = trials_.begin(); trial != trials_.end() && trial->fit.distance <= enough; ++trial) {
      if (trial->faults.size() != 1 || !explains(explain(*trial))) continue;
      std::rotate(trials_.begin(), trial, trial + 1);
      return;
    }
  }

  void judge() {
    diagnosis_.verdict = is_fine() ? Verdict::kFine : Verdict::kUnexplained;
    if (trials_.empty()) return;
    diagnosis_.best = explain(trials_.front());
    if (explains(*diagnosis_.best)) diagnosis_.verdict = Verdict::kExplained;
    find_alike();
  }

  /// Goes down the ranking: what does the same as the best one on these data, then the runner-up.
  void find_alike() {
    const Explanation& best = *diagnosis_.best;
    const Stages run_of_best =
        only_given(replay_.run(deviation_of(trials_.front().faults), trials_.front().staging));
    std::vector<std::vector<size_t>> seen = {trials_.front().faults};
    for (const Trial& trial : trials_) {
      if (std::find(seen.begin(), seen.end(), trial.faults) != seen.end()) continue;
      seen.push_back(trial.faults);
      if (contains(trial.faults, trials_.front().faults)) continue;  // and something that changes little
      bool is_same = trial.fit.distance <= 2.0 * trials_.front().fit.distance + kSame;
      if (!is_same && trial.fit.distance <= best.limit) {
        const Stages run = replay_.run(deviation_of(trial.faults), trial.staging);
        is_same = fit(run_of_best, run, static_cast<int64_t>(replay_.tokens().size())).distance <= best.noise;
      }
      if (!is_same) {
        diagnosis_.runner_up = explain(trial);
        return;
      }
      diagnosis_.alike.push_back(explain(trial));
    }
  }

  /// Without the stages that the candidate has not.
  Stages only_given(Stages stages) const {
    if (candidate_.h.empty()) stages.h.clear();
    if (candidate_.activation.empty()) stages.activation.clear();
    return stages;
  }

  const Subject& subject_;
  const MatcherOptions& options_;
  std::vector<Fault> faults_;
  Replay replay_;
  Stages candidate_;
  std::vector<Trial> sound_, trials_;
  Diagnosis diagnosis_;
};

}  // namespace

Stages sample(const Candidate& candidate, const Subject& subject, const std::vector<int64_t>& tokens) {
  const auto width_of = [&](const std::vector<float>& all) {
    return static_cast<int64_t>(all.size()) / subject.tokens;
  };
  return {rows_of(candidate.h, tokens, width_of(candidate.h)),
          rows_of(candidate.activation, tokens, width_of(candidate.activation)),
          rows_of(candidate.output, tokens, width_of(candidate.output))};
}

Fit fit(const Stages& candidate, const Stages& run, int64_t tokens) {
  Fit worst;
  const auto take = [&](const std::vector<float>& found, const std::vector<float>& due) {
    if (found.empty() || due.empty()) return;
    const Fit stage = fit_stage(found, due, tokens);
    worst.distance = std::max(worst.distance, stage.distance);
    worst.shape_distance = std::max(worst.shape_distance, stage.shape_distance);
  };
  take(candidate.h, run.h);
  take(candidate.activation, run.activation);
  take(candidate.output, run.output);
  return worst;
}

std::string Explanation::id() const {
  if (faults.empty()) return "none";
  if (faults.size() == 1) return faults[0].id;
  return fmt::format("{} + {}", std::min(faults[0].id, faults[1].id), std::max(faults[0].id, faults[1].id));
}

std::string Explanation::sentence() const {
  if (faults.empty()) return "no fault";
  return faults.size() == 1 ? faults[0].sentence
                            : fmt::format("{}; and {}", faults[0].sentence, faults[1].sentence);
}

std::vector<Staging> plausible_stagings(const Subject& subject) {
  std::vector<Staging> stagings;
  const auto usable = [](const std::vector<float>& scales) {
    return std::all_of(scales.begin(), scales.end(),
                       [](float scale) { return is_usable_input_scale(scale); });
  };
  const bool has_scales =
      usable(x_input_scales(*subject.weights)) && usable(intermediate_input_scales(*subject.weights));
  const bool fits = subject.hidden() % 16 == 0 && subject.intermediate() % 16 == 0;
  if (has_scales && fits) stagings.push_back({ActivationFormat::kNvfp4, ScalePolicy::kStatic});
  stagings.push_back({});
  if (has_scales && fits) stagings.push_back({ActivationFormat::kNvfp4, ScalePolicy::kMaxOverExperts});
  if (fits) stagings.push_back({ActivationFormat::kNvfp4, ScalePolicy::kDynamicToken});
  stagings.push_back({ActivationFormat::kFp8, ScalePolicy::kDynamicToken});
  return stagings;
}

std::string describe(const Staging& staging) {
  if (!is_nvfp4(staging.format)) return std::string(to_string(staging.format));
  return fmt::format("{}, {}", to_string(staging.format), to_string(staging.policy));
}

Diagnosis diagnose(const Subject& subject, const Candidate& candidate, const MatcherOptions& options) {
  return Matcher(subject, candidate, options).run();
}

namespace {

/// Median over tokens of routing_distance.
double median_distance(const Subject& subject, const RoutedSlots& engine, const RoutedSlots& due) {
  const auto top_k = static_cast<std::ptrdiff_t>(subject.top_k);
  std::vector<double> distances;
  for (std::ptrdiff_t token = 0; token < subject.tokens; ++token) {
    const auto one = [&](const RoutedSlots& slots) {
      const auto ids = slots.ids.begin() + token * top_k;
      const auto weights = slots.weights.begin() + token * top_k;
      return RoutedSlots{{ids, ids + top_k}, {weights, weights + top_k}};
    };
    distances.push_back(routing_distance(one(due), one(engine), 1, subject.experts()));
  }
  std::nth_element(distances.begin(), distances.begin() + subject.tokens / 2, distances.end());
  return distances[static_cast<size_t>(subject.tokens / 2)];
}

/// Routers in bf16, and other orders of sums, move weights by this much.
constexpr double kRoutingNoise = 2e-2;

}  // namespace

RoutingDiagnosis diagnose_routing(const Subject& subject) {
  Subject routed_here = subject;
  routed_here.routing_given = false;
  const RoutedSlots engine{{subject.topk_ids.begin(), subject.topk_ids.end()},
                           {subject.topk_weights.begin(), subject.topk_weights.end()}};
  RoutingChange unchanged;
  unchanged.renormalise = subject.router->config.renormalise;  // makes route_with ask the router
  RoutingDiagnosis diagnosis;
  const RoutedSlots due = route_with(routed_here, unchanged);
  diagnosis.distance = median_distance(subject, engine, due);
  for (int64_t token = 0; token < subject.tokens; ++token) {
    const auto first = static_cast<std::ptrdiff_t>(token * subject.top_k);
    const auto ids = engine.ids.begin() + first;
    diagnosis.tokens_with_other_ids +=
        !std::is_permutation(ids, ids + subject.top_k, due.ids.begin() + first);
  }
  if (diagnosis.distance <= kRoutingNoise) return diagnosis;
  std::vector<std::pair<double, Fault>> ranked;
  for (const Fault& fault : known_faults(routed_here)) {
    Deviation deviation;
    fault.apply_to(deviation);
    RoutingChange change = deviation.first.routing;
    if (change == RoutingChange{}) continue;
    if (!change.needs_router()) change.renormalise = subject.router->config.renormalise;
    ranked.emplace_back(median_distance(subject, engine, route_with(routed_here, change)), fault);
  }
  std::sort(ranked.begin(), ranked.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  diagnosis.best = ranked[0].second;
  diagnosis.best_distance = ranked[0].first;
  diagnosis.runner_up = ranked[1].second;
  diagnosis.runner_up_distance = ranked[1].first;
  const bool explains =
      ranked[0].first <= kRoutingNoise && ranked[0].first <= kClearlyBetter * diagnosis.distance;
  diagnosis.verdict = explains ? Verdict::kExplained : Verdict::kUnexplained;
  return diagnosis;
}

}  // namespace fourfold::diagnosis
