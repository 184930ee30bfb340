// Which backend the tests of layers on GPUs run: gpu_layer_test.cpp and gpu_calls_test.cpp are built once for
// each.
#pragma once

#include <vector>

#include "fourfold/moe_layer.h"

namespace fourfold {

const Backend& tested_backend();

/// The activation formats that it takes, nvfp4 among them.
inline std::vector<ActivationFormat> tested_formats() {
  const bool fp4_alone = tested_backend().name() == "blackwell";
  if (fp4_alone) return {ActivationFormat::kNvfp4, ActivationFormat::kNvfp4x2};
  return {ActivationFormat::kNvfp4, ActivationFormat::kNvfp4x2, ActivationFormat::kFp8,
          ActivationFormat::kBf16};
}

}  // namespace fourfold
