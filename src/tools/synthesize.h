// Making checkpoints: an original and its NVFP4 conversion, in the layouts of real models.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>

#include "fourfold/quantize.h"

namespace fourfold {

enum class OriginalFormat : uint8_t {
  kMxfp4,  ///< converted by the exact cast
  kBf16,   ///< converted by ModelOpt's rule
  kFp8,    ///< a scale a tile of 128 x 128; converted by ModelOpt's rule
};

enum class WeightProfile : uint8_t {
  kGaussian,   ///< N(0, sigma) weights, N(0, 1) inputs: the profile that published cosines are about
  kRealistic,  ///< Student's t weights, rows of different size; inputs with outlier channels and heavy tails
};

struct SynthesizeRequest {
  std::filesystem::path directory;
  int64_t experts = 0, hidden = 0, intermediate = 0, top_k = 0, layers = 1;
  std::string family = "deepseek-v4";  ///< whose names and config; see synthetic_layout.cpp
  /// With everything that the family's MoE layers have beside a router and experts: shared expert,
  /// hash-routed layers, and inputs that its router routes (x and token_ids alone).
  bool whole_family = false;
  OriginalFormat original = OriginalFormat::kMxfp4;
  WeightProfile profile = WeightProfile::kRealistic;
  uint64_t seed = 0;
  int64_t tokens = 64;  ///< in inputs.safetensors; calibration of input_scale uses these and more
  bool force = false;   ///< replace what is there
  std::function<void(std::string_view)> progress = [](std::string_view) {};
};

struct SynthesizeResult {
  int64_t original_bytes = 0, nvfp4_bytes = 0;
  CastReport cast;  ///< MXFP4 originals alone
};

/// Writes `directory`/original, /nvfp4 and /inputs.safetensors; each appears whole or not at all. Throws
/// Error for shapes that do not fit the formats, for existing output without `force`, and when the disk is
/// too small.
SynthesizeResult synthesize(const SynthesizeRequest& request);

}  // namespace fourfold
