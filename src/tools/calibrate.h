// Calibration of input scales: activations through the layers of a checkpoint, and what its experts saw.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "fourfold/checkpoint.h"
#include "fourfold/model_family.h"
#include "tools/calibration.h"

namespace fourfold {

/// What to do about an expert that no token reached, and about one whose rows are all zero.
enum class UnreachedPolicy : uint8_t {
  kMax,    ///< the largest amax among the layer's experts
  kSkip,   ///< no scale
  kError,  ///< an Error that names them
};

struct CalibrateRequest {
  std::filesystem::path model;
  std::vector<std::filesystem::path> inputs;  ///< InputFile; they add up
  std::vector<int64_t> layers;                ///< ascending; empty: all that the inputs are of
  RuleOverrides overrides;
  std::optional<GateUpOrder> gate_up_order;
  std::optional<WeightScheme> scheme;
  std::string backend;  ///< name; empty: the best that can run the layer with bf16 activations
  UnreachedPolicy unreached = UnreachedPolicy::kMax;
  std::function<void(std::string_view)> progress = [](std::string_view) {};
};

struct LayerCalibration {
  int64_t layer = 0;
  int64_t tokens = 0;
  std::string naming;   ///< of its experts
  std::string backend;  ///< and why that one, and its kernel
  std::vector<ExpertAmax> experts;
  std::optional<ExpertAmax> shared;
  std::vector<int64_t> unreached;  ///< experts without rows
  std::vector<int64_t> zero;       ///< experts with rows, and nothing but zeros in x or in the intermediate
};

/// The amax of the input of every linear, by its name, e.g. "model.layers.3.mlp.experts.17.gate_proj". Always
/// positive and finite. Linears of fused tensors are named as if they were stored one by one.
using InputAmax = std::map<std::string, float>;

struct CalibrateResult {
  std::vector<LayerCalibration> layers;
  std::vector<std::string> notes;
  InputAmax amax;
};

/// Throws Error for inputs and checkpoints that can't be read or do not fit each other; for a layer without
/// inputs, and inputs of no layer; where x is zero throughout, or an expert's intermediate is not finite; and
/// by the policy.
CalibrateResult calibrate(const std::shared_ptr<const Checkpoint>& checkpoint,
                          const CalibrateRequest& request);

/// Writes `<linear>.input_scale`, F32 [], amax / 2688, for all of `result`, as convert --input-scale reads
/// them;
/// `..._input_scale`, the largest of all experts, for tensors of all experts that stay so. docs/calibrate.md.
/// Returns how many.
int64_t write_input_scales(const std::filesystem::path& path, const Checkpoint& checkpoint,
                           const CalibrateResult& result);

}  // namespace fourfold
