// Converting the experts of a checkpoint to another format: the plan of the model to be. docs/convert.md.
#pragma once

#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/model_writer.h"
#include "fourfold/checkpoint.h"
#include "fourfold/quantize.h"

namespace fourfold {

enum class TargetFormat : uint8_t { kNvfp4, kMxfp4, kBf16 };

std::string_view to_string(TargetFormat format);  ///< "nvfp4", "mxfp4" or "bf16"
std::optional<TargetFormat> parse_target_format(std::string_view name);

struct ConversionRequest {
  TargetFormat to = TargetFormat::kNvfp4;
  /// kModelOpt or kCompressedTensors: whose names and global scales; absent: the source's own, else
  /// ModelOpt's.
  std::optional<WeightScheme> scheme;
  ScaleRule scale = ScaleRule::kAmax;  ///< where values are quantized to NVFP4
  bool tie_gate_up = false;            ///< one global scale for gate and up of an expert
  bool allow_inexact = false;          ///< also where the cast of MXFP4 rounds
  bool dynamic_inputs = false;         ///< writes no input scales
  std::filesystem::path input_scales;  ///< a safetensors file that has them; empty: the source's are kept
  std::vector<int64_t> layers;         ///< ascending; empty: all that hold experts
  std::function<void(std::string_view)> progress = [](std::string_view) {};
};

/// What becomes of one layer.
struct LayerConversion {
  static constexpr int64_t kElsewhere = -1;  ///< linears of four bits that are no experts'
  int64_t layer = 0;
  std::string from;                     ///< scheme, as load_experts names it
  int64_t matrices = 0, unchanged = 0;  ///< of those, carried over with their codes
  std::optional<CastReport> cast;       ///< where MXFP4 becomes NVFP4
};

struct Conversion {
  ModelPlan plan;
  std::vector<LayerConversion> layers;
  std::vector<std::string> notes;  ///< what a user should know of the result
  std::deque<float> scalars;       ///< that the plan's tensors point to
  std::shared_ptr<const Checkpoint> source;
};

/// Plans the conversion of `source`, a model directory. Reads scales, and of values only what decides whether
/// the conversion is possible; writes nothing. The result points into itself: it is not to be copied. Throws
/// Error for everything that is known to be impossible: tensors that inspect objects to, layouts that nobody
/// reads, an inexact cast that was not allowed, nothing to convert. What only values tell, NaN among plain
/// weights, a task of the plan throws.
std::unique_ptr<Conversion> plan_conversion(std::shared_ptr<const Checkpoint> source,
                                            const ConversionRequest& request);

}  // namespace fourfold
