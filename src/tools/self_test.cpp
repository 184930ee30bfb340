#include "tools/self_test.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <iterator>
#include <memory>
#include <numeric>

#include "diagnosis/matcher.h"
#include "diagnosis/replay.h"
#include "tools/diagnosis_subject.h"
#include "tools/partial_directory.h"
#include "tools/planted_engine.h"
#include "tools/random.h"
#include "tools/synthesize.h"

namespace fourfold {
namespace {

using diagnosis::Candidate;
using diagnosis::Diagnosis;
using diagnosis::Fault;
using diagnosis::Staging;
using diagnosis::Subject;
using diagnosis::Verdict;

/// A fault whose effect is less than this many times what rounding does is no fault to be found.
constexpr double kEffectOverNoise = 3.0;
constexpr int64_t kTrialsOfDoubtful = 20;
constexpr int64_t kManyTrials = 200;  // with as many on sound engines, every fault is planted in every layer
constexpr uint64_t kStream = 77;      // of random numbers: no other user of the seed draws from it

struct Recipe {
  const char* family;
  int64_t experts, hidden, intermediate, top_k, tokens;
  OriginalFormat original;
  WeightProfile profile;
  float loudness;  // factor on x, so that clamps bite
  bool weight_on_input = false;
};

// Shapes with and without padding of K and N, even and odd numbers of experts; families with clamps, biases,
// shared experts, correction biases, groups, hash routing, weights on the input, and without gates.
constexpr Recipe kRecipes[] = {
    {"qwen3-moe", 8, 128, 96, 3, 24, OriginalFormat::kBf16, WeightProfile::kGaussian, 1.0f},
    {"deepseek-v4", 6, 192, 96, 3, 20, OriginalFormat::kMxfp4, WeightProfile::kRealistic, 8.0f},
    {"gpt-oss", 8, 160, 96, 2, 24, OriginalFormat::kMxfp4, WeightProfile::kGaussian, 8.0f},
    {"deepseek-v3", 16, 128, 64, 4, 20, OriginalFormat::kBf16, WeightProfile::kRealistic, 1.0f},
    {"mixtral", 8, 192, 160, 2, 24, OriginalFormat::kBf16, WeightProfile::kGaussian, 2.0f, true},
    {"qwen2-moe", 5, 96, 192, 2, 17, OriginalFormat::kBf16, WeightProfile::kRealistic, 1.0f},
};

/// A synthetic layer in a folder of its own.
struct DataSet {
  std::string name;
  std::unique_ptr<LoadedSubject> loaded;
};

std::unique_ptr<LoadedSubject> make_subject(const PartialDirectory& folder, const Recipe& recipe,
                                            uint64_t seed) {
  SynthesizeRequest request;
  request.directory = folder / recipe.family;
  request.experts = recipe.experts;
  request.hidden = recipe.hidden;
  request.intermediate = recipe.intermediate;
  request.top_k = recipe.top_k;
  request.layers = 2;
  request.family = recipe.family;
  request.whole_family = true;
  request.original = recipe.original;
  request.profile = recipe.profile;
  request.seed = seed;
  synthesize(request);
  LayerInputs inputs =
      make_inputs(recipe.tokens, recipe.hidden, seed + 17, recipe.profile == WeightProfile::kRealistic);
  for (Bf16& value : inputs.x) value = encode_bf16(static_cast<float>(value) * recipe.loudness);
  SubjectSource source;
  source.checkpoint = (request.directory / "nvfp4").string();
  source.layer = 1;
  source.seed = seed;
  source.overrides.weight_on_input = recipe.weight_on_input;
  return std::make_unique<LoadedSubject>(source, std::move(inputs));
}

/// What one trial found.
struct Outcome {
  std::string planted;
  bool left_out = false, is_sound = false, is_pair = false;
  std::string first, second;
  std::vector<std::string> alike;
  Verdict verdict = Verdict::kFine;
};

struct TrialPlan {
  const Subject* subject = nullptr;
  std::vector<Fault> faults;
  EngineStyle style;
  bool staging_known = true;
};

EngineStyle style_of(Random& random, const std::vector<Staging>& stagings) {
  EngineStyle style;
  style.staging = stagings[static_cast<size_t>(random.below(static_cast<int64_t>(stagings.size())))];
  style.fused = random.below(2) == 0;
  style.bf16_sums = random.below(2) == 0;
  style.reciprocal_multiply = random.below(2) == 0;
  style.keeps_stages = random.below(4) == 0;
  return style;
}

double distance(const Candidate& a, const Candidate& b, const Subject& subject) {
  return diagnosis::fit({a.h, a.activation, a.output}, {b.h, b.activation, b.output}, subject.tokens)
      .distance;
}

/// How far two runs of the replay with these faults are apart that round at other points: the planted
/// engine's styles alone may miss ties that other engines break.
double replayed_noise(const TrialPlan& plan, const Candidate& candidate) {
  std::vector<int64_t> tokens(static_cast<size_t>(plan.subject->tokens));
  std::iota(tokens.begin(), tokens.end(), 0);
  diagnosis::Replay replay(*plan.subject, tokens);
  diagnosis::Deviation deviation;
  for (const Fault& fault : plan.faults) fault.apply_to(deviation);
  diagnosis::Stages run = replay.run(deviation, plan.style.staging);
  if (candidate.h.empty()) run.h.clear();
  if (candidate.activation.empty()) run.activation.clear();
  return diagnosis::fit(run, replay.run(deviation, plan.style.staging, diagnosis::Rounding::kFused),
                        plan.subject->tokens)
      .distance;
}

/// Whether the faults change more than rounding does; of a pair, each beside the other.
bool has_effect(const TrialPlan& plan, const Candidate& candidate) {
  EngineStyle other = plan.style;
  other.fused = !other.fused;
  other.bf16_sums = !other.bf16_sums;
  other.reciprocal_multiply = !other.reciprocal_multiply;
  const double noise =
      std::max(replayed_noise(plan, candidate),
               distance(candidate, run_planted_engine(*plan.subject, other, plan.faults), *plan.subject));
  for (size_t i = 0; i < plan.faults.size(); ++i) {
    std::vector<Fault> others = plan.faults;
    others.erase(others.begin() + static_cast<std::ptrdiff_t>(i));
    const Candidate without = run_planted_engine(*plan.subject, plan.style, others);
    if (!(distance(candidate, without, *plan.subject) > kEffectOverNoise * noise)) return false;
  }
  return true;
}

std::string id_of(std::vector<Fault> faults) {
  diagnosis::Explanation explanation;
  explanation.faults = std::move(faults);
  return explanation.id();
}

Outcome run_trial(const TrialPlan& plan) {
  Outcome outcome;
  outcome.planted = id_of(plan.faults);
  outcome.is_sound = plan.faults.empty();
  outcome.is_pair = plan.faults.size() == 2;
  const Candidate candidate = run_planted_engine(*plan.subject, plan.style, plan.faults);
  if (!outcome.is_sound && !has_effect(plan, candidate)) {
    outcome.left_out = true;
    return outcome;
  }
  diagnosis::MatcherOptions options;
  options.stagings = {plan.style.staging};
  if (!plan.staging_known) options.stagings = plausible_stagings(*plan.subject);
  const Diagnosis found = diagnose(*plan.subject, candidate, options);
  outcome.verdict = found.verdict;
  if (found.verdict == Verdict::kExplained) outcome.first = found.best->id();
  if (found.runner_up) outcome.second = found.runner_up->id();
  for (const auto& same : found.alike) outcome.alike.push_back(same.id());
  return outcome;
}

/// Calls `work` for 0 to count - 1 on all threads; throws what one of them threw.
template <class Work>
void in_parallel(size_t count, const Work& work) {
  std::exception_ptr error;
#pragma omp parallel for schedule(dynamic)
  for (size_t i = 0; i < count; ++i) {
    try {
      work(i);
    } catch (...) {
#pragma omp critical
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

class SelfTestRun {
 public:
  explicit SelfTestRun(const SelfTestRequest& request)
      : request_(request),
        folder_(std::filesystem::temp_directory_path()),
        random_(request.seed, Random::Purpose::kOperand, kStream) {}

  SelfTestReport run() {
    const auto start = std::chrono::steady_clock::now();
    request_.progress("making layers");
    make_data();
    plan_trials();
    run_trials();
    plan_again();
    run_trials();
    report_.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return std::move(report_);
  }

 private:
  void make_data() {
    if (request_.subject) {
      subjects_.push_back(request_.subject);
      report_.data.push_back(request_.subject_name);
      return;
    }
    loaded_.resize(std::size(kRecipes));
    in_parallel(loaded_.size(),
                [&](size_t i) { loaded_[i] = make_subject(folder_, kRecipes[i], request_.seed); });
    for (size_t i = 0; i < loaded_.size(); ++i) {
      const Recipe& recipe = kRecipes[i];
      subjects_.push_back(&loaded_[i]->subject());
      report_.data.push_back(fmt::format(
          "{}: {} experts, hidden {}, intermediate {}, top-{}, {} tokens, {} weights, x * {}", recipe.family,
          recipe.experts, recipe.hidden, recipe.intermediate, recipe.top_k, recipe.tokens,
          recipe.profile == WeightProfile::kGaussian ? "Gaussian" : "heavy-tailed", recipe.loudness));
    }
  }

  void plan_trials() {
    Random& random = random_;
    // Few trials: of the pairs of a fault and a layer, so many of six.
    const size_t kept = 6 * static_cast<size_t>(std::min(kManyTrials, request_.sound_trials)) / kManyTrials;
    for (size_t s = 0; s < subjects_.size(); ++s) {
      const std::vector<Fault> faults = diagnosis::known_faults(*subjects_[s]);
      for (size_t f = 0; f < faults.size(); ++f) {
        if ((s + f) % 6 < std::max<size_t>(1, kept)) plans_.push_back(plan_single(subjects_[s], faults[f]));
      }
    }
    for (int64_t i = 0; i < request_.sound_trials; ++i) {
      const Subject* subject = subjects_[static_cast<size_t>(i) % subjects_.size()];
      plans_.push_back(
          {subject, {}, style_of(random, diagnosis::plausible_stagings(*subject)), random.below(2) == 0});
    }
    // The longest first, so that no thread is left with one while the others have none.
    std::vector<TrialPlan> pairs;
    for (int64_t i = 0; i < pair_trials(); ++i) pairs.push_back(plan_pair(i));
    plans_.insert(plans_.begin(), pairs.begin(), pairs.end());
  }

  int64_t pair_trials() const { return (request_.sound_trials + 3) / 4; }

  TrialPlan plan_single(const Subject* subject, const Fault& fault) {
    const std::vector<Staging> stagings = diagnosis::plausible_stagings(*subject);
    TrialPlan plan{subject, {fault}, style_of(random_, stagings), random_.below(3) != 0};
    if (fault.needs_nvfp4_staging && !is_nvfp4(plan.style.staging.format))
      plan.style.staging = stagings.front();
    return plan;
  }

  /// One miss in a handful of trials tells little: of a fault with one, more trials until there are
  /// kTrialsOfDoubtful.
  void plan_again() {
    plans_.clear();
    for (const auto& [id, tally] : report_.faults) {
      if (tally.is_named()) continue;
      std::vector<std::pair<const Subject*, Fault>> places;
      for (const Subject* subject : subjects_) {
        for (const Fault& fault : diagnosis::known_faults(*subject)) {
          if (fault.id == id) places.emplace_back(subject, fault);
        }
      }
      for (int64_t i = tally.trials; i < kTrialsOfDoubtful; ++i) {
        const auto& [subject, fault] = places[static_cast<size_t>(i) % places.size()];
        plans_.push_back(plan_single(subject, fault));
      }
    }
  }

  TrialPlan plan_pair(int64_t number) {
    Random& random = random_;
    const Subject* subject = subjects_[static_cast<size_t>(number) % subjects_.size()];
    const std::vector<Fault> faults = diagnosis::known_faults(*subject);
    TrialPlan plan{subject, {}, style_of(random, diagnosis::plausible_stagings(*subject)), true};
    const auto draw = [&] {
      return faults[static_cast<size_t>(random.below(static_cast<int64_t>(faults.size())))];
    };
    while (true) {
      const Fault a = draw(), b = draw();
      const bool staged = !a.needs_nvfp4_staging && !b.needs_nvfp4_staging;
      if (!can_be_combined(a, b) || !(staged || is_nvfp4(plan.style.staging.format))) continue;
      plan.faults = {a, b};
      return plan;
    }
  }

  void run_trials() {
    std::vector<Outcome> outcomes(plans_.size());
    int64_t done = 0;
    in_parallel(plans_.size(), [&](size_t i) {
      outcomes[i] = run_trial(plans_[i]);
#pragma omp critical
      request_.progress(fmt::format("trial {} of {}", ++done, plans_.size()));
    });
    for (const Outcome& outcome : outcomes) tally(outcome);
  }

  void tally(const Outcome& outcome) {
    if (outcome.is_sound) {
      ++report_.sound_trials;
      report_.sound_claimed += outcome.verdict == Verdict::kExplained;
      report_.sound_unexplained += outcome.verdict == Verdict::kUnexplained;
      if (!outcome.first.empty()) report_.claimed.push_back(outcome.first);
    } else if (outcome.is_pair) {
      tally_pair(outcome);
    } else {
      tally_single(outcome);
    }
  }

  void tally_single(const Outcome& outcome) {
    FaultTally& tally = report_.faults[outcome.planted];
    if (outcome.left_out) {
      ++tally.left_out;
      return;
    }
    ++tally.trials;
    const std::string first = outcome.first.empty() ? "none" : outcome.first;
    if (first == outcome.planted) {
      ++tally.named;
    } else if (std::find(outcome.alike.begin(), outcome.alike.end(), outcome.planted) !=
               outcome.alike.end()) {
      ++tally.in_class;
      ++report_.alike[{outcome.planted, first}];
    } else {
      ++report_.confusion[{outcome.planted, first}];
    }
  }

  void tally_pair(const Outcome& outcome) {
    if (outcome.left_out) {
      ++report_.pairs_left_out;
      return;
    }
    ++report_.pair_trials;
    const bool first = outcome.first == outcome.planted;
    const bool same =
        std::find(outcome.alike.begin(), outcome.alike.end(), outcome.planted) != outcome.alike.end();
    report_.pairs_first += first || same;
    report_.pairs_top_two += first || same || outcome.second == outcome.planted;
    if (!first && !same) {
      ++report_.confusion[{outcome.planted, outcome.first.empty() ? "none" : outcome.first}];
    }
  }

  const SelfTestRequest& request_;
  PartialDirectory folder_;
  std::vector<std::unique_ptr<LoadedSubject>> loaded_;
  std::vector<const Subject*> subjects_;
  Random random_;
  std::vector<TrialPlan> plans_;
  SelfTestReport report_;
};

}  // namespace

int64_t SelfTestReport::trials() const {
  int64_t sum = 0;
  for (const auto& [id, tally] : faults) sum += tally.trials;
  return sum;
}

int64_t SelfTestReport::named() const {
  int64_t sum = 0;
  for (const auto& [id, tally] : faults) sum += tally.named;
  return sum;
}

int64_t SelfTestReport::in_class() const {
  int64_t sum = 0;
  for (const auto& [id, tally] : faults) sum += tally.in_class;
  return sum;
}

int64_t SelfTestReport::left_out() const {
  int64_t sum = 0;
  for (const auto& [id, tally] : faults) sum += tally.left_out;
  return sum;
}

bool FaultTally::is_named() const {
  return 100 * (named + in_class) >= 95 * trials;
}

bool SelfTestReport::passes() const {
  const bool all_named =
      std::all_of(faults.begin(), faults.end(), [](const auto& fault) { return fault.second.is_named(); });
  return all_named && sound_claimed == 0 && sound_unexplained == 0 && 2 * pairs_top_two >= pair_trials;
}

SelfTestReport run_self_test(const SelfTestRequest& request) {
  return SelfTestRun(request).run();
}

}  // namespace fourfold
