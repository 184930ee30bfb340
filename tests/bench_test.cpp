// The benchmark's parts: percentiles, floors, routings, generated weights, and the check that goes before
// every time.
#include "tools/bench.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "bench/shapes.h"
#include "fourfold/error.h"
#include "fourfold/reference.h"
#include "planted_faults.h"
#include "reference/sampled_multiply.h"
#include "tools/bench_report.h"
#include "tools/layer_inputs.h"
#include "tools/layer_trace.h"
#include "tools/staged_rows.h"

namespace fourfold {
namespace {

TEST(ModelShapes, EveryAliasNamesOne) {
  for (const ShapeAlias& alias : kShapeAliases) {
    const ModelShape* const shape = find_model_shape(alias.alias);
    ASSERT_NE(shape, nullptr) << alias.alias;
    EXPECT_EQ(shape->name, alias.name);
  }
  EXPECT_EQ(find_model_shape("nosuch"), nullptr);
}

TEST(Percentile, InterpolatesBetweenNeighbours) {
  const double sorted[] = {1.0, 2.0, 4.0, 8.0};
  EXPECT_EQ(percentile(sorted, 0.0), 1.0);
  EXPECT_EQ(percentile(sorted, 0.5), 3.0);
  EXPECT_DOUBLE_EQ(percentile(sorted, 0.1), 1.3);  // position 0.3
  EXPECT_DOUBLE_EQ(percentile(sorted, 0.9), 6.8);  // position 2.7
  EXPECT_EQ(percentile(sorted, 1.0), 8.0);
  EXPECT_THROW(percentile({}, 0.5), Error);
}

TEST(Spread, SortsItsSamples) {
  const double samples[] = {5.0, 1.0, 3.0};
  const Spread spread = spread_of(samples);
  EXPECT_EQ(spread.median, 3.0);
  EXPECT_EQ(spread.samples, 3);
  EXPECT_DOUBLE_EQ(spread.p10, 1.4);
}

TEST(TimingLimits, WantSamplesAndSecondsButNotForEver) {
  const TimingLimits limits{0.5, 10};
  EXPECT_FALSE(is_enough(limits, 9, 0.9));
  EXPECT_FALSE(is_enough(limits, 100, 0.4));
  EXPECT_TRUE(is_enough(limits, 10, 0.5));
  EXPECT_FALSE(is_enough(limits, kLeastSamples - 1, 100.0));
  EXPECT_TRUE(is_enough(limits, kLeastSamples, kMostOvertime * 0.5));
}

/// One step in which every one of `tokens` tokens goes to the first K experts.
RoutingRotation narrow_rotation(int64_t tokens, int64_t experts, int64_t top_k) {
  RoutingRotation rotation{tokens, top_k, experts, {}};
  RoutingStep step;
  for (int64_t slot = 0; slot < tokens * top_k; ++slot) {
    step.topk_ids.push_back(static_cast<int32_t>(slot % top_k));
    step.topk_weights.push_back(0.5f);
  }
  step.rows_of_expert.assign(static_cast<size_t>(experts), 0);
  for (int64_t k = 0; k < top_k; ++k)
    step.rows_of_expert[static_cast<size_t>(k)] = static_cast<int32_t>(tokens);
  rotation.steps = {step, step};
  return rotation;
}

TEST(Work, CountsWeightsOfExpertsHitAndEveryRow) {
  BenchCase bench_case{"b", "m", 8, 64, 32, 2, 10, ActivationFormat::kBf16, 0};
  const BenchWork work = work_of(bench_case, narrow_rotation(10, 8, 2));
  EXPECT_EQ(work.experts_hit, 2.0);
  EXPECT_EQ(work.rows, 20.0);
  EXPECT_EQ(work.weight_bytes, 2 * 3 * 64 * 32 * 9 / 16);  // 4 bits a weight and 8 bits a block of 16
  EXPECT_EQ(work.bytes, work.weight_bytes + 2 * 10 * 64 * 2);
  EXPECT_EQ(work.operations, 2.0 * 20 * 3 * 64 * 32);
  bench_case.activations = ActivationFormat::kNvfp4x2;
  EXPECT_EQ(work_of(bench_case, narrow_rotation(10, 8, 2)).operations, 2.0 * work.operations);
}

TEST(Floor, IsTheLargerOfMemoryAndArithmetic) {
  BenchWork work;
  work.bytes = 6e9;
  work.operations = 1e12;
  EXPECT_EQ(floor_of(work, 3e9, 1e12).seconds, 2.0);
  EXPECT_TRUE(floor_of(work, 3e9, 1e12).by_memory);
  EXPECT_EQ(floor_of(work, 3e12, 1e12).seconds, 1.0);
  EXPECT_FALSE(floor_of(work, 3e12, 1e12).by_memory);
  EXPECT_EQ(floor_of(work, 3e9, std::nullopt).seconds, 2.0);
}

// The first row of the tables of published peers: DeepSeek-V3 with one token, 8 experts of 256, at 3.11 TB/s:
// 63.7 us.
TEST(Floor, IsThePublishedOne) {
  const BenchCase bench_case{"b", "deepseek-v3", 256, 7168, 2048, 8, 1, ActivationFormat::kNvfp4, 0};
  const BenchWork work = work_of(bench_case, narrow_rotation(1, 256, 8));
  EXPECT_NEAR(floor_of(work, 3.11e12, 726e12).seconds, 63.7e-6, 0.05e-6);
}

struct RoutingCase {
  RoutingKind kind;
  int64_t tokens, experts, top_k;
};

class GeneratedRouting : public testing::TestWithParam<RoutingCase> {};

TEST_P(GeneratedRouting, SendsEveryTokenToDifferentExperts) {
  const RoutingCase& param = GetParam();
  const RoutingRotation rotation =
      make_rotation({param.kind, {}}, param.tokens, param.experts, param.top_k, 0, 7);
  ASSERT_EQ(rotation.steps.size(), kLeastSteps);
  for (const RoutingStep& step : rotation.steps) {
    ASSERT_EQ(step.rows(), param.tokens * param.top_k);
    for (int64_t token = 0; token < param.tokens; ++token) {
      std::set<int32_t> experts;
      double sum = 0.0;
      for (int64_t k = 0; k < param.top_k; ++k) {
        const auto slot = static_cast<size_t>(token * param.top_k + k);
        EXPECT_GE(step.topk_ids[slot], 0);
        EXPECT_LT(step.topk_ids[slot], param.experts);
        EXPECT_GT(step.topk_weights[slot], 0.0f);
        experts.insert(step.topk_ids[slot]);
        sum += step.topk_weights[slot];
      }
      EXPECT_EQ(static_cast<int64_t>(experts.size()), param.top_k);
      EXPECT_NEAR(sum, 1.0, 1e-6);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, GeneratedRouting,
                         testing::Values(RoutingCase{RoutingKind::kUniform, 33, 16, 3},
                                         RoutingCase{RoutingKind::kZipf, 33, 16, 3},
                                         RoutingCase{RoutingKind::kOneExpert, 33, 16, 3},
                                         RoutingCase{RoutingKind::kSequences, 33, 16, 3},
                                         RoutingCase{RoutingKind::kSequences, 1, 4, 4},
                                         RoutingCase{RoutingKind::kUniform, 1, 1, 1},
                                         RoutingCase{RoutingKind::kZipf, 5, 4, 4},
                                         RoutingCase{RoutingKind::kOneExpert, 5, 4, 4},
                                         RoutingCase{RoutingKind::kOneExpert, 2, 7, 1}));

TEST(Rotation, IsTheSameForTheSameSeedAlone) {
  const auto ids = [](uint64_t seed) {
    return make_rotation({RoutingKind::kZipf, {}}, 9, 32, 4, 0, seed).steps[3].topk_ids;
  };
  EXPECT_EQ(ids(1), ids(1));
  EXPECT_NE(ids(1), ids(2));
}

// 8 steps of 4 experts each out of 32: none is hit twice.
TEST(Rotation, HitsAnExpertAgainOnlyAfterAllOthers) {
  const RoutingRotation rotation = make_rotation({RoutingKind::kUniform, {}}, 1, 32, 4, 0, 5);
  std::set<size_t> hit;
  for (const RoutingStep& step : rotation.steps) {
    for (size_t expert = 0; expert < step.rows_of_expert.size(); ++expert) {
      if (step.rows_of_expert[expert] == 0) continue;
      EXPECT_TRUE(hit.insert(expert).second) << expert;
    }
  }
  EXPECT_EQ(hit.size(), 32u);
}

TEST(Rotation, GoesOnUntilEnoughExpertsAreHit) {
  EXPECT_EQ(make_rotation({}, 1, 256, 8, 8 * 20, 1).steps.size(), 20u);
  EXPECT_EQ(make_rotation({}, 1, 256, 8, 1 << 30, 1).steps.size(), kMostSteps);
}

// 64 draws of 8 out of 256 hit 256 (1 - (1 - 8/256)^64) = 222.5 experts on average, with a standard deviation
// of about 5; the mean of 8 steps lies within 7 of it but for one run in ten thousand (and the seed is
// fixed).
TEST(Uniform, HitsAsManyExpertsAsChanceDoes) {
  const RoutingRotation rotation = make_rotation({RoutingKind::kUniform, {}}, 64, 256, 8, 0, 1);
  double hit = 0.0;
  for (const RoutingStep& step : rotation.steps) hit += static_cast<double>(step.experts_hit()) / 8.0;
  EXPECT_NEAR(hit, 222.5, 7.0);
}

// With K = 1 the shares are 1/rank over their sum: 1 to 16 sum up to 3.38, so the first has 29.6%, the second
// half of that. Of 20000 tokens the standard deviation is 0.3%.
TEST(Zipf, SharesFallAsOneOverRank) {
  const RoutingRotation rotation = make_rotation({RoutingKind::kZipf, {}}, 20000, 16, 1, 0, 1);
  std::vector<int32_t> rows = rotation.steps.front().rows_of_expert;
  std::sort(rows.rbegin(), rows.rend());
  EXPECT_NEAR(rows[0] / 20000.0, 0.296, 0.015);
  EXPECT_NEAR(rows[1] / 20000.0, 0.148, 0.015);
  EXPECT_NEAR(rows[15] / 20000.0, 0.0185, 0.006);
}

/// The most popular expert's rows among tokens [first, first + count) of a step, by the mean's.
double most_by_mean(const RoutingRotation& rotation, size_t step, int64_t first, int64_t count) {
  std::vector<int64_t> rows(static_cast<size_t>(rotation.experts));
  const std::vector<int32_t>& ids = rotation.steps[step].topk_ids;
  for (int64_t slot = first * rotation.top_k; slot < (first + count) * rotation.top_k; ++slot) {
    ++rows[static_cast<size_t>(ids[static_cast<size_t>(slot)])];
  }
  return static_cast<double>(*std::max_element(rows.begin(), rows.end()) * rotation.experts) /
         static_cast<double>(count * rotation.top_k);
}

// Of 128 log-normal numbers of sigma s the largest is about exp(2.6 s), their mean exp(s s / 2): 4.0 times as
// much for 0.6 (all of a call, whose sequences average the rest out), 9 for the 1.0 of a sequence. Drawing 8
// different ones takes some of it away.
TEST(Sequences, HaveExpertsOfTheirOwnBesideThoseOfAll) {
  const RoutingRotation rotation = make_rotation({RoutingKind::kSequences, {}}, 8192, 128, 8, 0, 1);
  double all = 0.0, one = 0.0;
  for (size_t step = 0; step < kLeastSteps; ++step) {
    all += most_by_mean(rotation, step, 0, 8192) / kLeastSteps;
    one += most_by_mean(rotation, step, 256, 256) / kLeastSteps;
  }
  EXPECT_NEAR(all, 3.7, 0.8);
  EXPECT_NEAR(one, 6.5, 1.5);
  EXPECT_GT(one, 1.3 * all);
  const RoutingRotation few = make_rotation({RoutingKind::kSequences, {}}, 8, 128, 8, 0, 1);
  EXPECT_GT(few.steps[0].experts_hit(), 30);  // of at most 64: each token is a sequence of its own
}

TEST(OneExpert, GetsEveryTokenAndIsAnotherEachStep) {
  const RoutingRotation rotation = make_rotation({RoutingKind::kOneExpert, {}}, 40, 64, 2, 0, 1);
  std::set<int32_t> hot;
  for (const RoutingStep& step : rotation.steps) {
    const auto most = std::max_element(step.rows_of_expert.begin(), step.rows_of_expert.end());
    EXPECT_EQ(*most, 40);
    hot.insert(static_cast<int32_t>(most - step.rows_of_expert.begin()));
  }
  EXPECT_GT(hot.size(), 1u);
}

TEST(Rotation, RefusesMoreThanThereIs) {
  EXPECT_THROW(make_rotation({}, 1, 4, 5, 0, 1), Error);
  EXPECT_THROW(make_rotation(parse_routing("/no/such/file"), 1, 4, 2, 0, 1), Error);
}

/// A generated layer on the host.
struct HostLayer {
  std::unique_ptr<Testbed> testbed = make_cpu_testbed();
  GeneratedLayer layer{6, 128, 96, 5};
  ExpertWeights weights = testbed->generate(layer);
  LayerConfig config{128, 96, 6, 2, {}};
};

// x is N(0, 1), rows of gate have norm 1 and of up at most 2, so h is of order 1, and so is what comes out.
TEST(GeneratedExperts, GiveOutputsOfOrderOne) {
  const HostLayer host;
  LayerInputs inputs = make_inputs(64, 128, 3, false);
  route_at_random(inputs, 6, 2, 3);
  const auto layer = reference_backend().make_layer(host.weights, host.config, {});
  const LayerTrace run = trace(*layer, inputs);
  const auto rms = [](const std::vector<Bf16>& values) {
    double sum = 0.0;
    for (const Bf16 value : values) sum += std::pow(static_cast<float>(value), 2);
    return std::sqrt(sum / static_cast<double>(values.size()));
  };
  EXPECT_GT(rms(run.h), 0.5);
  EXPECT_LT(rms(run.h), 2.0);
  EXPECT_GT(rms(run.y), 0.3);
  EXPECT_LT(rms(run.y), 3.0);
}

TEST(GeneratedExperts, DifferBySeedAndHaveSoundScales) {
  const HostLayer host;
  const ExpertWeights other = host.testbed->generate({6, 128, 96, 6});
  const auto& a = std::get<BlockScaledView>(host.weights.experts[2].up);
  const auto& b = std::get<BlockScaledView>(other.experts[2].up);
  int64_t same = 0;
  for (int64_t col = 0; col < a.codes.cols; ++col) same += a.codes(5, col) == b.codes(5, col);
  EXPECT_LT(same, a.codes.cols / 4);  // one byte in 128 or so by chance
  for (int64_t block = 0; block < a.blocks_per_row(); ++block) {
    EXPECT_GE(a.scale_code(7, block), 0x5C);
    EXPECT_LE(a.scale_code(7, block), 0x7B);
  }
}

// The oracle's sums in float64 and the reference's in float64 differ by their order alone, 2^-53 of the sum
// of magnitudes, and are rounded to float32 alike: bf16 of both are equal but for ties of probability 1e-6.
TEST(SampledMultiply, IsTheReferenceInFloat64) {
  const HostLayer host;
  LayerOptions options;
  options.accumulation = Accumulation::kFloat64;
  LayerInputs inputs = make_inputs(20, 128, 3, false);
  route_at_random(inputs, 6, 2, 3);
  for (const auto format : {ActivationFormat::kNvfp4, ActivationFormat::kNvfp4x2, ActivationFormat::kFp8,
                            ActivationFormat::kBf16}) {
    options.activations = format;
    const LayerTrace run = trace(*reference_backend().make_layer(host.weights, host.config, options), inputs);
    std::vector<int32_t> expert_of;
    for (int32_t e = 0; e < 6; ++e) {
      const auto rows = run.permutation.group_offsets[static_cast<size_t>(e) + 1] -
                        run.permutation.group_offsets[static_cast<size_t>(e)];
      expert_of.insert(expert_of.end(), static_cast<size_t>(rows), e);
    }
    std::vector<int64_t> columns = {0, 1, 95, 96, 191};
    const std::vector<float> exact = reference::multiply_sampled(
        host.weights, ExpertGemm::kGateUp, decode_rows(run.staged_x, format, expert_of, 128), columns);
    for (size_t i = 0; i < exact.size(); ++i) {
      const size_t at = i / columns.size() * 192 + static_cast<size_t>(columns[i % columns.size()]);
      EXPECT_EQ(encode_bf16(exact[i]), run.h[at]) << to_string(format) << " " << i;
    }
  }
}

CheckReport check_backend(const Backend& backend, CheckDepth depth, const LayerOptions& options = {},
                          int64_t tokens = 40) {
  const HostLayer host;
  const LayerInputs inputs = make_inputs(tokens, 128, 9, false);
  const RoutingRotation rotation = make_rotation({}, tokens, 6, 2, 0, 9);
  const auto layer = backend.make_layer(host.weights, host.config, options);
  const LayerPlan plan = layer->plan(tokens);
  const AlignedWorkspace workspace(plan.workspace_bytes);
  std::vector<Bf16> y(static_cast<size_t>(tokens * 128));
  CheckSubject subject;
  subject.testbed = host.testbed.get();
  subject.weights = &host.weights;
  subject.layer = layer.get();
  subject.plan = &plan;
  subject.x = inputs.x_view();
  subject.routing = rotation.view(0);
  subject.args.x = inputs.x_view();
  subject.args.routing = rotation.view(0);
  subject.args.y = MatrixView<Bf16>(y.data(), tokens, 128);
  subject.args.workspace = workspace.span();
  return check_layer(subject, depth);
}

TEST(Check, PassesTheReferenceInEveryFormatAndPolicy) {
  for (const auto format : {ActivationFormat::kNvfp4, ActivationFormat::kNvfp4x2, ActivationFormat::kFp8,
                            ActivationFormat::kBf16}) {
    for (const auto policy : {ScalePolicy::kStatic, ScalePolicy::kMaxOverExperts, ScalePolicy::kDynamicTensor,
                              ScalePolicy::kDynamicToken}) {
      LayerOptions options;
      options.activations = format;
      options.x_scale = options.intermediate_scale = policy;
      const CheckReport stages = check_backend(reference_backend(), CheckDepth::kStageByStage, options);
      EXPECT_TRUE(stages.passed()) << to_string(format) << " " << to_string(policy) << ": "
                                   << stages.findings[0];
      EXPECT_EQ(stages.stages.size(), 4u);
      EXPECT_EQ(stages.rows, 80);
      // Rounding to bf16 alone: 1.7e-3 in the mean.
      EXPECT_GT(stages.worst(), 1e-3);
      if (policy == ScalePolicy::kDynamicTensor) continue;
      const CheckReport whole = check_backend(reference_backend(), CheckDepth::kEndToEnd, options);
      EXPECT_TRUE(whole.passed()) << to_string(format) << " " << to_string(policy) << ": "
                                  << whole.findings[0];
      EXPECT_LT(whole.worst(), 4e-3);  // half the limit
    }
  }
}

class PlantedFaultInBench : public testing::TestWithParam<Fault> {};

TEST_P(PlantedFaultInBench, IsAFindingStageByStage) {
  EXPECT_FALSE(check_backend(*make_faulty_backend(GetParam()), CheckDepth::kStageByStage).passed());
}

INSTANTIATE_TEST_SUITE_P(All, PlantedFaultInBench, testing::ValuesIn(kPlantedFaults),
                         [](const auto& fault) { return name_of(fault.param); });

TEST(Check, PassesTheFaultyEngineWithoutItsFault) {
  EXPECT_TRUE(check_backend(*make_faulty_backend(Fault::kNone), CheckDepth::kStageByStage).passed());
}

// From end to end a wrong tie is as small as what rounding does; everything else shows.
TEST(Check, FindsFaultsFromEndToEnd) {
  for (const Fault fault : kPlantedFaults) {
    if (fault == Fault::kWrongTieRule) continue;
    EXPECT_FALSE(check_backend(*make_faulty_backend(fault), CheckDepth::kEndToEnd).passed())
        << name_of(fault);
  }
}

/// A layer whose y is another one when it is tapped, or that leaves a row of y unwritten.
class CarelessLayer final : public MoeLayer {
 public:
  CarelessLayer(std::unique_ptr<MoeLayer> layer, bool unwritten)
      : layer_(std::move(layer)), unwritten_(unwritten) {}

  const LayerConfig& config() const override { return layer_->config(); }
  const LayerOptions& options() const override { return layer_->options(); }
  LayerPlan plan(int64_t max_tokens) const override { return layer_->plan(max_tokens); }
  void forward(const LayerPlan& plan, const ForwardArgs& args) const override {
    layer_->forward(plan, args);
    const auto& y = std::get<MatrixView<Bf16>>(args.y);
    if (unwritten_) y(y.rows - 1, 3) = Bf16{0xFFFF};
    if (!unwritten_ && !args.taps.z.empty()) y(0, 0) = Bf16{static_cast<uint16_t>(y(0, 0).bits ^ 1)};
  }
  void experts(const LayerPlan&, const ExpertsArgs&) const override {}
  void update_weights(const ExpertWeights&) override {}

 private:
  std::unique_ptr<MoeLayer> layer_;
  bool unwritten_;
};

class CarelessBackend final : public Backend {
 public:
  explicit CarelessBackend(bool unwritten) : unwritten_(unwritten) {}

  std::string_view name() const override { return "careless"; }
  std::string_view description() const override { return "for tests"; }
  std::string why_unavailable() const override { return ""; }
  std::string why_unsupported(const ExpertWeights&, const LayerConfig&, const LayerOptions&) const override {
    return "";
  }
  std::unique_ptr<MoeLayer> make_layer(const ExpertWeights& weights, const LayerConfig& config,
                                       const LayerOptions& options) const override {
    return std::make_unique<CarelessLayer>(reference_backend().make_layer(weights, config, options),
                                           unwritten_);
  }
  void gemm(const GemmArgs&) const override {}
  void grouped_gemm(const GroupedGemmArgs&) const override {}

 private:
  bool unwritten_;
};

TEST(Check, FindsTapsThatChangeTheResultAndRowsThatAreUnwritten) {
  const CheckReport tapped = check_backend(CarelessBackend(false), CheckDepth::kStageByStage);
  ASSERT_FALSE(tapped.passed());
  EXPECT_NE(tapped.findings.front().find("taps"), std::string::npos) << tapped.findings.front();
  EXPECT_FALSE(check_backend(CarelessBackend(true), CheckDepth::kStageByStage).passed());
  EXPECT_FALSE(check_backend(CarelessBackend(true), CheckDepth::kEndToEnd).passed());
}

TEST(Report, SaysWhenAFloorIsBeaten) {
  BenchResult result;
  result.bench_case = {"b", "m", 8, 64, 32, 2, 10, ActivationFormat::kBf16, 1};
  result.floor.seconds = 2e-3;
  result.cold = true;
  result.seconds = Spread{1e-3, 1e-3, 1e-3, 3};
  EXPECT_TRUE(result.beats_floor());
  EXPECT_NE(format_case(result).find("faster than its floor"), std::string::npos) << format_case(result);
  result.seconds = Spread{4e-3, 4e-3, 4e-3, 3};
  EXPECT_FALSE(result.beats_floor());
  EXPECT_EQ(format_case(result).find("faster than its floor"), std::string::npos);
  EXPECT_NE(format_case(result).find("50.0%"), std::string::npos) << format_case(result);
}

TEST(Report, SaysWhenThePeakIsLowerBetweenCalls) {
  BenchResult result;
  result.bench_case = {"b", "m", 8, 64, 32, 2, 10, ActivationFormat::kBf16, 1};
  result.peak = Ceiling{"bf16-amx", 2e12, ""};
  result.work.operations = 4e9;
  result.floor = floor_of(result.work, 1e12, 2e12);
  result.seconds = Spread{5e-3, 5e-3, 5e-3, 3};
  EXPECT_EQ(format_case(result).find("between"), std::string::npos);
  const auto with_peak_between = [&](double peak) {
    result.peak_between = peak;
    result.floor_between = floor_of(result.work, 1e12, peak);
    return format_case(result);
  };
  EXPECT_EQ(with_peak_between(1.95e12).find("between"), std::string::npos);
  EXPECT_NE(
      with_peak_between(1.6e12).find(
          "bf16-amx between the calls is 1.6 TFLOP/s, 80.0% of the ceiling; beside that 50.0% of the floor"),
      std::string::npos)
      << format_case(result);
  result.work.bytes = 4e9;  // memory binds, whatever the peak
  result.floor = floor_of(result.work, 1e12, 2e12);
  EXPECT_EQ(with_peak_between(1.6e12).find("between"), std::string::npos);
}

TEST(Ceilings, OfThePeakBehindSomeWorkIsOfThatPeak) {
  const std::vector<Ceiling> peaks = measure_cpu_peaks(0.001);
  int calls = 0;
  for (const Ceiling& peak : peaks) {
    const std::optional<double> behind = measure_cpu_peak_behind(peak, [&] { ++calls; });
    ASSERT_EQ(behind.has_value(), peak.per_second.has_value()) << peak.name;
    if (!behind) continue;
    EXPECT_GT(*behind, 0.1 * *peak.per_second) << peak.name;  // a busy machine's
    EXPECT_LT(*behind, 10 * *peak.per_second) << peak.name;
  }
  EXPECT_GE(calls, 5);
  EXPECT_FALSE(measure_cpu_peak_behind({"cuBLAS", 1e12, ""}, [] {}));
}

/// A request for a few small cases.
BenchRequest small_request(const Backend& backend) {
  BenchRequest request;
  request.shapes = {{"small", 6, 64, 32, 2}};
  request.tokens = {1, 5};
  request.backends = {&backend};
  request.activations = {ActivationFormat::kNvfp4};
  request.timing = {0.001, 3};
  return request;
}

std::vector<BenchResult> results_of(const BenchRequest& request) {
  std::vector<BenchResult> results;
  BenchListener listener;
  listener.result = [&](const BenchResult& result) { results.push_back(result); };
  run_bench(request, listener);
  return results;
}

TEST(Bench, GivesNoTimeForAWrongLayer) {
  for (const BenchResult& result : results_of(small_request(*make_faulty_backend(Fault::kSwappedGateUp)))) {
    EXPECT_FALSE(result.check.passed());
    EXPECT_FALSE(result.seconds);
    const std::string text = format_case(result);
    EXPECT_NE(text.find("wrong"), std::string::npos) << text;
  }
}

TEST(Bench, TimesARightLayerAndItsStages) {
  BenchRequest request = small_request(reference_backend());
  request.stages = true;
  const std::vector<BenchResult> results = results_of(request);
  ASSERT_EQ(results.size(), 2u);
  for (const BenchResult& result : results) {
    ASSERT_TRUE(result.seconds) << result.not_run;
    EXPECT_GE(result.seconds->samples, 3);
    EXPECT_LE(result.seconds->p10, result.seconds->median);
    EXPECT_LE(result.seconds->median, result.seconds->p90);
    EXPECT_GT(result.floor.seconds, 0.0);
    ASSERT_TRUE(result.peak);
    EXPECT_EQ(result.peak->name, "f32");
    EXPECT_EQ(result.stages.size(), 3u);
  }
  EXPECT_EQ(results[1].bench_case.name(), "reference/small/5");
}

}  // namespace
}  // namespace fourfold
