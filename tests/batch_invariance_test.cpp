// Batch invariance: a token's result does not depend on who is in its batch. Splitting a batch, reordering
// its tokens or renaming the experts changes no bit of any token's output. docs/formats.md, section 8, states
// it, and where it does not hold.
#include <gtest/gtest.h>

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "cpu/cpu_backend.h"
#include "cpu_support.h"
#include "fourfold/moe_layer.h"
#include "generated_cases.h"
#include "random_layer.h"
#include "tools/layer_trace.h"

namespace fourfold {
namespace {

constexpr ActivationFormat kFormats[] = {ActivationFormat::kNvfp4, ActivationFormat::kNvfp4x2,
                                         ActivationFormat::kFp8, ActivationFormat::kBf16};

/// The reference, or the backend "cpu" with one set of kernels.
struct BackendCase {
  std::string name;
  const cpu::Kernels* kernels = nullptr;  ///< null: the reference
  std::string why_not;
  /// Whether NVFP4 activations of experts with few rows take kernels that sum in another order: those with
  /// tiles do.
  bool rows_choose_the_nvfp4_kernel = false;
};
void PrintTo(const BackendCase& backend, std::ostream* out) {
  *out << backend.name;
}

std::vector<BackendCase> backend_cases() {
  std::vector<BackendCase> cases = {{"reference", nullptr, "", false}};
  for (const cpu::KernelCase& kernels : cpu::kernel_cases()) {
    cases.push_back({"cpu_" + kernels.name, kernels.kernels, kernels.why_not,
                     kernels.kernels->multiply_tiles != nullptr});
  }
  return cases;
}

/// A layer of generated shape; its shared expert, where it has one, in a generated format.
class GeneratedLayer {
 public:
  GeneratedLayer(Draw& draw, ActivationFormat format)
      : layer_(shape_of(draw), static_cast<uint64_t>(draw.integer(1, 1 << 30))) {
    if (layer_.weights.shared) store_shared_anew(draw);
    // dynamic-tensor is left out: its scale is the whole batch's by definition.
    constexpr ScalePolicy kPolicies[] = {ScalePolicy::kStatic, ScalePolicy::kMaxOverExperts,
                                         ScalePolicy::kDynamicToken};
    options_.activations = format;
    options_.x_scale = kPolicies[draw.integer(0, 2)];
    options_.intermediate_scale = kPolicies[draw.integer(0, 2)];
  }

  const LayerInputs& inputs() const { return layer_.inputs; }
  const ExpertWeights& weights() const { return layer_.weights; }
  const LayerConfig& config() const { return layer_.config; }
  const LayerOptions& options() const { return options_; }

 private:
  static RandomLayerShape shape_of(Draw& draw) {
    constexpr Assignment kAssignments[] = {Assignment::kUniform, Assignment::kOneExpert,
                                           Assignment::kSomeAbsent, Assignment::kRepeated};
    RandomLayerShape shape;
    // Kernels take 128 rows at once, and 256 or 512 k.
    shape.tokens = draw.chance(0.8) ? draw.integer(2, 20) : draw.integer(100, 270);
    shape.hidden = 16 * (draw.chance(0.8) ? draw.integer(1, 8) : draw.integer(16, 36));
    shape.intermediate = 16 * (draw.chance(0.8) ? draw.integer(1, 6) : draw.integer(16, 18));
    shape.experts = draw.integer(1, 5);
    shape.top_k = draw.integer(1, std::min<int64_t>(4, shape.experts));
    shape.biases = draw.chance(0.5) ? Biases::kSome : Biases::kNone;
    shape.assignment = kAssignments[draw.integer(0, shape.experts > 1 ? 3 : 2)];
    shape.weight_on_input = draw.chance(0.3);
    shape.shared_intermediate = draw.chance(0.5) ? 16 * draw.integer(1, 8) : 0;
    shape.shared_gate = draw.chance(0.5);
    return shape;
  }

  void store_shared_anew(Draw& draw) {
    Expert& expert = layer_.weights.shared->expert;
    const int64_t format = draw.integer(0, 3);
    for (WeightView* const weight : {&expert.gate, &expert.up, &expert.down}) {
      const int64_t rows = rows_of(*weight), cols = cols_of(*weight);
      const std::vector<float>& values = floats_.emplace_back(dequantize(*weight));
      if (format == 1) {
        *weight =
            fp8_.emplace_back(quantize_fp8_tiles({values.data(), rows, cols}, TileScaleType::kF32)).view();
      } else if (format == 2) {
        std::vector<Bf16>& bf16 = bf16_.emplace_back();
        for (const float value : values) bf16.push_back(encode_bf16(value));
        *weight = DenseView{
            ElementType::kBf16, reinterpret_cast<const std::byte*>(bf16.data()), rows, cols, cols * 2, {}};
      } else if (format == 3) {
        *weight = DenseView{
            ElementType::kF32, reinterpret_cast<const std::byte*>(values.data()), rows, cols, cols * 4, {}};
      }  // 0: NVFP4, as it is
    }
  }

  RandomLayer layer_;
  LayerOptions options_;
  std::deque<std::vector<float>> floats_;
  std::deque<std::vector<Bf16>> bf16_;
  std::deque<Fp8Matrix> fp8_;
};

/// The tokens of `inputs` with these numbers, in this order.
LayerInputs pick(const LayerInputs& inputs, std::span<const int64_t> tokens) {
  LayerInputs picked;
  picked.tokens = static_cast<int64_t>(tokens.size());
  picked.hidden = inputs.hidden;
  picked.top_k = inputs.top_k;
  for (const int64_t token : tokens) {
    const auto append = [token](auto& to, const auto& from, int64_t width) {
      to.insert(to.end(), from.begin() + token * width, from.begin() + (token + 1) * width);
    };
    append(picked.x, inputs.x, inputs.hidden);
    append(picked.topk_ids, inputs.topk_ids, inputs.top_k);
    append(picked.topk_weights, inputs.topk_weights, inputs.top_k);
  }
  return picked;
}

/// y before its rounding to bf16, which would hide differences.
std::vector<float> forward(const MoeLayer& layer, const LayerInputs& inputs) {
  const LayerPlan plan = layer.plan(inputs.tokens);
  const AlignedWorkspace workspace(plan.workspace_bytes);
  std::vector<float> y(static_cast<size_t>(inputs.tokens * inputs.hidden));
  layer.forward(plan, {.x = inputs.x_view(),
                       .routing = inputs.routing(),
                       .y = MatrixView<float>(y.data(), inputs.tokens, inputs.hidden),
                       .workspace = workspace.span()});
  return y;
}

class BatchInvariance : public testing::TestWithParam<BackendCase> {
 protected:
  void SetUp() override {
    if (!GetParam().why_not.empty()) GTEST_SKIP() << GetParam().name << ": " << GetParam().why_not;
    if (GetParam().kernels != nullptr) cpu_ = cpu::make_backend(*GetParam().kernels);
  }
  const Backend& backend() const { return cpu_ ? *cpu_ : reference_backend(); }
  std::unique_ptr<MoeLayer> make(const GeneratedLayer& layer) const {
    return backend().make_layer(layer.weights(), layer.config(), layer.options());
  }

  /// Runs `property(draw, layer)` on layers in every activation format, or those without NVFP4.
  template <class Property>
  static void for_generated_layers(const Property& property, bool with_nvfp4 = true) {
    for (const ActivationFormat format : kFormats) {
      if (!with_nvfp4 && is_nvfp4(format)) continue;
      SCOPED_TRACE(testing::Message() << to_string(format));
      for_generated_cases(16, [&](Draw& draw) {
        const GeneratedLayer layer(draw, format);
        property(draw, layer);
      });
    }
  }

 private:
  std::unique_ptr<Backend> cpu_;
};

std::string name_of_case(const testing::TestParamInfo<BackendCase>& backend) {
  return backend.param.name;
}
INSTANTIATE_TEST_SUITE_P(Backends, BatchInvariance, testing::ValuesIn(backend_cases()), name_of_case);

/// Where row `token` of `y` starts.
auto row_of(const std::vector<float>& y, int64_t token, int64_t hidden) {
  return std::span(y).subspan(static_cast<size_t>(token * hidden), static_cast<size_t>(hidden));
}

void expect_same_row(std::span<const float> expected, std::span<const float> found, int64_t token) {
  const auto bits = [](float a, float b) { return float_bits(a) == float_bits(b); };
  EXPECT_TRUE(std::ranges::equal(expected, found, bits)) << "token " << token;
}

TEST_P(BatchInvariance, SplittingABatchChangesNoToken) {
  const auto same_whole_or_in_parts = [this](Draw& draw, const GeneratedLayer& layer) {
    const auto made = make(layer);
    const LayerInputs& inputs = layer.inputs();
    const std::vector<float> whole = forward(*made, inputs);
    for (int64_t first = 0; first < inputs.tokens;) {
      const int64_t count = draw.chance(0.3) ? 1 : draw.integer(1, inputs.tokens - first);
      std::vector<int64_t> tokens(static_cast<size_t>(count));
      std::iota(tokens.begin(), tokens.end(), first);
      const std::vector<float> part = forward(*made, pick(inputs, tokens));
      for (int64_t i = 0; i < count; ++i) {
        expect_same_row(row_of(whole, first + i, inputs.hidden), row_of(part, i, inputs.hidden), first + i);
      }
      first += count;
    }
  };
  for_generated_layers(same_whole_or_in_parts, !GetParam().rows_choose_the_nvfp4_kernel);
}

TEST_P(BatchInvariance, ReorderingTokensReordersTheirResults) {
  for_generated_layers([this](Draw& draw, const GeneratedLayer& layer) {
    const auto made = make(layer);
    const LayerInputs& inputs = layer.inputs();
    const std::vector<int64_t> order = draw.order(inputs.tokens);
    const std::vector<float> before = forward(*made, inputs), after = forward(*made, pick(inputs, order));
    for (size_t i = 0; i < order.size(); ++i) {
      expect_same_row(row_of(before, order[i], inputs.hidden),
                      row_of(after, static_cast<int64_t>(i), inputs.hidden), order[i]);
    }
  });
}

TEST_P(BatchInvariance, RenamingExpertsChangesNothing) {
  for_generated_layers([this](Draw& draw, const GeneratedLayer& layer) {
    const std::vector<int64_t> order = draw.order(layer.config().experts);
    ExpertWeights renamed = layer.weights();
    std::vector<int32_t> name_of(order.size());
    for (size_t i = 0; i < order.size(); ++i) {
      renamed.experts[i] = layer.weights().experts[static_cast<size_t>(order[i])];
      name_of[static_cast<size_t>(order[i])] = static_cast<int32_t>(i);
    }
    LayerInputs inputs = layer.inputs();
    for (int32_t& id : inputs.topk_ids) id = id < 0 ? id : name_of[static_cast<size_t>(id)];
    const std::vector<float> before = forward(*make(layer), layer.inputs());
    const std::vector<float> after =
        forward(*backend().make_layer(renamed, layer.config(), layer.options()), inputs);
    for (int64_t token = 0; token < inputs.tokens; ++token) {
      expect_same_row(row_of(before, token, inputs.hidden), row_of(after, token, inputs.hidden), token);
    }
  });
}

}  // namespace
}  // namespace fourfold
