// The backend "blackwell" without a GPU: what it refuses and how, which kernels are compiled in, and which
// shapes they take.
#include <gtest/gtest.h>

#include <algorithm>

#include "bench/shapes.h"
#include "blackwell/activation_support.h"
#include "blackwell/block_weights.h"
#include "blackwell/grouped_gemm.h"
#include "fourfold/error.h"
#include "fourfold/moe_layer.h"
#include "random_layer.h"

namespace fourfold {
namespace {

using blackwell::BlockShape;
using blackwell::GemmKernel;
using blackwell::GemmKernels;

constexpr int kMultiprocessors[] = {48, 148, 170, 188};

std::string why_not(const RandomLayer& layer, ActivationFormat format) {
  LayerOptions options;
  options.activations = format;
  return blackwell_backend().why_unsupported(layer.weights, layer.config, options);
}

TEST(BlackwellBackend, IsPreferredToTheOthers) {
  EXPECT_EQ(backends().front(), &blackwell_backend());
  EXPECT_EQ(&find_backend("blackwell"), &blackwell_backend());
}

TEST(BlackwellBackend, HasTheKernelsThatTheBuildNames) {
  std::string found;
  for (const GemmKernels& kernels : blackwell::compiled_kernels()) {
    found += (found.empty() ? "" : ",") + std::string(kernels.architecture.substr(3));
    EXPECT_EQ(blackwell::kernels_of(kernels.major, kernels.minor), &kernels);
    EXPECT_NE(kernels.instruction.find("kind::mxf4nvf4.block_scale"), std::string_view::npos);
  }
  EXPECT_EQ(found, FOURFOLD_BLACKWELL_ARCHITECTURES);
  EXPECT_EQ(blackwell::kernels_of(9, 0), nullptr);
}

TEST(BlackwellBackend, RunsCodeOfAFamilyOnItsLaterMembersAlone) {
  const GemmKernels family{{}, "sm_120f", 12, 0, ""};
  EXPECT_TRUE(family.runs_on(12, 0) && family.runs_on(12, 1));
  EXPECT_FALSE(family.runs_on(11, 0) || family.runs_on(13, 0) || family.runs_on(10, 1));
  EXPECT_EQ(family.capability(), "12.0 and later of 12");
  const GemmKernels chip{{}, "sm_103a", 10, 3, ""};
  EXPECT_TRUE(chip.runs_on(10, 3));
  EXPECT_FALSE(chip.runs_on(10, 0) || chip.runs_on(10, 4));
  EXPECT_EQ(chip.capability(), "10.3");
}

TEST(BlackwellBackend, RefusesActivationsThatAreNotFp4) {
  const RandomLayer layer({}, 1);
  EXPECT_EQ(why_not(layer, ActivationFormat::kNvfp4), "");
  EXPECT_EQ(why_not(layer, ActivationFormat::kNvfp4x2), "");
  for (const ActivationFormat format : {ActivationFormat::kFp8, ActivationFormat::kBf16}) {
    const std::string reason = why_not(layer, format);
    EXPECT_EQ(reason.rfind(std::string(to_string(format)) + " activations", 0), 0u) << reason;
    EXPECT_NE(reason.find("nvfp4x2"), std::string::npos) << reason;
  }
}

TEST(BlackwellBackend, RefusesOtherRulesOfBlockScales) {
  const RandomLayer layer({}, 1);
  LayerOptions options;
  options.activation_rule = ScaleRule::kMse;
  const std::string reason = blackwell_backend().why_unsupported(layer.weights, layer.config, options);
  EXPECT_NE(reason.find("amax, not mse"), std::string::npos) << reason;
}

TEST(BlackwellBackend, NamesTheTensorThatIsNotNvfp4) {
  RandomLayer layer({}, 1);
  std::get<BlockScaledView>(layer.weights.experts[1].up).format = QuantFormat::kMxfp4;
  const std::string reason = why_not(layer, ActivationFormat::kNvfp4);
  EXPECT_NE(reason.find("experts.1 up is mxfp4: blackwell multiplies NVFP4"), std::string::npos) << reason;
}

TEST(BlackwellBackend, SaysWhatItNeedsWhereItCantRun) {
  const std::string reason = blackwell_backend().why_unavailable();
  if (reason.empty()) GTEST_SKIP() << "this machine has a Blackwell GPU";
  const RandomLayer layer({}, 1);
  try {
    blackwell_backend().make_layer(layer.weights, layer.config, {});
    FAIL() << "made a layer";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
    EXPECT_NE(std::string(error.what()).find(reason), std::string::npos) << error.what();
  }
  EXPECT_NE(choose_backend("").reason.find("passed over blackwell: " + reason), std::string::npos);
}

/// All kernels: what they have to take, and their workspace on GPUs of several sizes.
template <class Check>
void for_each_kernel(const Check& check) {
  for (const GemmKernels& kernels : blackwell::compiled_kernels()) {
    for (const GemmKernel* kernel : {&kernels.to_bf16, &kernels.to_float32}) {
      SCOPED_TRACE(testing::Message()
                   << kernels.architecture << (kernel == &kernels.to_bf16 ? " bf16" : " float32"));
      check(*kernel);
    }
  }
}

TEST(BlackwellKernels, TakeTheShapesOfEveryModel) {
  for_each_kernel([](const GemmKernel& kernel) {
    for (const ModelShape& shape : kModelShapes) {
      for (const auto& [rows, depth] :
           {std::pair(shape.intermediate, shape.hidden), {shape.hidden, shape.intermediate}}) {
        const BlockShape matrix{rows, depth};
        for (const int64_t m : {1, 7, 128, 4097}) {
          EXPECT_TRUE(kernel.can_multiply(m, matrix.padded_rows(), matrix.padded_depth()))
              << shape.name << " " << m << "x" << rows << "x" << depth;
        }
      }
    }
  });
}

TEST(BlackwellKernels, TakeEverythingThatIsPadded) {
  for_each_kernel([](const GemmKernel& kernel) {
    for (int64_t rows = 1; rows < 300; rows += 13) {
      for (int64_t depth = 16; depth < 400; depth += 48) {
        const BlockShape matrix{rows, depth};
        EXPECT_TRUE(kernel.can_multiply(3, matrix.padded_rows(), matrix.padded_depth()))
            << rows << "x" << depth;
      }
    }
    EXPECT_FALSE(kernel.can_multiply(3, 128, 48)) << "K must be a multiple of 32: is padding needed at all?";
  });
}

TEST(BlackwellKernels, NeedTensorMapsForEveryMultiprocessor) {
  constexpr size_t kTensorMap = 128;
  for_each_kernel([](const GemmKernel& kernel) {
    for (const ModelShape& shape : kModelShapes) {
      const auto groups = static_cast<int32_t>(2 * shape.experts);
      for (const int multiprocessors : kMultiprocessors) {
        const size_t bytes = kernel.workspace_bytes(groups, multiprocessors);
        EXPECT_GE(bytes, 4 * kTensorMap * static_cast<size_t>(multiprocessors))
            << shape.name;  // a, b and their scales
        EXPECT_LE(bytes, size_t{1} << 20) << shape.name;
      }
    }
  });
}

TEST(BlackwellKernels, FitTheSharedMemoryOfTheirGpus) {
  for (const GemmKernels& kernels : blackwell::compiled_kernels()) {
    const int most = kernels.major == 12 ? 99 * 1024 : 227 * 1024;  // a block's, CUDA programming guide
    for (const GemmKernel* kernel : {&kernels.to_bf16, &kernels.to_float32}) {
      EXPECT_LE(kernel->shared_bytes, most) << kernels.architecture;
      EXPECT_GE(kernel->stages, 2) << kernels.architecture;
    }
  }
}

TEST(BlackwellWeights, ArePaddedToWhatKernelsTake) {
  const BlockShape shape{130, 48};
  EXPECT_EQ(shape.padded_rows(), 136);
  EXPECT_EQ(shape.padded_depth(), 64);
  EXPECT_EQ(shape.code_bytes(), 136 * 32);
  EXPECT_EQ(shape.scale_bytes(), 256 * 4);
  EXPECT_EQ(blackwell::expert_bytes(shape, 2) % 256, 0);
  EXPECT_GE(blackwell::expert_bytes(shape, 2), 2 * (shape.code_bytes() + shape.scale_bytes()));
}

}  // namespace
}  // namespace fourfold
