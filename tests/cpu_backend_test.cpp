// Layers of the backend "cpu", stage by stage, each stage's reference fed with the layer's own previous
// output; what a layer promises beside its numbers; the choice of an instruction set.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <thread>

#include "cpu/cpu_backend.h"
#include "cpu_support.h"
#include "fourfold/cpu.h"
#include "fourfold/error.h"
#include "fourfold/reference.h"
#include "random_layer.h"
#include "sanitized.h"
#include "tools/gemmtest.h"
#include "tools/layer_trace.h"
#include "tools/layertest.h"

namespace fourfold::cpu {
namespace {

constexpr uint64_t kSeed = 5;

LayerOptions options_for(ActivationFormat format, ScalePolicy x = ScalePolicy::kStatic,
                         ScalePolicy intermediate = ScalePolicy::kStatic) {
  LayerOptions options;
  options.activations = format;
  options.x_scale = x;
  options.intermediate_scale = intermediate;
  return options;
}

constexpr ActivationFormat kFormats[] = {ActivationFormat::kNvfp4, ActivationFormat::kNvfp4x2,
                                         ActivationFormat::kFp8, ActivationFormat::kBf16};
constexpr ScalePolicy kPolicies[] = {ScalePolicy::kStatic, ScalePolicy::kMaxOverExperts,
                                     ScalePolicy::kDynamicTensor, ScalePolicy::kDynamicToken};
const ActivationFunction kActivations[] = {
    {},
    {ActivationKind::kSwiglu, 1.0f, 0.0f, 2.0f},
    {ActivationKind::kSwiglu, 1.702f, 1.0f, 3.0f},
    {ActivationKind::kSwigluStep, 1.0f, 0.0f, 1.5f},
    {ActivationKind::kSwigluStep},
    {ActivationKind::kGeglu},
    {ActivationKind::kGegluTanh},
    {ActivationKind::kReluSquared},
    {ActivationKind::kSilu},
    {ActivationKind::kGelu},
};

/// How a shared expert is stored.
enum class SharedFormat : uint8_t { kNone, kNvfp4, kBf16, kF32, kF16, kFp8 };

/// A random layer, with a shared expert if wanted.
class TestLayer {
 public:
  TestLayer(const RandomLayerShape& shape, uint64_t seed, SharedFormat shared = SharedFormat::kNone,
            int64_t shared_intermediate = 48, bool has_gate = true)
      : layer_(shape, seed), random_(seed) {
    if (shared != SharedFormat::kNone) add_shared(shared, shared_intermediate, has_gate);
  }

  LayerConfig& config() { return layer_.config; }
  ExpertWeights& weights() { return layer_.weights; }
  const LayerInputs& inputs() const { return layer_.inputs; }
  LayerInputs& inputs() { return layer_.inputs; }
  const SharedExpert* shared() const { return layer_.weights.shared ? &*layer_.weights.shared : nullptr; }

 private:
  void add_shared(SharedFormat format, int64_t intermediate, bool has_gate) {
    const int64_t hidden = layer_.config.hidden;
    SharedExpert shared;
    shared.intermediate = intermediate;
    shared.expert.name = "shared_expert";
    const float sigma = 1.0f / std::sqrt(static_cast<float>(hidden));
    shared.expert.gate = matrix(format, intermediate, hidden, sigma);
    shared.expert.up = matrix(format, intermediate, hidden, 2.0f * sigma);
    shared.expert.down = matrix(format, hidden, intermediate, 0.2f);
    shared.expert.gate_input_scale = shared.expert.up_input_scale = 5.0f / 2688.0f;
    shared.expert.down_input_scale = 9.0f / 2688.0f;
    if (has_gate) shared.gate = std::get<DenseView>(matrix(SharedFormat::kBf16, 1, hidden, 0.1f));
    layer_.weights.shared = shared;
    layer_.config.shared_intermediate = intermediate;
  }

  WeightView matrix(SharedFormat format, int64_t rows, int64_t cols, float sigma) {
    std::normal_distribution<float> normal(0.0f, sigma);
    std::vector<float>& values = floats_.emplace_back(static_cast<size_t>(rows * cols));
    for (float& value : values) value = normal(random_);
    const MatrixView<const float> view(values.data(), rows, cols);
    switch (format) {
      case SharedFormat::kNvfp4:
        return matrices_.emplace_back(quantize_nvfp4(view, nvfp4_global_scale(absolute_maximum(view))))
            .view();
      case SharedFormat::kFp8:
        return fp8_.emplace_back(quantize_fp8_tiles(view, TileScaleType::kF32)).view();
      case SharedFormat::kF32:
      case SharedFormat::kNone:
        return DenseView{
            ElementType::kF32, reinterpret_cast<const std::byte*>(values.data()), rows, cols, cols * 4, {}};
      case SharedFormat::kBf16:
      case SharedFormat::kF16: {
        // Any bits below 0x3C00 are a finite number of magnitude below 1 as f16.
        std::vector<uint16_t>& bits = halves_.emplace_back(values.size());
        for (size_t i = 0; i < bits.size(); ++i) {
          bits[i] = format == SharedFormat::kBf16
                        ? encode_bf16(values[i]).bits
                        : static_cast<uint16_t>(random_() % 0x3000 | (random_() & 0x8000));
        }
        return DenseView{format == SharedFormat::kBf16 ? ElementType::kBf16 : ElementType::kF16,
                         reinterpret_cast<const std::byte*>(bits.data()),
                         rows,
                         cols,
                         cols * 2,
                         {}};
      }
    }
    return DenseView{};
  }

  RandomLayer layer_;
  std::mt19937_64 random_;
  std::deque<std::vector<float>> floats_;
  std::deque<std::vector<uint16_t>> halves_;
  std::deque<BlockScaledMatrix> matrices_;
  std::deque<Fp8Matrix> fp8_;
};

class CpuLayers : public ForEveryIsa {
 protected:
  void SetUp() override {
    ForEveryIsa::SetUp();
    if (!IsSkipped()) backend_ = make_backend(kernels());
  }
  const Backend& backend() const { return *backend_; }

  /// No finding in the kernel: stages within one bf16 ulp an element, staging bit for bit, permutation equal
  /// (tools/layertest.cpp derives the limits).
  void expect_sound(TestLayer& layer, const LayerOptions& options) {
    LayertestRequest request;
    request.nvfp4 = &layer.weights();
    for (int64_t e = 0; e < layer.weights().count(); ++e) request.expert_ids.push_back(e);
    request.config = layer.config();
    request.options = options;
    request.backend = &backend();
    request.inputs = &layer.inputs();
    const LayertestReport report = run_layertest(request);
    ASSERT_EQ(report.kernel_stages.stages.size(), layer.shared() ? 7u : 4u) << report.kernel_stages.left_out;
    for (const std::string& finding : report.findings) {
      EXPECT_NE(finding.rfind("kernel", 0), 0u) << finding;  // others judge the made-up weights
    }
  }

  void expect_sound(const RandomLayerShape& shape, const LayerOptions& options, uint64_t salt) {
    TestLayer layer(shape, kSeed + salt);
    expect_sound(layer, shape, options, salt);
  }

  /// The same of a layer that is there: of `shape`, by seed kSeed + `salt`.
  void expect_sound(TestLayer& layer, const RandomLayerShape& shape, const LayerOptions& options,
                    uint64_t salt) {
    SCOPED_TRACE(testing::Message() << "T " << shape.tokens << ", H " << shape.hidden << ", I "
                                    << shape.intermediate << ", E " << shape.experts << ", top-"
                                    << shape.top_k << ", " << describe(shape.activation) << ", "
                                    << to_string(options.activations) << ", x " << to_string(options.x_scale)
                                    << ", intermediate " << to_string(options.intermediate_scale) << ", salt "
                                    << salt);
    expect_sound(layer, options);
  }

  LayerTrace run(TestLayer& layer, const LayerOptions& options) const {
    return trace(*backend().make_layer(layer.weights(), layer.config(), options), layer.inputs(),
                 layer.shared());
  }

 private:
  std::unique_ptr<Backend> backend_;
};

INSTANTIATE_TEST_SUITE_P(Isa, CpuLayers, testing::ValuesIn(kernel_cases()), name_of_case);

TEST_P(CpuLayers, AreSoundInEveryFormatAndScalePolicy) {
  uint64_t salt = 0;
  for (const ActivationFormat format : {ActivationFormat::kNvfp4, ActivationFormat::kNvfp4x2}) {
    for (const ScalePolicy x : kPolicies) {
      for (const ScalePolicy intermediate : kPolicies) {
        if (runs_here(++salt)) expect_sound({}, options_for(format, x, intermediate), salt);
      }
    }
  }
  expect_sound({}, options_for(ActivationFormat::kFp8), ++salt);
  expect_sound({}, options_for(ActivationFormat::kBf16), ++salt);
}

TEST_P(CpuLayers, AreSoundByEveryRuleOfBlockScales) {
  uint64_t salt = 50;
  for (const ScaleRule rule : {ScaleRule::kFourOverSix, ScaleRule::kMse}) {
    LayerOptions options = options_for(ActivationFormat::kNvfp4, kPolicies[salt % 4], kPolicies[salt % 3]);
    options.activation_rule = rule;
    expect_sound({}, options, ++salt);
    TestLayer layer({}, kSeed + salt, SharedFormat::kNvfp4);
    expect_sound(layer, options);
    TestLayer with_bf16({}, kSeed + salt, SharedFormat::kBf16);
    expect_sound(with_bf16, options);
    LayerOptions amax = options;
    amax.activation_rule = ScaleRule::kAmax;
    EXPECT_NE(run(layer, options).staged_x.scales, run(layer, amax).staged_x.scales);
  }
}

TEST_P(CpuLayers, AreSoundForEveryActivationWithAndWithoutBiases) {
  uint64_t salt = 100;
  for (const ActivationFunction& activation : kActivations) {
    for (const Biases biases : {Biases::kNone, Biases::kSome, Biases::kAll}) {
      RandomLayerShape shape;
      shape.activation = activation;
      shape.biases = biases;
      if (runs_here(++salt)) expect_sound(shape, options_for(kFormats[salt % 4]), salt);
    }
  }
}

TEST_P(CpuLayers, AreSoundForShapesOfEverySize) {
  const RandomLayerShape shapes[] = {
      {1, 16, 16, 1, 1},   {1, 64, 64, 8, 8},     {3, 48, 32, 300, 2},  {200, 48, 336, 2, 1},
      {5, 336, 720, 3, 2}, {129, 320, 80, 5, 2},  {300, 128, 64, 7, 2}, {64, 128, 192, 16, 4},
      {150, 64, 64, 1, 1}, {17, 144, 208, 40, 6}, {40, 2064, 32, 3, 3}, {40, 32, 1040, 3, 3},
  };
  uint64_t salt = 200, number = 0;
  for (const RandomLayerShape& shape : shapes) {
    ++salt;
    std::optional<TestLayer> layer;  // making it takes longer than running it in a format
    for (const ActivationFormat format : kFormats) {
      if (!runs_here(++number)) continue;
      if (!layer) layer.emplace(shape, kSeed + salt);
      expect_sound(*layer, shape, options_for(format), salt);
    }
  }
}

TEST_P(CpuLayers, AreSoundForEveryRouting) {
  uint64_t salt = 300;
  for (const Assignment assignment :
       {Assignment::kOneExpert, Assignment::kSomeAbsent, Assignment::kRepeated}) {
    for (const int64_t tokens : {1, 37, 150}) {
      if (tokens == 1 && assignment == Assignment::kSomeAbsent) continue;  // perhaps no row at all
      RandomLayerShape shape;
      shape.tokens = tokens;
      shape.assignment = assignment;
      shape.weight_on_input = tokens == 37;
      for (const ActivationFormat format : {ActivationFormat::kNvfp4, ActivationFormat::kBf16}) {
        if (runs_here(++salt)) expect_sound(shape, options_for(format), salt);
      }
    }
  }
}

TEST_P(CpuLayers, AreSoundForWeightsInEveryLayout) {
  uint64_t salt = 400;
  for (const ScaleLayout layout : {ScaleLayout::kRowMajor, ScaleLayout::kSwizzled128x4}) {
    for (const GlobalScaleKind kind : {GlobalScaleKind::kMultiplier, GlobalScaleKind::kDivisor}) {
      RandomLayerShape shape;
      shape.scale_layout = layout;
      shape.global_kind = kind;
      expect_sound(shape, options_for(ActivationFormat::kNvfp4), ++salt);
    }
  }
}

TEST_P(CpuLayers, AreSoundWithSharedExpertsInEveryFormat) {
  uint64_t salt = kSeed + 500;
  for (const SharedFormat format : {SharedFormat::kNvfp4, SharedFormat::kBf16, SharedFormat::kF32,
                                    SharedFormat::kF16, SharedFormat::kFp8}) {
    for (const ActivationFormat activations : {ActivationFormat::kNvfp4, ActivationFormat::kFp8}) {
      SCOPED_TRACE(testing::Message()
                   << "format " << static_cast<int>(format) << ", " << to_string(activations));
      ++salt;
      TestLayer layer({}, salt, format, salt % 2 ? 80 : 144, salt % 3 != 0);
      expect_sound(layer, options_for(activations, ScalePolicy::kDynamicToken, ScalePolicy::kDynamicTensor));
    }
  }
}

TEST_P(CpuLayers, GiveNothingForNoTokens) {
  RandomLayerShape shape;
  TestLayer layer(shape, kSeed);
  const auto made =
      backend().make_layer(layer.weights(), layer.config(), options_for(ActivationFormat::kNvfp4));
  const LayerPlan plan = made->plan(4);
  const AlignedWorkspace workspace(plan.workspace_bytes);
  std::vector<Bf16> y(1);
  Routing routing;
  routing.topk_ids = MatrixView<const int32_t>(nullptr, 0, shape.top_k);
  routing.topk_weights = {nullptr, 0, shape.top_k};
  made->forward(plan, {.x = {nullptr, 0, shape.hidden},
                       .routing = routing,
                       .y = MatrixView<Bf16>(y.data(), 0, shape.hidden),
                       .workspace = workspace.span()});
}

TEST_P(CpuLayers, GiveZerosForTokensWithoutAnExpert) {
  TestLayer layer({}, kSeed);
  std::fill(layer.inputs().topk_ids.begin(), layer.inputs().topk_ids.end(), -1);
  const LayerTrace found = run(layer, options_for(ActivationFormat::kNvfp4));
  EXPECT_EQ(found.rows, 0);
  for (const Bf16 value : found.y) EXPECT_EQ(value, Bf16{});
}

/// y of an untapped run.
std::vector<Bf16> run_untapped(const MoeLayer& layer, const LayerPlan& plan, const LayerInputs& inputs,
                               std::span<std::byte> workspace) {
  std::vector<Bf16> y(static_cast<size_t>(inputs.tokens * layer.config().hidden));
  layer.forward(plan, {.x = inputs.x_view(),
                       .routing = inputs.routing(),
                       .y = MatrixView<Bf16>(y.data(), inputs.tokens, layer.config().hidden),
                       .workspace = workspace});
  return y;
}

/// Two negative scales and two NaN, in different experts and matrices, in a first pair and one in the middle.
/// Holds what the layer's views then point at.
class IrregularScales {
 public:
  explicit IrregularScales(TestLayer& layer) {
    for (const auto& [expert, code] : {std::pair<size_t, uint8_t>{1, 0xB8}, {2, 0x7F}}) {
      auto& view = std::get<BlockScaledView>(expert == 1 ? layer.weights().experts[expert].up
                                                         : layer.weights().experts[expert].down);
      auto& own = scales_.emplace_back(view.scales, view.scales + view.rows * view.blocks_per_row());
      for (const int64_t row : {5, 37}) own[static_cast<size_t>(row * view.blocks_per_row() + 2)] = code;
      view.scales = own.data();
      view.scale_stride = view.blocks_per_row();
    }
  }

 private:
  std::deque<std::vector<uint8_t>> scales_;
};

// What nobody taps need not be staged: by the format, the scales of the weights, and where the routing weight
// goes.
TEST_P(CpuLayers, GiveTheSameWithAndWithoutTaps) {
  for (const ActivationFormat format : kFormats) {
    for (const bool irregular : {false, true}) {
      for (const bool weight_on_input : {false, true}) {
        const ScalePolicy policy = weight_on_input ? ScalePolicy::kStatic : ScalePolicy::kMaxOverExperts;
        SCOPED_TRACE(testing::Message() << to_string(format) << ", " << to_string(policy)
                                        << (irregular ? ", irregular scales" : "")
                                        << (weight_on_input ? ", weight on the input" : ""));
        RandomLayerShape shape;
        shape.weight_on_input = weight_on_input;
        TestLayer layer(shape, kSeed, SharedFormat::kNvfp4);
        std::optional<IrregularScales> scales;
        if (irregular) scales.emplace(layer);
        const auto made = backend().make_layer(layer.weights(), layer.config(), options_for(format, policy));
        const LayerPlan plan = made->plan(layer.inputs().tokens);
        const AlignedWorkspace workspace(plan.workspace_bytes);
        std::memset(workspace.span().data(), 0xFB, workspace.span().size());
        EXPECT_EQ(run_untapped(*made, plan, layer.inputs(), workspace.span()),
                  trace(*made, layer.inputs(), layer.shared()).y);
      }
    }
  }
}

TEST_P(CpuLayers, GiveTheSameOnEveryNumberOfThreads) {
  const int threads = omp_get_max_threads();
  for (const ActivationFormat format : kFormats) {
    // The first matrices are large enough to be cut, into pieces of unequal size.
    TestLayer layer({40, 208, 1360, 6, 3}, kSeed, SharedFormat::kBf16);
    const LayerOptions options =
        options_for(format, ScalePolicy::kDynamicTensor, ScalePolicy::kDynamicTensor);
    omp_set_num_threads(1);
    const LayerTrace one = run(layer, options);
    for (const int count : {2, 3, 8}) {
      omp_set_num_threads(count);
      const LayerTrace many = run(layer, options);
      EXPECT_EQ(many.h, one.h);
      EXPECT_EQ(many.z, one.z);
      EXPECT_EQ(many.y, one.y);
    }
    omp_set_num_threads(threads);
  }
}

TEST_P(CpuLayers, RunTwiceAtOnceWithSeparateWorkspaces) {
  TestLayer layer({64, 192, 112, 6, 3}, kSeed);
  const auto made =
      backend().make_layer(layer.weights(), layer.config(), options_for(ActivationFormat::kNvfp4));
  const LayerPlan plan = made->plan(layer.inputs().tokens);
  const AlignedWorkspace first(plan.workspace_bytes), second(plan.workspace_bytes);
  const std::vector<Bf16> expected = run_untapped(*made, plan, layer.inputs(), first.span());
  std::vector<Bf16> a, b;
  for (int trial = 0; trial < 5; ++trial) {
    std::thread other([&] { a = run_untapped(*made, plan, layer.inputs(), first.span()); });
    b = run_untapped(*made, plan, layer.inputs(), second.span());
    other.join();
    EXPECT_EQ(a, expected);
    EXPECT_EQ(b, expected);
  }
}

TEST_P(CpuLayers, AgreeWithTheReferenceOnIrregularScales) {
  for (const ActivationFormat format : kFormats) {
    TestLayer layer({}, kSeed);
    const IrregularScales scales(layer);
    expect_sound(layer, options_for(format));
    const LayerTrace found = run(layer, options_for(format));
    EXPECT_TRUE(std::any_of(found.z.begin(), found.z.end(),
                            [](Bf16 value) { return std::isnan(static_cast<float>(value)); }));
  }
}

TEST_P(CpuLayers, ShowNanAndInfinityOfX) {
  for (const ActivationFormat format : kFormats) {
    TestLayer layer({}, kSeed);
    layer.inputs().x[5] = encode_bf16(std::nanf(""));
    layer.inputs().x[static_cast<size_t>(3 * layer.config().hidden)] = encode_bf16(INFINITY);
    expect_sound(layer, options_for(format));
    const LayerTrace found = run(layer, options_for(format));
    for (const int64_t token : {0, 3}) {
      EXPECT_FALSE(std::isfinite(static_cast<float>(found.y[static_cast<size_t>(token * found.hidden)])));
    }
    EXPECT_TRUE(std::isfinite(static_cast<float>(found.y[static_cast<size_t>(found.hidden)])));
  }
}

TEST_P(CpuLayers, TakeNewWeightsInPlace) {
  RandomLayerShape shape;
  shape.biases = Biases::kSome;
  TestLayer before(shape, kSeed, SharedFormat::kFp8), after(shape, kSeed + 1, SharedFormat::kFp8);
  const LayerOptions options = options_for(ActivationFormat::kNvfp4);
  const auto made = backend().make_layer(before.weights(), before.config(), options);
  made->update_weights(after.weights());
  EXPECT_EQ(
      trace(*made, before.inputs(), before.shared()).y,
      trace(*backend().make_layer(after.weights(), after.config(), options), before.inputs(), after.shared())
          .y);
  TestLayer other({37, 192, 96, 6, 3}, kSeed);
  EXPECT_THROW(made->update_weights(other.weights()), Error);
  TestLayer dense(shape, kSeed, SharedFormat::kBf16);
  EXPECT_THROW(made->update_weights(dense.weights()), Error);
}

TEST_P(CpuLayers, RunExpertsOnStagedRows) {
  for (const ActivationFormat format : kFormats) {
    TestLayer layer({}, kSeed);
    const LayerOptions options = options_for(format);
    const auto made = backend().make_layer(layer.weights(), layer.config(), options);
    const LayerTrace forward = trace(*made, layer.inputs(), layer.shared());
    const LayerPlan plan = made->plan(layer.inputs().tokens);
    const AlignedWorkspace workspace(plan.workspace_bytes);
    std::vector<Bf16> z(forward.z.size());
    made->experts(plan, {.activations = forward.staged_x.views.view(format, forward.rows, forward.hidden),
                         .group_offsets = forward.permutation.group_offsets,
                         .z = {z.data(), forward.rows, forward.hidden},
                         .workspace = workspace.span()});
    EXPECT_EQ(z, forward.z);
  }
}

TEST_P(CpuLayers, MultiplyMatricesOfEveryKind) {
  GemmtestRequest request;
  request.backend = &backend();
  EXPECT_FALSE(run_gemmtest(request).has_finding());
}

// Two instruction sets compute the same real numbers: h of each is within a bf16 unit of the other's, 2^-7 of
// its magnitude at most, and where sums cancel within the float32 roundings of both, K * 2^-23 * sum of
// magnitudes, which for these layers is below 2^-10 of the largest h.
TEST_P(CpuLayers, AgreeWithThePortableOnes) {
  const auto portable = make_backend(kernels_of(Isa::kPortable));
  for (const ActivationFormat format : kFormats) {
    TestLayer layer({}, kSeed);
    const LayerOptions options = options_for(format);
    const LayerTrace expected = trace(*portable->make_layer(layer.weights(), layer.config(), options),
                                      layer.inputs(), layer.shared());
    const LayerTrace found = run(layer, options);
    float largest = 0.0f;
    for (const Bf16 value : expected.h) largest = std::max(largest, std::abs(static_cast<float>(value)));
    for (size_t i = 0; i < expected.h.size(); ++i) {
      const auto a = static_cast<float>(expected.h[i]), b = static_cast<float>(found.h[i]);
      ASSERT_NEAR(a, b, std::abs(a) * 0x1p-7f + largest * 0x1p-10f);
    }
    if (is_nvfp4(format) && kernels().multiply_tiles == nullptr) {
      EXPECT_EQ(found.h, expected.h);
      EXPECT_EQ(found.y, expected.y);
    }
  }
}

// ---- refusals and choices ----

TEST(CpuBackend, RefusesWhatItDoesNotCompute) {
  TestLayer layer({}, kSeed);
  LayerOptions options = options_for(ActivationFormat::kBf16);
  EXPECT_EQ(cpu_backend().why_unsupported(layer.weights(), layer.config(), options), "");
  options.accumulation = Accumulation::kFloat64;
  EXPECT_NE(cpu_backend().why_unsupported(layer.weights(), layer.config(), options), "");
  options = options_for(ActivationFormat::kBf16);
  const std::vector<float> values(static_cast<size_t>(layer.config().hidden * layer.config().intermediate));
  layer.weights().experts[1].up =
      DenseView{ElementType::kF32,           reinterpret_cast<const std::byte*>(values.data()),
                layer.config().intermediate, layer.config().hidden,
                layer.config().hidden * 4,   {}};
  const std::string reason = cpu_backend().why_unsupported(layer.weights(), layer.config(), options);
  EXPECT_NE(reason.find("experts.1 is f32"), std::string::npos) << reason;
  EXPECT_THROW(cpu_backend().make_layer(layer.weights(), layer.config(), options), Error);
}

/// Of those that compute in host memory, the first that takes the layer: a GPU comes before them where there
/// is one.
const Backend* first_on_host(TestLayer& layer) {
  for (const Backend* backend : backends()) {
    if (!backend->why_unavailable().empty() || &backend->memory() != &host_memory()) continue;
    if (backend->why_unsupported(layer.weights(), layer.config(), options_for(ActivationFormat::kBf16))
            .empty()) {
      return backend;
    }
  }
  return nullptr;
}

TEST(CpuBackend, IsTheDefaultOnTheHostForLayersThatItSupports) {
  TestLayer layer({}, kSeed);
  EXPECT_EQ(first_on_host(layer), &cpu_backend());
  const BackendChoice choice =
      choose_backend("", layer.weights(), layer.config(), options_for(ActivationFormat::kBf16));
  EXPECT_TRUE(choice.backend == &cpu_backend() || &choice.backend->memory() != &host_memory())
      << choice.backend->name() << ": " << choice.reason;
}

/// The name of the instruction set in a plan's kernel, with the reason.
std::string planned(const Backend& backend) {
  TestLayer layer({}, kSeed);
  const LayerPlan plan =
      backend.make_layer(layer.weights(), layer.config(), options_for(ActivationFormat::kNvfp4))->plan(1);
  return plan.kernel + " (" + plan.reason + ")";
}

TEST(CpuBackend, RunsTheForcedInstructionSetOrFailsNamingAll) {
  for (const Isa isa : isas()) {
    const std::string name(to_string(isa));
    if (why_not(isa).empty()) {
      force_cpu_isa(name);
      EXPECT_EQ(planned(cpu_backend()).rfind(name + ":", 0), 0u) << planned(cpu_backend());
      EXPECT_NE(planned(cpu_backend()).find("forced by --isa"), std::string::npos);
    } else {
      EXPECT_THROW(force_cpu_isa(name), Error);
    }
  }
  force_cpu_isa("");
  try {
    force_cpu_isa("avx1024");
    ADD_FAILURE() << "expected an error";
  } catch (const Error& error) {
    for (const Isa isa : isas()) {
      EXPECT_NE(std::string(error.what()).find(to_string(isa)), std::string::npos) << error.what();
    }
  }
}

TEST(CpuBackend, ListensToTheEnvironmentUnlessForced) {
  TestLayer layer({}, kSeed);
  const auto choose = [&](std::string_view forced) {
    return choose_backend(forced, layer.weights(), layer.config(), options_for(ActivationFormat::kBf16));
  };
  const bool gpu_first = &choose("").backend->memory() != &host_memory();
  setenv(kIsaVariable, "portable", 1);
  EXPECT_NE(planned(cpu_backend()).find("portable loops, int8 (forced by FOURFOLD_ISA)"), std::string::npos)
      << planned(cpu_backend());
  setenv(kIsaVariable, "mmx", 1);
  EXPECT_THROW(planned(cpu_backend()), Error);
  EXPECT_THROW(choose(gpu_first ? "cpu" : ""), Error);  // not passed over in silence
  unsetenv(kIsaVariable);
}

}  // namespace
}  // namespace fourfold::cpu
