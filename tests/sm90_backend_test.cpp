// What the backend "sm90" refuses, and how; none of it needs a GPU.
#include <gtest/gtest.h>

#include <algorithm>

#include "fourfold/error.h"
#include "fourfold/moe_layer.h"
#include "random_layer.h"
#include "sm90/expert_gemm.h"

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

/// The two GEMMs of a layer, which launch_expert_gemms takes but for a GPU: addresses are only compared.
struct GemmPair {
  alignas(256) std::byte memory[4096];
  sm90::ExpertGemm first, second;

  template <class T>
  T* at(size_t offset) {
    return reinterpret_cast<T*>(memory + offset);
  }

  GemmPair() {
    constexpr int64_t kRows = 40, kHidden = 64, kIntermediate = 128;
    for (sm90::ExpertGemm* gemm : {&first, &second}) {
      gemm->experts = 4;
      gemm->max_rows = kRows;
      gemm->group_offsets = at<int32_t>(0);
      gemm->packed = at<std::byte>(256);
      gemm->weight_globals = at<float>(512);
    }
    first.tokens[0] = {at<Bf16>(768), kRows, kHidden};
    first.weights = {sm90::RowOrder::kGateUpPaired, kIntermediate, kHidden};
    first.activation = ActivationFunction{};
    first.d = MatrixView<Bf16>(at<Bf16>(1024), kRows, kIntermediate);
    second.tokens[0] = {at<Bf16>(1024), kRows, kIntermediate};
    second.weights = {sm90::RowOrder::kPlain, kHidden, kIntermediate};
    second.d = MatrixView<Bf16>(at<Bf16>(1280), kRows, kHidden);
  }

  std::string error() {
    try {
      sm90::launch_expert_gemms(first, second, at<int32_t>(16), nullptr);
    } catch (const Error& error) {
      return error.code() == ErrorCode::kInvalidArgument ? error.what() : "";  // no GPU: the arguments fit
    }
    return "";
  }
};

TEST(Sm90ExpertGemms, AreRefusedWhereTheSecondDoesNotReadWhatTheFirstWrites) {
  const auto error_with = [](const auto& change) {
    GemmPair pair;
    change(pair);
    return pair.error();
  };
  const auto has = [](const std::string& error, const std::string& part) {
    return error.find(part) != std::string::npos ? "" : "expected '" + part + "' in '" + error + "'";
  };
  EXPECT_EQ(has(error_with([](GemmPair& p) { p.second.experts = 5; }),
                "experts and max_rows of the second: expected the first's, 4 and 40, found 5 and 40"),
            "");
  EXPECT_EQ(has(error_with([](GemmPair& p) {
                  p.first.activation->limit = 1.7f;  // a kernel of its own activates h
                  p.first.h = {p.at<Bf16>(2048), 40, 256};
                }),
                "activation of the first: expected SwiGLU with a limit that bf16 holds"),
            "");
  EXPECT_EQ(has(error_with([](GemmPair& p) {
                  p.second.weights.order = sm90::RowOrder::kGateUpPaired;
                  p.second.activation = ActivationFunction{};
                }),
                "activation of the second: expected none"),
            "");
  EXPECT_EQ(has(error_with([](GemmPair& p) { p.second.tokens[0].data += 8; }), "tokens of the second"), "");
  EXPECT_EQ(has(error_with([](GemmPair& p) { p.second.tokens[0].stride = 256; }), "stride 256"), "");
  EXPECT_EQ(has(error_with([](GemmPair& p) { p.second.tokens[1] = p.second.tokens[0]; }), "second term"), "");
  EXPECT_EQ(has(error_with([](GemmPair& p) { p.second.row_scales = p.at<float>(2048); }), "row_scales"), "");
  EXPECT_EQ(has(error_with([](GemmPair& p) {
                  p.first.requantize.row_scales = p.at<float>(2048);
                  p.second.row_scales = p.at<float>(2048);
                }),
                "row_scales"),
            "");  // the first does not quantize, and writes none
  EXPECT_EQ(has(error_with([](GemmPair& p) {
                  p.first.requantize = {p.at<float>(2048), {}, p.at<float>(2304)};
                }),
                "row_scales"),
            "");  // it does, and the second does not read them
}

}  // namespace
}  // namespace fourfold
