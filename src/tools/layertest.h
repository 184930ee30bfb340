// layertest: where do a layer's numbers go wrong, in the checkpoint, in the activation quantization or in the
// kernel?
//
// Three comparisons, each stage by stage:
//   checkpoint    the layer in the original weights against the layer in the dequantized NVFP4 weights
//   activations   the dequantized layer against the emulation: activations quantized by specification
//   kernel        the emulation against a backend, every stage fed with the backend's own previous output
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "fourfold/comparison.h"
#include "fourfold/moe_layer.h"
#include "tools/layer_charts.h"
#include "tools/layer_inputs.h"

namespace fourfold {

/// Limit of the kernel comparison on relative L2; layertest.cpp derives it.
inline constexpr double kKernelLimit = 3e-3;

struct LayertestRequest {
  const ExpertWeights* original = nullptr;  ///< null: the checkpoint comparison is left out
  const ExpertWeights* nvfp4 = nullptr;     ///< what backends run: as stored, or after a named step
  std::vector<int64_t> expert_ids;          ///< number of each expert in the checkpoint, for reports
  LayerConfig config;
  LayerOptions options;
  const Backend* backend = nullptr;
  const LayerInputs* inputs = nullptr;
  bool explains = true;  ///< looks for what is wrong with a backend that has findings: a second or more
  std::function<void(std::string_view)> progress = [](std::string_view) {};
};

/// Stages in the order of the forward pass.
enum class Stage : uint8_t {
  kWeights,
  kL1,
  kActivation,
  kL2,
  kSharedL1,  ///< the shared expert's, rows are tokens
  kSharedActivation,
  kSharedL2,
  kOut,
};
inline constexpr std::array<std::string_view, 8> kStageNames = {
    "weights", "l1", "activation", "l2", "shared_l1", "shared_activation", "shared_l2", "out"};

/// One row of the table.
struct StageReport {
  Stage stage = Stage::kL1;
  double cosine = 1.0, norm_ratio = 1.0, rel_l2 = 0.0;
  int64_t worst_token = -1;     ///< -1: the stage has none
  int64_t worst_expert = -1;    ///< number in the checkpoint; -1: the stage has none
  std::optional<double> limit;  ///< on rel_l2; a finding above it
};

struct ComparisonReport {
  std::string left_out;      ///< why there are no stages; empty when there are
  std::string limit_origin;  ///< what the limits are and where they come from
  std::vector<StageReport> stages;
};

/// Blocks of the weights that do not dequantize to the original's values. MXFP4 originals alone, blocks
/// of 32.
struct ExactBlocks {
  int64_t blocks = 0;
  int64_t inexact = 0;
};

/// Bit-for-bit comparison of what a backend staged with the specification; the shared expert's counted in.
struct StagingReport {
  int64_t x_values = 0, x_different = 0;
  int64_t intermediate_values = 0, intermediate_different = 0;
};

/// What staging with the checkpoint's input scales loses in the worst expert, beside a scale a token.
struct InputScaleReport {
  int64_t worst_expert = -1;  ///< number in the checkpoint; -1 where no expert has rows, or it is the shared
  double ratio = 1.0;         ///< of its error to that with a scale by token; ScaleLoss::severity()
  double limit = 0.0;
};

/// What may be wrong with a candidate, and why it is thought so.
struct ReportedExplanation {
  std::string fault;      ///< in words
  double distance = 0.0;  ///< of the candidate from what this explanation predicts; 0 fits to the last bit
  std::string evidence;
};

struct LayertestReport {
  std::string verdict;  ///< "fine", or the first of "kernel", "checkpoint", "activations" with a finding
  std::vector<std::string> findings;
  std::string backend, kernel;
  ComparisonReport checkpoint, activations, kernel_stages;
  std::vector<StageReport> kernel_end_to_end;
  std::vector<ReportedExplanation> explanations;  ///< best first; empty where none was looked for
  LayerCharts charts;
  std::optional<ExactBlocks> exact_blocks;
  std::optional<StagingReport> staging;
  std::optional<InputScaleReport> x_scale, intermediate_scale;  ///< where a scale is not by token
  std::optional<InputScaleReport> shared_x_scale, shared_intermediate_scale;
};

/// 0 for "fine", else 3.
int exit_code_of(const LayertestReport& report);

/// Runs everything. Throws Error when the pieces do not fit each other.
LayertestReport run_layertest(const LayertestRequest& request);

}  // namespace fourfold
