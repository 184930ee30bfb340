// How layers on a GPU are called: captured, from several streams, with new weights, in parts, by halves.
#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>

#include "cuda/bench_device.h"
#include "cuda/expert_layer.h"
#include "cuda_support.h"
#include "fourfold/error.h"
#include "fourfold/reference.h"
#include "fourfold/scale_layout.h"
#include "random_layer.h"
#include "tested_backend.h"
#include "tools/layer_trace.h"
#include "tools/mirror.h"

namespace fourfold {
namespace {

const Memory& gpu() {
  return tested_backend().memory();
}

std::unique_ptr<MoeLayer> make(const RandomLayer& layer, const LayerOptions& options = {}) {
  return tested_backend().make_layer(layer.weights, layer.config, options);
}

/// Buffers for forward() at fixed addresses, whose contents can change between calls.
class Call {
 public:
  /// `late`: elements by which rows of x start after multiples of 16 bytes.
  Call(const MoeLayer& layer, int64_t max_tokens, int64_t late = 0)
      : layer_(layer),
        plan_(layer.plan(max_tokens)),
        workspace_(plan_.workspace_bytes, gpu()),
        late_(late),
        x_(elements(max_tokens, layer.config().hidden + late) + static_cast<size_t>(late)),
        ids_(elements(max_tokens, layer.config().top_k)),
        wide_ids_(elements(max_tokens, layer.config().top_k)),
        weights_(elements(max_tokens, layer.config().top_k)),
        y_(elements(max_tokens, layer.config().hidden)) {
    // What a workspace holds at the start must not matter.
    gpu().fill(workspace_.span().data(), kPoisonByte, workspace_.span().size());
  }

  void set(const LayerInputs& inputs) {
    tokens_ = inputs.tokens;
    std::vector<Bf16> x(static_cast<size_t>(late_));
    for (int64_t token = 0; token < tokens_; ++token) {
      x.insert(x.end(), inputs.x.begin() + token * inputs.hidden,
               inputs.x.begin() + (token + 1) * inputs.hidden);
      x.resize(x.size() + static_cast<size_t>(late_));
    }
    x_.set(x);
    ids_.set(inputs.topk_ids);
    wide_ids_.set({inputs.topk_ids.begin(), inputs.topk_ids.end()});
    weights_.set(inputs.topk_weights);
    gpu().synchronize();
  }

  size_t workspace_bytes() const { return plan_.workspace_bytes; }

  void enqueue(void* stream, const StageTaps& taps = {}, std::span<const int32_t> local_experts = {},
               bool wide_ids = false) const {
    enqueue_in(workspace_.span(), stream, taps, local_experts, wide_ids);
  }
  void enqueue_in(std::span<std::byte> workspace, void* stream, const StageTaps& taps,
                  std::span<const int32_t> local_experts, bool wide_ids) const {
    const LayerConfig& config = layer_.config();
    ForwardArgs args;
    args.x = x_.matrix(tokens_, config.hidden, config.hidden + late_);
    args.x.data += late_;
    args.routing.topk_ids = MatrixView<const int32_t>(ids_.matrix(tokens_, config.top_k));
    if (wide_ids) {
      args.routing.topk_ids = MatrixView<const int64_t>(wide_ids_.matrix(tokens_, config.top_k));
    }
    args.routing.topk_weights = weights_.matrix(tokens_, config.top_k);
    args.routing.local_experts = local_experts;
    args.y = y_.matrix(tokens_, config.hidden);
    args.workspace = workspace;
    args.stream = stream;
    args.taps = taps;
    layer_.forward(plan_, args);
  }

  std::vector<Bf16> y() const {
    std::vector<Bf16> y = y_.get();
    y.resize(static_cast<size_t>(tokens_ * layer_.config().hidden));
    return y;
  }

 private:
  static size_t elements(int64_t rows, int64_t cols) { return static_cast<size_t>(rows * cols); }

  const MoeLayer& layer_;
  LayerPlan plan_;
  AlignedWorkspace workspace_;
  int64_t tokens_ = 0, late_;
  DeviceArray<Bf16> x_;
  DeviceArray<int32_t> ids_;
  DeviceArray<int64_t> wide_ids_;
  DeviceArray<float> weights_;
  DeviceArray<Bf16> y_;
};

std::vector<Bf16> run(const MoeLayer& layer, const LayerInputs& inputs, int64_t max_tokens) {
  Call call(layer, max_tokens);
  call.set(inputs);
  call.enqueue(nullptr);
  return call.y();
}

/// The same number of tokens, other values and another routing; the later, the fewer experts get any.
LayerInputs other_inputs(const RandomLayer& layer, uint64_t number) {
  LayerInputs inputs = make_inputs(layer.inputs.tokens, layer.config.hidden, test_seed() + number, false);
  const int64_t hit = 1 + static_cast<int64_t>(number) % layer.config.experts;
  route_at_random(inputs, layer.config.experts, layer.config.top_k, test_seed() + number);
  for (int32_t& id : inputs.topk_ids) id = static_cast<int32_t>(id % hit) - (number % 5 == 0 && id % 3 == 0);
  return inputs;
}

LayerOptions with_format(ActivationFormat format, ScalePolicy policy) {
  LayerOptions options;
  options.activations = format;
  options.x_scale = options.intermediate_scale = policy;
  return options;
}

/// Every format that the backend takes.
std::vector<LayerOptions> options_of_formats() {
  std::vector<LayerOptions> list;
  for (const ActivationFormat format : tested_formats()) {
    list.push_back(with_format(
        format, format == ActivationFormat::kNvfp4x2 ? ScalePolicy::kDynamicTensor : ScalePolicy::kStatic));
  }
  return list;
}

TEST(GpuCalls, CapturedOnceGiveForEveryRoutingWhatEagerCallsGive) {
  for (const int64_t tokens : {3, 150}) {
    RandomLayerShape shape;
    shape.tokens = tokens;
    shape.shared_intermediate = 48;
    const RandomLayer layer(shape, test_seed());
    for (const LayerOptions& options : options_of_formats()) {
      const auto moe = make(layer, options);
      Call eager(*moe, tokens), captured(*moe, tokens);
      captured.set(layer.inputs);
      CapturedGraph graph([&](void* stream) { captured.enqueue(stream); });
      for (uint64_t number = 0; number < 50; ++number) {
        const LayerInputs inputs = other_inputs(layer, number);
        eager.set(inputs);
        eager.enqueue(nullptr);
        captured.set(inputs);
        graph.replay();
        ASSERT_EQ(eager.y(), captured.y()) << to_string(options.activations) << ", routing " << number;
      }
    }
  }
}

/// Kernels begin while those before them end, some of them with what they need not wait for: here each call
/// has other rows than the one before, whose kernels are just ending, in the same workspace, so that whoever
/// reads too early finds another call's, or writes into it. Every other one has ids of 64 bits. Some ids are
/// no expert's.
void expect_right_behind_each_other(int64_t most_tokens, int64_t late) {
  const RandomLayer layer(
      {.tokens = most_tokens, .hidden = 256, .intermediate = 128, .experts = 40, .top_k = 4}, test_seed());
  std::vector<LayerOptions> every_option = options_of_formats();
  for (const ScalePolicy policy : {ScalePolicy::kMaxOverExperts, ScalePolicy::kDynamicToken}) {
    every_option.push_back(with_format(ActivationFormat::kNvfp4, policy));
  }
  std::vector<int32_t> known(40);
  std::iota(known.begin(), known.end(), 0);
  known[3] = known[20] = -1;
  const DeviceArray<int32_t> local_experts(known);
  for (const LayerOptions& options : every_option) {
    const auto moe = make(layer, options);
    std::vector<std::unique_ptr<Call>> calls;
    std::vector<std::vector<Bf16>> alone;
    size_t workspace_bytes = 0;
    for (uint64_t number = 0; number < 12; ++number) {
      LayerInputs inputs = other_inputs(layer, 30 + number);
      inputs.tokens = most_tokens - static_cast<int64_t>(number) % 5;
      inputs.x.resize(static_cast<size_t>(inputs.tokens * inputs.hidden));
      inputs.topk_ids.resize(static_cast<size_t>(inputs.tokens * inputs.top_k));
      inputs.topk_weights.resize(static_cast<size_t>(inputs.tokens * inputs.top_k));
      calls.push_back(std::make_unique<Call>(*moe, inputs.tokens, late));
      workspace_bytes = std::max(workspace_bytes, calls.back()->workspace_bytes());
      if (number % 3 == 2) inputs.topk_ids[1] = number % 2 == 0 ? 40 : -2;
      calls.back()->set(inputs);
      for (int32_t& id : inputs.topk_ids) id = id < 0 || id >= 40 ? -1 : known[static_cast<size_t>(id)];
      alone.push_back(trace(*moe, inputs, nullptr, gpu()).y);
    }
    const AlignedWorkspace workspace(workspace_bytes, gpu());
    CapturedGraph graph([&](void* stream) {
      for (int repeat = 0; repeat < 5; ++repeat) {
        for (size_t i = 0; i < calls.size(); ++i) {
          calls[i]->enqueue_in(workspace.span(), stream, {}, local_experts.span(), i % 2 == 1);
        }
      }
    });
    for (int repeat = 0; repeat < 20; ++repeat) {
      graph.replay();
      for (size_t i = 0; i < calls.size(); ++i) {
        ASSERT_EQ(calls[i]->y(), alone[i])
            << to_string(options.activations) << ", " << to_string(options.x_scale) << ", call " << i << ", "
            << most_tokens << " tokens, " << late << " late";
      }
    }
  }
}

TEST(GpuCalls, RightBehindEachOtherGiveWhatEachGivesAlone) {
  for (const int64_t most_tokens : {5, 100}) {
    for (const int64_t late : {0, 3}) expect_right_behind_each_other(most_tokens, late);
  }
}

TEST(GpuCalls, RepeatToTheLastBit) {
  const RandomLayer layer({.tokens = 300}, test_seed());
  for (const LayerOptions& options : options_of_formats()) {
    const auto moe = make(layer, options);
    const std::vector<Bf16> first = run(*moe, layer.inputs, 300);
    for (int repeat = 0; repeat < 20; ++repeat) ASSERT_EQ(run(*moe, layer.inputs, 300), first);
  }
}

TEST(GpuCalls, DoNotDependOnWhatElseIsInTheBatch) {
  const RandomLayer layer({.tokens = 200}, test_seed());
  const auto moe = make(layer);
  const std::vector<Bf16> all = run(*moe, layer.inputs, 200);
  LayerInputs one = layer.inputs;
  one.tokens = 1;
  one.x.resize(static_cast<size_t>(one.hidden));
  one.topk_ids.resize(static_cast<size_t>(one.top_k));
  one.topk_weights.resize(static_cast<size_t>(one.top_k));
  const std::vector<Bf16> alone = run(*moe, one, 200);
  EXPECT_TRUE(std::equal(alone.begin(), alone.end(), all.begin()));
}

TEST(GpuCalls, FromTwoStreamsAtOnceGiveWhatOneGives) {
  const RandomLayer layer({.tokens = 120}, test_seed());
  const auto moe = make(layer);
  const LayerInputs inputs[2] = {other_inputs(layer, 1), other_inputs(layer, 2)};
  const std::vector<Bf16> expected[2] = {run(*moe, inputs[0], 120), run(*moe, inputs[1], 120)};
  const TestStream streams[2];
  Call calls[2] = {Call(*moe, 120), Call(*moe, 120)};
  for (int i = 0; i < 2; ++i) calls[i].set(inputs[i]);
  for (int repeat = 0; repeat < 20; ++repeat) {
    for (int i = 0; i < 2; ++i) calls[i].enqueue(streams[i].get());
  }
  for (int i = 0; i < 2; ++i) {
    streams[i].synchronize();
    EXPECT_EQ(calls[i].y(), expected[i]);
  }
}

TEST(GpuCalls, TappedGiveWhatUntappedGive) {
  // Untapped, the first GEMM quantizes its own output where the scale is known and
  // tokens are few. Every kernel of the table.
  for (const int64_t tokens : {2, 14, 50, 300}) {
    const RandomLayer layer({.tokens = tokens, .assignment = Assignment::kSomeAbsent}, test_seed());
    for (const ActivationFormat format : tested_formats()) {
      for (const ScalePolicy policy : {ScalePolicy::kStatic, ScalePolicy::kMaxOverExperts,
                                       ScalePolicy::kDynamicTensor, ScalePolicy::kDynamicToken}) {
        const auto moe = make(layer, with_format(format, policy));
        EXPECT_EQ(trace(*moe, layer.inputs, nullptr, gpu()).y, run(*moe, layer.inputs, tokens))
            << to_string(format) << ", " << to_string(policy) << ", " << tokens << " tokens";
      }
    }
  }
}

// So many experts that those with many more rows than the mean have kernels of their own.
TEST(GpuCalls, TappedGiveWhatUntappedGiveWithManyExperts) {
  for (const int64_t tokens : {900, 2200}) {
    RandomLayerShape shape{tokens, 272, 144, 700, 8};
    shape.assignment = Assignment::kOneAmongAll;
    const RandomLayer layer(shape, test_seed());
    for (const ActivationFormat format : tested_formats()) {
      for (const ScalePolicy policy : {ScalePolicy::kStatic, ScalePolicy::kMaxOverExperts}) {
        const auto moe = make(layer, with_format(format, policy));
        EXPECT_EQ(trace(*moe, layer.inputs, nullptr, gpu()).y, run(*moe, layer.inputs, tokens))
            << to_string(format) << ", " << to_string(policy) << ", " << tokens << " tokens";
      }
    }
  }
}

TEST(GpuCalls, MapTheModelsExpertsToThoseOfTheRank) {
  const RandomLayer layer({.tokens = 60}, test_seed());
  const auto moe = make(layer);
  LayerInputs model = layer.inputs;  // ids of a model of 18 experts, of which 6 to 11 are here
  for (int32_t& id : model.topk_ids) id += 6;
  LayerInputs rank = layer.inputs;
  for (size_t slot = 0; slot < rank.topk_ids.size(); slot += 4) {
    rank.topk_ids[slot] = -1;
    model.topk_ids[slot] = slot % 8 == 0 ? 2 : 17;
  }
  const DeviceArray<int32_t> map(local_expert_range(6, 6, 18));
  Call call(*moe, 60);
  call.set(model);
  call.enqueue(nullptr, {}, map.span());
  EXPECT_EQ(call.y(), run(*moe, rank, 60));
}

TEST(GpuCalls, GraphsSurviveNewWeights) {
  const RandomLayerShape shape{.biases = Biases::kSome, .shared_intermediate = 80, .shared_gate = true};
  const RandomLayer before(shape, test_seed()), after(shape, test_seed() + 1);
  const auto moe = make(before);
  Call captured(*moe, shape.tokens);
  captured.set(before.inputs);
  CapturedGraph graph([&](void* stream) { captured.enqueue(stream); });
  graph.replay();
  EXPECT_EQ(captured.y(), run(*make(before), before.inputs, shape.tokens));
  moe->update_weights(after.weights);
  graph.replay();
  EXPECT_EQ(captured.y(), run(*make(after), before.inputs, shape.tokens));
}

TEST(GpuCalls, RefuseNewWeightsOfAnotherShapeOrWithOtherBiases) {
  const RandomLayer layer({}, test_seed());
  const auto moe = make(layer);
  EXPECT_THROW(moe->update_weights(RandomLayer({.hidden = 208}, 1).weights), Error);
  EXPECT_THROW(moe->update_weights(RandomLayer({.shared_intermediate = 64}, 1).weights), Error);
  EXPECT_THROW(moe->update_weights(RandomLayer({.biases = Biases::kAll}, 1).weights), Error);
  EXPECT_THROW(moe->update_weights(RandomLayer({.scale_layout = ScaleLayout::kSwizzled128x4}, 1).weights),
               Error);
}

TEST(GpuCalls, TakeWeightsFromTheDevice) {
  const RandomLayer layer({.biases = Biases::kSome}, test_seed());
  Mirror mirror(gpu());
  ExpertWeights weights = layer.weights;
  for (Expert& expert : weights.experts) {
    for (WeightView* weight : {&expert.gate, &expert.up, &expert.down}) {
      auto& blocks = std::get<BlockScaledView>(*weight);
      blocks.codes = mirror.bring(blocks.codes);
      blocks.scales = mirror.bring(blocks.scales, static_cast<size_t>(blocks.rows * blocks.blocks_per_row()));
    }
    for (auto* bias : {&expert.gate_bias, &expert.up_bias, &expert.down_bias}) {
      if (!*bias) continue;
      (*bias)->data = mirror.bring((*bias)->data, static_cast<size_t>((*bias)->row_stride_bytes));
      (*bias)->device = gpu().device();
    }
  }
  const auto moe = tested_backend().make_layer(weights, layer.config, {});
  EXPECT_EQ(run(*moe, layer.inputs, 37), run(*make(layer), layer.inputs, 37));
}

// ---- more tokens than one part takes ----

/// Tokens [first, first + count) of `inputs`.
LayerInputs part_of(const LayerInputs& inputs, int64_t first, int64_t count) {
  const auto cut = [&](const auto& values, int64_t width) {
    using Values = std::remove_cvref_t<decltype(values)>;
    return Values(values.begin() + first * width, values.begin() + (first + count) * width);
  };
  LayerInputs part = inputs;
  part.tokens = count;
  part.x = cut(inputs.x, inputs.hidden);
  part.topk_ids = cut(inputs.topk_ids, inputs.top_k);
  part.topk_weights = cut(inputs.topk_weights, inputs.top_k);
  return part;
}

/// Of a call planned for `max_tokens`, as the kernels are chosen by the plan.
float largest_activation(const MoeLayer& layer, const LayerInputs& inputs, int64_t max_tokens) {
  const int64_t slots = inputs.tokens * inputs.top_k, intermediate = layer.config().intermediate;
  Call call(layer, max_tokens);
  const DeviceArray<Bf16> activation(std::vector<Bf16>(static_cast<size_t>(slots * intermediate)));
  call.set(inputs);
  StageTaps taps;
  taps.activation = activation.matrix(slots, intermediate);
  call.enqueue(nullptr, taps);
  const std::vector<Bf16> values = activation.get();
  return absolute_maximum(MatrixView<const Bf16>(values.data(), slots, intermediate));
}

TEST(GpuCalls, InPartsGiveWhatEachPartGivesWithTheScalesOfTheWhole) {
  // Two parts. The largest x, and so the scale of the whole tensor, is in the second.
  constexpr int64_t kTopK = 2, kPart = cuda::kMostRowsAtOnce / kTopK, kTokens = kPart + 7000;
  RandomLayer layer({kTokens, 64, 48, 5, kTopK}, test_seed());
  layer.inputs.x[static_cast<size_t>((kTokens - 7) * 64 + 3)] = encode_bf16(200.0f);
  const LayerInputs parts[] = {part_of(layer.inputs, 0, kPart),
                               part_of(layer.inputs, kPart, kTokens - kPart)};
  const auto dynamic = make(layer, with_format(ActivationFormat::kNvfp4, ScalePolicy::kDynamicTensor));
  const std::vector<Bf16> y = run(*dynamic, layer.inputs, kTokens);

  // The same scales by another way: given as the largest input scale over all experts.
  LayerOptions fixed = with_format(ActivationFormat::kNvfp4, ScalePolicy::kMaxOverExperts);
  fixed.x_max_scale = nvfp4_global_scale(200.0f);
  const auto measuring = make(layer, fixed);
  fixed.intermediate_max_scale = nvfp4_global_scale(std::max(
      largest_activation(*measuring, parts[0], kTokens), largest_activation(*measuring, parts[1], kTokens)));
  const auto scaled = make(layer, fixed);
  std::vector<Bf16> expected = run(*scaled, parts[0], kTokens);
  const std::vector<Bf16> second = run(*scaled, parts[1], kTokens);
  expected.insert(expected.end(), second.begin(), second.end());
  EXPECT_EQ(y, expected);
}

/// The tokens of `inputs` again and again.
LayerInputs repeated(const LayerInputs& inputs, int64_t tokens) {
  const auto repeat = [&](auto& values) {
    const size_t period = values.size();
    values.resize(period / static_cast<size_t>(inputs.tokens) * static_cast<size_t>(tokens));
    for (size_t i = period; i < values.size(); ++i) values[i] = values[i - period];
  };
  LayerInputs result = inputs;
  result.tokens = tokens;
  repeat(result.x);
  repeat(result.topk_ids);
  repeat(result.topk_weights);
  return result;
}

TEST(GpuCalls, OfMoreElementsThan32BitsCountGiveEveryTokenWhatItGetsElsewhere) {
  // One part, the largest that there is: its staged rows, and z, have more than 2^31 elements.
  constexpr int64_t kTopK = 8, kTokens = cuda::kMostRowsAtOnce / kTopK, kHidden = 16400, kDistinct = 100;
  static_assert(kTokens * kTopK * kHidden > int64_t{1} << 31);
  constexpr int64_t kNeededBytes = int64_t{24} << 30;
  if (cuda::free_memory_bytes() < kNeededBytes) GTEST_SKIP() << "needs 24 GB of a GPU's memory";
  const RandomLayer layer({kDistinct, kHidden, 16, 8, kTopK}, test_seed());
  const auto moe = make(layer, with_format(ActivationFormat::kNvfp4, ScalePolicy::kStatic));
  const std::vector<Bf16> expected = run(*moe, layer.inputs, kTokens);
  const std::vector<Bf16> y = run(*moe, repeated(layer.inputs, kTokens), kTokens);
  for (int64_t token = 0; token < kTokens; ++token) {
    const auto row = expected.begin() + token % kDistinct * kHidden;
    ASSERT_TRUE(std::equal(row, row + kHidden, y.begin() + token * kHidden)) << "token " << token;
  }
}

TEST(GpuCalls, RefuseTapsThatDoNotFitOnePart) {
  constexpr int64_t kTopK = 2;
  const RandomLayer layer({cuda::kMostRowsAtOnce / kTopK + 1, 16, 16, 2, kTopK}, test_seed());
  EXPECT_THROW(trace(*make(layer), layer.inputs, nullptr, gpu()), Error);
}

// ---- the expert half alone ----

/// Staged rows and group offsets of a tapped forward, handed to experts() in one of the layouts that callers
/// may bring.
class ExpertHalf {
 public:
  ExpertHalf(const RandomLayer& layer, const LayerOptions& options)
      : moe_(make(layer, options)), run_(trace(*moe_, layer.inputs, nullptr, gpu())) {}

  const LayerTrace& whole() const { return run_; }

  ActivationView staged(Mirror& mirror) {
    brought_ = mirror.bring(run_.staged_x.views);
    return brought_.view(moe_->options().activations, run_.rows, run_.hidden);
  }

  /// Scales of both terms as tensor cores want them, padding poisoned with NaN.
  ActivationView swizzled(Mirror& mirror) {
    ActivationView a = staged(mirror);
    a.scale_layout = ScaleLayout::kSwizzled128x4;
    a.scale_stride = 0;
    first_ = swizzle(run_.staged_x.views.scales);
    a.scales = mirror.bring(std::as_const(first_).data(), first_.size());
    if (run_.staged_x.views.residual_scales.empty()) return a;
    second_ = swizzle(run_.staged_x.views.residual_scales);
    a.residual_scales = mirror.bring(std::as_const(second_).data(), second_.size());
    return a;
  }

  /// z of experts(), its rows `offset` elements from an aligned address.
  std::vector<Bf16> z(Mirror& mirror, const ActivationView& a, int64_t offset) const {
    const int64_t stride = run_.hidden + offset;
    std::vector<Bf16> z(static_cast<size_t>(run_.rows * stride + offset), Bf16{0x7FFF});
    Bf16* device_z = mirror.bring(z.data(), z.size());
    const LayerPlan plan = moe_->plan(run_.tokens);
    const AlignedWorkspace workspace(plan.workspace_bytes, gpu());
    ExpertsArgs args;
    args.activations = a;
    args.group_offsets = mirror.bring(std::span(run_.permutation.group_offsets));
    args.z = {device_z + offset, run_.rows, run_.hidden, stride};
    args.workspace = workspace.span();
    moe_->experts(plan, args);
    mirror.fetch();
    std::vector<Bf16> dense;
    for (int64_t row = 0; row < run_.rows; ++row) {
      const auto begin = z.begin() + row * stride + offset;
      dense.insert(dense.end(), begin, begin + run_.hidden);
    }
    return dense;
  }

 private:
  std::vector<uint8_t> swizzle(const MatrixView<uint8_t>& scales) const {
    const std::vector<uint8_t> ones(static_cast<size_t>(scales.rows * scales.cols), 1);
    std::vector<uint8_t> swizzled = swizzle_scale_groups(scales, run_.permutation.group_offsets);
    const auto used =
        swizzle_scale_groups({ones.data(), scales.rows, scales.cols}, run_.permutation.group_offsets);
    for (size_t i = 0; i < used.size(); ++i) swizzled[i] = used[i] ? swizzled[i] : kE4m3NanCode;
    return swizzled;
  }

  std::unique_ptr<MoeLayer> moe_;
  LayerTrace run_;
  StagedActivations brought_;
  std::vector<uint8_t> first_, second_;
};

TEST(GpuCalls, OfTheExpertHalfGiveWhatTheWholeLayerGives) {
  const RandomLayer layer({.tokens = 90, .biases = Biases::kAll}, test_seed());
  for (const LayerOptions& options : options_of_formats()) {
    SCOPED_TRACE(to_string(options.activations));
    ExpertHalf half(layer, options);
    for (const int64_t offset : {0, 3}) {
      Mirror mirror(gpu());
      EXPECT_EQ(half.z(mirror, half.staged(mirror), offset), half.whole().z) << "offset " << offset;
      if (!is_nvfp4(options.activations)) continue;
      Mirror another(gpu());
      EXPECT_EQ(half.z(another, half.swizzled(another), offset), half.whole().z) << "swizzled";
    }
  }
}

/// experts() on rows staged by token, more of them than one part takes.
class ManyRows {
 public:
  static constexpr int64_t kRows = cuda::kMostRowsAtOnce + 4321, kHidden = 64, kIntermediate = 48;

  ManyRows() : layer_({1, kHidden, kIntermediate, 4, 1}, test_seed()), staged_(format(), kRows, kHidden) {
    Engine random = engine(700);
    const std::vector<Bf16> x = random_rows(random, kRows, kHidden, Values::kOrdinary);
    const MatrixView<const Bf16> rows(x.data(), kRows, kHidden);
    reference::activation_scales(ScalePolicy::kDynamicToken, rows, {}, {}, staged_.views.row_scales);
    reference::stage(format(), rows, staged_.views);
  }

  struct Result {
    std::vector<Bf16> z, activation;
  };

  /// Rows [first, first + count) under a plan for all of them.
  Result run(const LayerOptions& options, int64_t first, int64_t count) const {
    const auto moe = make(layer_, options);
    const LayerPlan plan = moe->plan(kRows);
    const AlignedWorkspace workspace(plan.workspace_bytes, gpu());
    std::vector<int32_t> offsets;
    for (const int64_t all : {int64_t{0}, kRows / 5, kRows / 5, kRows - 7, kRows}) {
      offsets.push_back(static_cast<int32_t>(std::clamp<int64_t>(all - first, 0, count)));
    }
    Result result{std::vector<Bf16>(static_cast<size_t>(count * kHidden)),
                  std::vector<Bf16>(static_cast<size_t>(count * kIntermediate))};
    Mirror mirror(gpu());
    const StagedActivations brought = mirror.bring(staged_.views);
    ExpertsArgs args;
    args.activations = brought.view(format(), kRows, kHidden);
    args.activations.rows = count;
    args.activations.codes = args.activations.codes.rows_from(first, count);
    args.activations.scales += first * args.activations.scale_stride;
    args.activations.row_scales =
        args.activations.row_scales.subspan(static_cast<size_t>(first), static_cast<size_t>(count));
    args.group_offsets = mirror.bring(std::span(std::as_const(offsets)));
    args.z = mirror.bring(MatrixView<Bf16>(result.z.data(), count, kHidden));
    args.taps.activation = mirror.bring(MatrixView<Bf16>(result.activation.data(), count, kIntermediate));
    args.workspace = workspace.span();
    moe->experts(plan, args);
    mirror.fetch();
    return result;
  }

 private:
  static constexpr ActivationFormat format() { return ActivationFormat::kNvfp4; }

  RandomLayer layer_;
  StagedBuffers staged_;
};

TEST(GpuCalls, OfTheExpertHalfInPartsGiveWhatEachPartGives) {
  const ManyRows many;
  const LayerOptions options = with_format(ActivationFormat::kNvfp4, ScalePolicy::kStatic);
  constexpr int64_t kFirst = 30000;
  std::vector<Bf16> expected = many.run(options, 0, kFirst).z;
  const std::vector<Bf16> second = many.run(options, kFirst, ManyRows::kRows - kFirst).z;
  expected.insert(expected.end(), second.begin(), second.end());
  EXPECT_EQ(many.run(options, 0, ManyRows::kRows).z, expected);
}

TEST(GpuCalls, OfTheExpertHalfInPartsScaleTheIntermediateAsAWhole) {
  const ManyRows many;
  const auto dynamic =
      many.run(with_format(ActivationFormat::kNvfp4, ScalePolicy::kDynamicTensor), 0, ManyRows::kRows);
  LayerOptions fixed = with_format(ActivationFormat::kNvfp4, ScalePolicy::kMaxOverExperts);
  fixed.intermediate_max_scale = nvfp4_global_scale(absolute_maximum(
      MatrixView<const Bf16>(dynamic.activation.data(), ManyRows::kRows, ManyRows::kIntermediate)));
  EXPECT_EQ(dynamic.z, many.run(fixed, 0, ManyRows::kRows).z);
}

}  // namespace
}  // namespace fourfold
