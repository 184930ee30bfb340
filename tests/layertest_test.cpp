// layertest names a planted bug and stays silent on a sound layer.
#include "tools/layertest.h"

#include <gtest/gtest.h>

#include <omp.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <optional>
#include <vector>

#include "fourfold/checkpoint.h"
#include "fourfold/error.h"
#include "planted_faults.h"
#include "random_layer.h"
#include "tools/layer_trace.h"
#include "tools/stage_comparison.h"
#include "tools/synthesize.h"
#include "tools/weight_comparison.h"

namespace fourfold {
namespace {

/// A synthesized checkpoint pair in a folder of its own.
class SyntheticPair {
 public:
  SyntheticPair(OriginalFormat original, uint64_t seed, WeightProfile profile = WeightProfile::kGaussian)
      : directory_(std::filesystem::path(testing::TempDir()) /
                   ("fourfold-" + std::to_string(getpid()) + "-" +
                    std::to_string(static_cast<int>(original)) + "-" + std::to_string(seed))) {
    SynthesizeRequest request;
    request.directory = directory_;
    request.experts = 6;
    request.hidden = 128;
    request.intermediate = 96;
    request.top_k = 2;
    request.original = original;
    request.profile = profile;
    request.seed = seed;
    request.force = true;
    synthesize(request);
    original_ = load_experts(Checkpoint::open(directory_ / "original"), 0);
    nvfp4_ = load_experts(Checkpoint::open(directory_ / "nvfp4"), 0);
  }
  ~SyntheticPair() { std::filesystem::remove_all(directory_); }

  const ExpertWeights& original() const { return original_.weights; }
  const ExpertWeights& nvfp4() const { return nvfp4_.weights; }
  Expert& nvfp4_expert(size_t expert) { return nvfp4_.weights.experts[expert]; }

  /// layertest with `backend`, on inputs that the calibration has not seen.
  LayertestReport test(const Backend& backend, uint64_t seed, bool outliers = false) const {
    // The channels that are outliers follow from the seed: those of calibration, with other tokens behind its
    // own.
    LayerInputs inputs = make_inputs(48, nvfp4_.weights.hidden, outliers ? seed : seed + 1000, outliers);
    route_at_random(inputs, nvfp4_.weights.count(), 2, seed + 1000);
    LayertestRequest request;
    request.original = &original_.weights;
    request.nvfp4 = &nvfp4_.weights;
    request.expert_ids = nvfp4_.expert_ids;
    request.config = {nvfp4_.weights.hidden, nvfp4_.weights.intermediate, nvfp4_.weights.count(), 2, {}};
    request.backend = &backend;
    request.inputs = &inputs;
    return run_layertest(request);
  }

 private:
  std::filesystem::path directory_;
  ExpertLayer original_, nvfp4_;
};

/// What the report's best explanation must begin with; empty: a bug that is not known.
std::string_view explanation_of(Fault fault) {
  switch (fault) {
    case Fault::kTransposedScales:
      return "scales-transposed";
    case Fault::kSwappedNibbles:
      return "nibbles-swapped";
    case Fault::kSwappedGateUp:
      return "gate-up";
    case Fault::kGateGlobalForUp:
      return "gate-global-for-up";
    case Fault::kReciprocalGlobal:
      return "weight-global-reciprocal";
    case Fault::kDroppedInputScale:
      return "input-scale-dropped";
    case Fault::kExpertOffByOne:
      return "expert-next";
    case Fault::kMissingRoutingWeight:
      return "weight-missing";
    default:
      return "";
  }
}

class PlantedFault : public testing::TestWithParam<Fault> {};

TEST_P(PlantedFault, IsAFindingInTheKernelOfAnMxfp4BornCheckpoint) {
  const SyntheticPair pair(OriginalFormat::kMxfp4, 1);
  const LayertestReport report = pair.test(*make_faulty_backend(GetParam()), 1);
  EXPECT_EQ(report.verdict, "kernel");
  EXPECT_EQ(exit_code_of(report), 3);
}

TEST_P(PlantedFault, IsExplainedInTheKernelOfABf16BornCheckpoint) {
  const SyntheticPair pair(OriginalFormat::kBf16, 1);
  const LayertestReport report = pair.test(*make_faulty_backend(GetParam()), 1);
  EXPECT_EQ(report.verdict, "kernel");
  EXPECT_EQ(exit_code_of(report), 3);
  ASSERT_FALSE(report.explanations.empty());
  const ReportedExplanation& best = report.explanations.front();
  EXPECT_TRUE(best.fault.starts_with(explanation_of(GetParam()))) << best.fault;
  EXPECT_EQ(best.evidence.starts_with("the best;"), !explanation_of(GetParam()).empty()) << best.evidence;
}

INSTANTIATE_TEST_SUITE_P(All, PlantedFault, testing::ValuesIn(kPlantedFaults),
                         [](const auto& fault) { return name_of(fault.param); });

DenseView view_of(const std::vector<float>& values) {
  const auto cols = static_cast<int64_t>(values.size());
  return {ElementType::kF32, reinterpret_cast<const std::byte*>(values.data()), 1, cols, 4 * cols, {}};
}

TEST(CompareWeights, CallsALayerIdenticalWhereEveryValueOfItIs) {
  const SyntheticPair rounded(OriginalFormat::kBf16, 1);
  EXPECT_FALSE(compare_weights(rounded.original(), rounded.nvfp4()).identical);
  const SyntheticPair exact(OriginalFormat::kMxfp4, 1);
  ExpertWeights before = exact.original(), after = exact.nvfp4();
  EXPECT_TRUE(compare_weights(before, after).identical);

  std::vector<float> bias(128, 0.25f), other_bias = bias;
  other_bias.back() = 0.5f;
  after.experts[3].down_bias = view_of(bias);
  EXPECT_FALSE(compare_weights(before, after).identical);
  before.experts[3].down_bias = view_of(other_bias);
  EXPECT_FALSE(compare_weights(before, after).identical);
  before.experts[3].down_bias = view_of(bias);
  EXPECT_TRUE(compare_weights(before, after).identical);
  bias.back() = std::nanf("");  // of which nothing is known
  EXPECT_FALSE(compare_weights(before, after).identical);
  bias.back() = 0.25f;

  before.experts[2].gate = DenseView{};
  EXPECT_THROW(compare_weights(before, after), Error);
  EXPECT_THROW(compare_weights(after, before), Error);
}

TEST(CompareWeights, LooksAtTheSharedExpertToo) {
  const SyntheticPair exact(OriginalFormat::kMxfp4, 1);
  ExpertWeights before = exact.original(), after = exact.nvfp4();
  const std::vector<float> gate(128, 0.25f);
  after.shared.emplace();
  after.shared->expert = after.experts[0];
  after.shared->intermediate = after.intermediate;
  EXPECT_FALSE(compare_weights(before, after).identical);
  before.shared.emplace();
  before.shared->expert = before.experts[0];
  before.shared->intermediate = before.intermediate;
  EXPECT_TRUE(compare_weights(before, after).identical);
  before.shared->gate = view_of(gate);
  EXPECT_FALSE(compare_weights(before, after).identical);
  after.shared->gate = view_of(gate);
  EXPECT_TRUE(compare_weights(before, after).identical);
  before.shared->expert = before.experts[1];
  EXPECT_FALSE(compare_weights(before, after).identical);
}

TEST(CompareWeights, DependsOnNoThreadsAndBringsErrorsOut) {
  const SyntheticPair pair(OriginalFormat::kBf16, 2);
  const int threads = omp_get_max_threads();
  omp_set_num_threads(1);
  const WeightComparison alone = compare_weights(pair.original(), pair.nvfp4());
  for (const int more : {2, 64}) {  // 18 matrices: whole ones to each of two, rows to each of 64
    omp_set_num_threads(more);
    const WeightComparison shared_out = compare_weights(pair.original(), pair.nvfp4());
    ASSERT_EQ(shared_out.matrices.size(), alone.matrices.size());
    for (size_t i = 0; i < alone.matrices.size(); ++i) {
      EXPECT_EQ(shared_out.matrices[i].name, alone.matrices[i].name);
      EXPECT_EQ(shared_out.matrices[i].sums.difference_squared, alone.matrices[i].sums.difference_squared);
      EXPECT_EQ(shared_out.matrices[i].limit, alone.matrices[i].limit);
    }
    EXPECT_EQ(shared_out.limit, alone.limit);
    // An NVFP4 original is none: what it would be converted from is not known.
    EXPECT_THROW(compare_weights(pair.nvfp4(), pair.nvfp4()), Error);
  }
  omp_set_num_threads(threads);
}

TEST(ExpectedStages, AreTheSameWhetherTheyAreKnownOrComputed) {
  RandomLayerShape shape;
  shape.shared_intermediate = 96;
  const RandomLayer layer(shape, 5);
  LayertestRequest request;
  request.nvfp4 = &layer.weights;
  request.config = layer.config;
  request.backend = &reference_backend();
  request.inputs = &layer.inputs;
  request.options.x_scale = request.options.intermediate_scale = ScalePolicy::kDynamicToken;
  const auto run = reference_backend().make_layer(layer.weights, layer.config, request.options);
  const LayerTrace emulation = trace(*run, layer.inputs, &*layer.weights.shared);
  LayerTrace nothing_known;
  nothing_known.shared.emplace();
  const LayerTrace known = expected_stages(emulation, emulation, request);
  const LayerTrace computed = expected_stages(emulation, nothing_known, request);
  EXPECT_EQ(known.h, computed.h);
  EXPECT_EQ(known.activation, computed.activation);
  EXPECT_EQ(known.z, computed.z);
  EXPECT_EQ(known.y, computed.y);
  EXPECT_EQ(known.shared->h, computed.shared->h);
  EXPECT_EQ(known.shared->z, computed.shared->z);
}

TEST(Layertest, IsSilentOnASoundLayerOverTwentySeeds) {
  const auto sound = make_faulty_backend(Fault::kNone);
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const auto original = seed % 2 == 0 ? OriginalFormat::kMxfp4 : OriginalFormat::kBf16;
    const auto profile = seed % 4 < 2 ? WeightProfile::kGaussian : WeightProfile::kRealistic;
    const SyntheticPair pair(original, seed, profile);
    for (const Backend* backend : {&reference_backend(), static_cast<const Backend*>(sound.get())}) {
      const LayertestReport report = pair.test(*backend, seed);
      EXPECT_EQ(exit_code_of(report), 0) << "seed " << seed << ", " << backend->name() << ": "
                                         << (report.findings.empty() ? "" : report.findings.front());
    }
  }
}

TEST(Layertest, ComparesASoundBackendStageByStage) {
  const SyntheticPair pair(OriginalFormat::kMxfp4, 3);
  const LayertestReport report = pair.test(*make_faulty_backend(Fault::kNone), 3);
  ASSERT_EQ(report.kernel_stages.stages.size(), 4u);
  for (const StageReport& stage : report.kernel_stages.stages) EXPECT_EQ(stage.rel_l2, 0.0);
  ASSERT_TRUE(report.staging);
  EXPECT_GT(report.staging->x_values, 0);
  EXPECT_EQ(report.staging->x_different, 0);
  EXPECT_EQ(report.staging->intermediate_different, 0);
}

TEST(Layertest, LeavesTheKernelOutWhereTheBackendIsTheReference) {
  const SyntheticPair pair(OriginalFormat::kBf16, 4);
  const LayertestReport report = pair.test(reference_backend(), 4);
  EXPECT_TRUE(report.kernel_stages.stages.empty());
  EXPECT_NE(report.kernel_stages.left_out.find("not applicable"), std::string::npos);
}

class WrongInputScale : public testing::TestWithParam<float> {};

TEST_P(WrongInputScale, IsAFindingThatNamesTheExpert) {
  SyntheticPair pair(OriginalFormat::kBf16, 6);
  EXPECT_EQ(pair.test(reference_backend(), 6).verdict, "fine");
  float& scale = *pair.nvfp4_expert(2).down_input_scale;
  scale = GetParam() > 0.0f ? scale * GetParam() : 1.0f / scale;
  const LayertestReport report = pair.test(reference_backend(), 6);
  EXPECT_EQ(report.verdict, "activations");
  ASSERT_FALSE(report.findings.empty());
  EXPECT_NE(report.findings[0].find("the intermediate (down's): expert 2"), std::string::npos)
      << report.findings[0];
}

// Too small saturates, too large underflows; 0 stands for the reciprocal.
INSTANTIATE_TEST_SUITE_P(Factors, WrongInputScale, testing::Values(0.1f, 1e5f, 0.0f));

TEST(Layertest, FindsScalesThatOnlyTheLargestRowsSaturate) {
  SyntheticPair pair(OriginalFormat::kBf16, 8, WeightProfile::kRealistic);
  EXPECT_EQ(pair.test(reference_backend(), 8, true).verdict, "fine");
  for (size_t e = 0; e < 6; ++e) {
    for (auto* scale : {&pair.nvfp4_expert(e).gate_input_scale, &pair.nvfp4_expert(e).up_input_scale,
                        &pair.nvfp4_expert(e).down_input_scale}) {
      **scale *= 0.3f;
    }
  }
  EXPECT_EQ(pair.test(reference_backend(), 8, true).verdict, "activations");
}

TEST(Layertest, FindsNegativeAndNanBlockScales) {
  SyntheticPair pair(OriginalFormat::kBf16, 9);
  auto& up = std::get<BlockScaledView>(pair.nvfp4_expert(4).up);
  std::vector<uint8_t> scales(up.scales, up.scales + up.rows * up.blocks_per_row());
  scales[7] |= 0x80;
  up.scales = scales.data();
  const LayertestReport report = pair.test(reference_backend(), 9);
  EXPECT_EQ(report.verdict, "checkpoint");
  EXPECT_NE(report.findings[0].find("experts.4 up: 1 of"), std::string::npos) << report.findings[0];
}

TEST(Layertest, NamesTheStageOfTheFault) {
  const SyntheticPair pair(OriginalFormat::kMxfp4, 5);
  const LayertestReport combine = pair.test(*make_faulty_backend(Fault::kMissingRoutingWeight), 5);
  ASSERT_EQ(combine.findings.size(), 1u);  // every stage before is right, fed with its own input
  EXPECT_EQ(combine.findings[0].rfind("kernel: out:", 0), 0u) << combine.findings[0];
  const LayertestReport ties = pair.test(*make_faulty_backend(Fault::kWrongTieRule), 5);
  for (const std::string& finding : ties.findings)
    EXPECT_EQ(finding.rfind("kernel: staging", 0), 0u) << finding;
}

}  // namespace
}  // namespace fourfold
