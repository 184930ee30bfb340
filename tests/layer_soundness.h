// A random layer on the tested backend, stage by stage against the reference.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <set>
#include <string>

#include "cuda_support.h"
#include "random_layer.h"
#include "tested_backend.h"
#include "tools/layertest.h"

namespace fourfold {

inline LayerOptions options_for(ActivationFormat format, ScalePolicy x = ScalePolicy::kStatic,
                                ScalePolicy intermediate = ScalePolicy::kStatic) {
  LayerOptions options;
  options.activations = format;
  options.x_scale = x;
  options.intermediate_scale = intermediate;
  return options;
}

/// No finding in the kernel: stages within one bf16 ulp an element, staging bit for bit, permutation equal
/// (tools/layertest.cpp derives the limits).
inline void expect_sound(const RandomLayerShape& shape, const LayerOptions& options, uint64_t salt) {
  const RandomLayer layer(shape, test_seed() + salt);
  SCOPED_TRACE(testing::Message() << "T " << shape.tokens << ", H " << shape.hidden << ", I "
                                  << shape.intermediate << ", E " << shape.experts << ", top-" << shape.top_k
                                  << ", " << describe(shape.activation) << ", "
                                  << to_string(options.activations) << ", x " << to_string(options.x_scale)
                                  << ", intermediate " << to_string(options.intermediate_scale) << ", biases "
                                  << static_cast<int>(shape.biases) << ", assignment "
                                  << static_cast<int>(shape.assignment) << ", salt " << salt);
  LayertestRequest request;
  request.nvfp4 = &layer.weights;
  for (int64_t e = 0; e < shape.experts; ++e) request.expert_ids.push_back(e);
  request.config = layer.config;
  request.options = options;
  request.backend = &tested_backend();
  request.inputs = &layer.inputs;
  const LayertestReport report = run_layertest(request);
  if (static std::set<std::string> seen; seen.insert(report.kernel).second) {
    std::printf("path: %s\n", report.kernel.c_str());  // which kernels the tests reached
  }
  // h, activation, z, y; of the shared expert h, activation and z.
  const size_t stages = shape.shared_intermediate > 0 ? 7 : 4;
  ASSERT_EQ(report.kernel_stages.stages.size(), stages) << report.kernel_stages.left_out;
  for (const StageReport& stage : report.kernel_stages.stages) {
    EXPECT_TRUE(std::isfinite(stage.rel_l2)) << kStageNames[static_cast<size_t>(stage.stage)];
  }
  for (const std::string& finding : report.findings) {
    EXPECT_NE(finding.rfind("kernel", 0), 0u) << finding;  // others judge the made-up weights
  }
}

}  // namespace fourfold
