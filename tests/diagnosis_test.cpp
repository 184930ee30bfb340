// The matcher and its parts (src/diagnosis): hand-worked cases, and what holds for every known fault.
#include <gtest/gtest.h>

#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <numeric>
#include <set>

#include "diagnosis/error_map.h"
#include "diagnosis/matcher.h"
#include "diagnosis/weight_reader.h"
#include "tools/diagnosis_subject.h"
#include "tools/planted_engine.h"
#include "tools/self_test.h"
#include "tools/synthesize.h"

namespace fourfold::diagnosis {
namespace {

/// A made-up layer in a folder of its own.
class Layer {
 public:
  explicit Layer(const std::string& family = "qwen3-moe")
      : directory_(std::filesystem::path(testing::TempDir()) /
                   ("fourfold-diagnosis-" + family + "-" + std::to_string(getpid()))) {
    SynthesizeRequest request;
    request.directory = directory_;
    request.experts = 4;
    request.hidden = 64;
    request.intermediate = 96;
    request.top_k = 2;
    request.layers = 2;
    request.family = family;
    request.whole_family = true;
    request.original = OriginalFormat::kBf16;
    request.force = true;
    synthesize(request);
    SubjectSource source;
    source.checkpoint = (directory_ / "nvfp4").string();
    source.layer = 1;
    loaded_.emplace(source, make_inputs(12, 64, 3, false));
  }
  ~Layer() { std::filesystem::remove_all(directory_); }

  const Subject& subject() const { return loaded_->subject(); }

 private:
  std::filesystem::path directory_;
  std::optional<LoadedSubject> loaded_;
};

const Layer& layer() {
  static const Layer one;
  return one;
}

Fault fault_named(const Subject& subject, const std::string& id) {
  for (const Fault& fault : known_faults(subject)) {
    if (fault.id == id) return fault;
  }
  ADD_FAILURE() << "no fault " << id;
  return {};
}

// ---- fit ----

TEST(Fit, IsTheRelativeDistanceOfATokenAndItsShape) {
  Stages candidate, run;
  candidate.output = {3.0f, 4.0f};
  run.output = {6.0f, 8.0f};
  const Fit doubled = fit(candidate, run, 1);
  EXPECT_DOUBLE_EQ(doubled.distance, 1.0);  // |(3, 4)| / |(3, 4)|
  EXPECT_NEAR(doubled.shape_distance, 0.0, 1e-12);
  run.output = {4.0f, -3.0f};
  EXPECT_NEAR(fit(candidate, run, 1).distance, std::sqrt(2.0), 1e-12);
  EXPECT_NEAR(fit(candidate, run, 1).shape_distance, 1.0, 1e-12);
}

TEST(Fit, IsThatOfTheWorstStageThatBothHave) {
  Stages candidate, run;
  candidate.output = {1.0f, 0.0f};
  run.output = {1.0f, 0.0f};
  run.h = {5.0f, 5.0f};
  EXPECT_EQ(fit(candidate, run, 1).distance, 0.0);
  candidate.h = {5.0f, 0.0f};
  EXPECT_DOUBLE_EQ(fit(candidate, run, 1).distance, 1.0);
}

TEST(Fit, LeavesOutWhatTheCandidateHasNotAndShunsInfinity) {
  Stages candidate, run;
  candidate.output = {1.0f, NAN, 2.0f, INFINITY};
  run.output = {1.0f, 7.0f, 2.0f, NAN};
  EXPECT_EQ(fit(candidate, run, 1).distance, 0.0);
  run.output = {1.0f, 7.0f, NAN, 0.0f};
  EXPECT_GT(fit(candidate, run, 1).distance, 1e20);
}

// ---- routing ----

TEST(RoutingDistance, DoesNotMindTheOrderOfExperts) {
  const RoutedSlots a{{0, 2}, {0.6f, 0.8f}}, b{{2, 0}, {0.8f, 0.6f}}, c{{2, 1}, {0.8f, 0.6f}};
  EXPECT_EQ(routing_distance(a, b, 1, 3), 0.0);
  EXPECT_NEAR(routing_distance(a, c, 1, 3), std::sqrt(2 * 0.36), 1e-6);  // of a vector of length 1
}

// ---- reading weights ----

TEST(WeightReader, ReadsTransposedScalesAsTheyLieInMemory) {
  const Subject& subject = layer().subject();
  FirstDeviation deviation;
  deviation.reading.scale_order = ScaleOrder::kTransposed;
  const WeightReader right(*subject.weights, FirstDeviation{}), wrong(*subject.weights, deviation);
  const Expert& expert = subject.weights->experts[1];
  std::vector<float> due(64), found(64);
  // Row 5 of [192, 4] scales, block 2, read as [4, 192]: byte 2 * 192 + 5 = 389 is row 97, block 1: up's
  // row 1.
  right.read_row(1, 5, due.data());
  wrong.read_row(1, 5, found.data());
  const float own = decode_e4m3(std::get<BlockScaledView>(expert.gate).scale_code(5, 2));
  const float other = decode_e4m3(std::get<BlockScaledView>(expert.up).scale_code(1, 1));
  for (int k = 32; k < 48; ++k) EXPECT_FLOAT_EQ(found[k], due[k] / own * other);
}

TEST(WeightReader, SwapsNibblesAndSaturates) {
  const Subject& subject = layer().subject();
  WeightReading swapped;
  swapped.swapped_nibbles = true;
  const WeightReader right(*subject.weights, WeightReading{}), wrong(*subject.weights, swapped);
  std::vector<float> due(96), found(96);
  right.read_row(0, 3, due.data());
  wrong.read_row(0, 3, found.data());
  for (size_t k = 0; k < 96; ++k) EXPECT_EQ(found[k], due[k ^ 1]);
}

// ---- faults ----

TEST(KnownFaults, HaveUniqueNamesSentencesAndRemedies) {
  for (const char* family : {"qwen3-moe", "deepseek-v3", "deepseek-v4", "gpt-oss", "mixtral", "qwen2-moe"}) {
    const Layer one(family);
    std::set<std::string> ids, sentences;
    for (const Fault& fault : known_faults(one.subject())) {
      EXPECT_TRUE(ids.insert(fault.id).second) << fault.id;
      EXPECT_TRUE(sentences.insert(fault.sentence).second) << fault.id << ": " << fault.sentence;
      EXPECT_FALSE(fault.remedy.empty()) << fault.id;
      EXPECT_EQ(fault.sentence.find("{}"), std::string::npos) << fault.sentence;
      Deviation deviation;
      fault.apply_to(deviation);
      EXPECT_FALSE(deviation == Deviation{}) << fault.id << " changes nothing";
    }
    EXPECT_GT(ids.size(), 100u);
  }
}

TEST(KnownFaults, CombineWhereNeitherUndoesTheOther) {
  const Subject& subject = layer().subject();
  const Fault w13 = fault_named(subject, "scales-transposed.w13"),
              w2 = fault_named(subject, "nibbles-swapped.w2"),
              both = fault_named(subject, "scales-transposed"), next = fault_named(subject, "expert-next"),
              previous = fault_named(subject, "expert-previous");
  EXPECT_TRUE(can_be_combined(w13, w2));
  EXPECT_FALSE(can_be_combined(w13, w13));
  EXPECT_FALSE(can_be_combined(w13, both));
  EXPECT_FALSE(can_be_combined(next, previous));
}

// ---- the matcher ----

Diagnosis diagnosis_of(const Subject& subject, const Candidate& candidate, const Staging& staging) {
  MatcherOptions options;
  options.stagings = {staging};
  return diagnose(subject, candidate, options);
}

TEST(Matcher, NamesAFaultAndHowItFits) {
  const Subject& subject = layer().subject();
  EngineStyle style;
  style.staging = {ActivationFormat::kNvfp4, ScalePolicy::kStatic};
  const Candidate candidate =
      run_planted_engine(subject, style, {fault_named(subject, "scales-transposed.w13")});
  const Diagnosis found = diagnosis_of(subject, candidate, style.staging);
  ASSERT_EQ(found.verdict, Verdict::kExplained);
  EXPECT_EQ(found.best->id(), "scales-transposed.w13");
  EXPECT_LE(found.best->distance, found.best->limit);
  ASSERT_TRUE(found.runner_up);
  EXPECT_GT(found.runner_up->distance, found.best->distance);
  EXPECT_GT(found.sound.distance, found.sound.limit);
}

TEST(Matcher, NamesAPairAndNoPairWhereOneFaultWillDo) {
  const Subject& subject = layer().subject();
  const EngineStyle style;  // bf16
  const Fault a = fault_named(subject, "nibbles-swapped.w2"), b = fault_named(subject, "expert-next");
  const Diagnosis pair = diagnosis_of(subject, run_planted_engine(subject, style, {a, b}), style.staging);
  ASSERT_EQ(pair.verdict, Verdict::kExplained);
  EXPECT_EQ(pair.best->id(), "expert-next + nibbles-swapped.w2");
  const Diagnosis single = diagnosis_of(subject, run_planted_engine(subject, style, {b}), style.staging);
  EXPECT_EQ(single.best->id(), "expert-next");
}

TEST(Matcher, FindsAValueOfACodeThatIsNoNeighbour) {
  const Subject& subject = layer().subject();
  const Candidate candidate = run_planted_engine(subject, {}, {wrong_code_fault(5, 3.5f)});
  const Diagnosis found = diagnosis_of(subject, candidate, Staging{});
  ASSERT_EQ(found.verdict, Verdict::kExplained);
  EXPECT_EQ(found.best->id(), "e2m1-code-5-as-3.5");
}

TEST(Matcher, ClaimsNothingOnASoundEngine) {
  const Subject& subject = layer().subject();
  for (const Staging& staging : plausible_stagings(subject)) {
    EngineStyle style;
    style.staging = staging;
    style.fused = style.bf16_sums = style.reciprocal_multiply = true;
    EXPECT_EQ(diagnosis_of(subject, run_planted_engine(subject, style, {}), staging).verdict, Verdict::kFine)
        << describe(staging);
  }
}

TEST(Matcher, AdmitsThatItDoesNotKnow) {
  const Subject& subject = layer().subject();
  Candidate candidate = run_planted_engine(subject, {}, {});
  for (size_t i = 0; i < candidate.output.size(); i += 3) candidate.output[i] = -candidate.output[i];
  EXPECT_EQ(diagnosis_of(subject, candidate, Staging{}).verdict, Verdict::kUnexplained);
}

TEST(Matcher, BearsOutputsThatAreNanThroughout) {
  const Subject& subject = layer().subject();
  Candidate candidate = run_planted_engine(subject, {}, {});
  std::fill(candidate.output.begin(), candidate.output.end(), NAN);
  EXPECT_NE(diagnosis_of(subject, candidate, Staging{}).verdict, Verdict::kExplained);
}

TEST(RunAfter, GivesEachStageFromTheOneBefore) {
  const Subject& subject = layer().subject();
  std::vector<int64_t> tokens(12);
  std::iota(tokens.begin(), tokens.end(), 0);
  Replay replay(subject, tokens);
  const Stages due = replay.run({}, Staging{});
  Stages given = due;
  for (float& value : given.h) value *= 2.0f;
  const Stages after = replay.run_after(given, Staging{});
  EXPECT_EQ(after.h, due.h);
  EXPECT_NE(after.activation, due.activation);  // of the doubled h
  EXPECT_EQ(after.output, due.output);          // of the activation that is given, which is right
}

// ---- where ----

/// Errors of the columns that `is_bad` names, in all of `tokens` tokens.
template <class IsBad>
ErrorMap map_of(const Subject& subject, const IsBad& is_bad) {
  std::vector<int64_t> tokens(static_cast<size_t>(subject.tokens));
  std::iota(tokens.begin(), tokens.end(), 0);
  const auto hidden = static_cast<size_t>(subject.hidden());
  std::vector<float> due(tokens.size() * hidden, 1.0f), found = due;
  for (size_t i = 0; i < found.size(); ++i) found[i] += is_bad(i / hidden, i % hidden) ? 1.0f : 1e-3f;
  return map_errors(subject, tokens, found, due, 0.01);
}

TEST(ErrorMap, TellsBlocksPeriodsAndExperts) {
  const Subject& subject = layer().subject();  // 64 columns
  const ErrorMap block = map_of(subject, [](size_t, size_t col) { return col / 16 == 2; });
  EXPECT_EQ(block.block, 16);
  EXPECT_EQ(block.bad_blocks, std::vector<int64_t>{2});
  EXPECT_EQ(block.period, 0);
  const ErrorMap period = map_of(subject, [](size_t, size_t col) { return col % 8 == 3; });
  EXPECT_EQ(period.period, 8);
  EXPECT_EQ(period.block, 0);
  const ErrorMap column = map_of(subject, [](size_t, size_t col) { return col == 9; });
  EXPECT_EQ(column.period, 0);
  EXPECT_EQ(column.first_bad_column, 9);
  EXPECT_EQ(column.last_bad_column, 9);
  const auto goes_to_2 = [&](size_t token) {
    return subject.topk_ids[token * 2] == 2 || subject.topk_ids[token * 2 + 1] == 2;
  };
  const ErrorMap expert = map_of(subject, [&](size_t token, size_t) { return goes_to_2(token); });
  EXPECT_NE(std::find(expert.bad_experts.begin(), expert.bad_experts.end(), 2), expert.bad_experts.end());
}

// ---- the self-test's judgement ----

TEST(SelfTestReport, PassesByFaultAndNotByTheSum) {
  SelfTestReport report;
  for (int i = 0; i < 100; ++i) report.faults["fault " + std::to_string(i)] = {6, 6, 0, 0};
  report.sound_trials = 200;
  EXPECT_TRUE(report.passes());
  report.faults["fault 7"] = {20, 12, 7, 0};  // 95%, classes counted
  EXPECT_TRUE(report.passes());
  report.faults["fault 7"] = {20, 18, 0, 0};
  EXPECT_FALSE(report.passes());
  report.faults["fault 7"] = {0, 0, 0, 6};  // left out
  EXPECT_TRUE(report.passes());
  report.sound_unexplained = 1;
  EXPECT_FALSE(report.passes());
  report.sound_unexplained = 0;
  report.sound_claimed = 1;
  EXPECT_FALSE(report.passes());
  report.sound_claimed = 0;
  report.pair_trials = 10;
  report.pairs_top_two = 4;
  EXPECT_FALSE(report.passes());
}

}  // namespace
}  // namespace fourfold::diagnosis
