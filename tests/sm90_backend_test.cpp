// What the backend "sm90" refuses, and how; none of it needs a GPU.
#include <gtest/gtest.h>

#include <algorithm>

#include "fourfold/error.h"
#include "fourfold/moe_layer.h"
#include "random_layer.h"

namespace fourfold {
namespace {

std::string why_not(const RandomLayer& layer, const LayerOptions& options = {}) {
  return sm90_backend().why_unsupported(layer.weights, layer.config, options);
}

TEST(Sm90Backend, IsListedBeforeTheReference) {
  const auto list = backends();
  EXPECT_LT(std::find(list.begin(), list.end(), &sm90_backend()),
            std::find(list.begin(), list.end(), &cpu_backend()));
  EXPECT_EQ(list.back(), &reference_backend());
  EXPECT_EQ(&find_backend("sm90"), &sm90_backend());
}

TEST(Sm90Backend, SupportsNvfp4InEveryFormat) {
  const RandomLayer layer({}, 1);
  for (const ActivationFormat format : {ActivationFormat::kNvfp4, ActivationFormat::kNvfp4x2,
                                        ActivationFormat::kFp8, ActivationFormat::kBf16}) {
    LayerOptions options;
    options.activations = format;
    EXPECT_EQ(why_not(layer, options), "");
  }
}

TEST(Sm90Backend, NamesTheTensorThatIsNotNvfp4) {
  RandomLayer layer({}, 1);
  const std::vector<Bf16> dense(static_cast<size_t>(layer.weights.hidden * layer.weights.intermediate));
  layer.weights.experts[3].down = DenseView{ElementType::kBf16,
                                            reinterpret_cast<const std::byte*>(dense.data()),
                                            layer.weights.hidden,
                                            layer.weights.intermediate,
                                            2 * layer.weights.intermediate,
                                            {}};
  EXPECT_NE(why_not(layer).find("experts.3 down is bf16"), std::string::npos) << why_not(layer);
  std::get<BlockScaledView>(layer.weights.experts[1].up).format = QuantFormat::kMxfp4;
  EXPECT_NE(why_not(layer).find("experts.1 up is mxfp4"), std::string::npos) << why_not(layer);
}

TEST(Sm90Backend, NamesASharedExpertThatIsNotNvfp4) {
  RandomLayer layer({.shared_intermediate = 64}, 1);
  EXPECT_EQ(why_not(layer), "");
  std::get<BlockScaledView>(layer.weights.shared->expert.down).format = QuantFormat::kMxfp4;
  EXPECT_NE(why_not(layer).find("shared_expert down is mxfp4"), std::string::npos) << why_not(layer);
}

TEST(Sm90Backend, LeavesToTheReferenceWhatIsTheReferences) {
  const RandomLayer layer({}, 1);
  LayerOptions options;
  options.accumulation = Accumulation::kFloat64;
  EXPECT_NE(why_not(layer, options).find("float64"), std::string::npos);
  options = {};
  options.dequantize_weights = true;
  EXPECT_NE(why_not(layer, options).find("dequantized"), std::string::npos);
  options = {};
  options.activation_rule = ScaleRule::kFourOverSix;
  EXPECT_NE(why_not(layer, options).find("amax, not four-over-six"), std::string::npos);
}

TEST(Sm90Backend, SaysWhatItNeedsWhereItCantRun) {
  const std::string reason = sm90_backend().why_unavailable();
  if (reason.empty()) GTEST_SKIP() << "this machine has a Hopper GPU";
  const RandomLayer layer({}, 1);
  try {
    sm90_backend().make_layer(layer.weights, layer.config, {});
    FAIL() << "made a layer";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
    EXPECT_NE(std::string(error.what()).find(reason), std::string::npos) << error.what();
  }
  EXPECT_NE(choose_backend("").backend, &sm90_backend());
  EXPECT_NE(choose_backend("").reason.find("sm90: " + reason), std::string::npos);
}

}  // namespace
}  // namespace fourfold
