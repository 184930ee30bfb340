// Is a layer right on the case that is about to be timed? Sampled rows of every stage against float64 from
// the weights as the checkpoint stores them.
//
// Stage by stage: every stage is fed with the backend's own output of the stage before, as in layertest.
// Staging and permutation must agree bit for bit. Where the taps of all stages do not fit the memory, whole
// tokens are computed from end to end instead.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fourfold/moe_layer.h"
#include "tools/testbed.h"

namespace fourfold {

enum class CheckDepth : uint8_t { kStageByStage, kEndToEnd };

/// Errors of one stage over its sampled rows, against float64 before rounding.
struct StageCheck {
  std::string stage;
  double rel_l2 = 0.0;
  double worst_row_rel_l2 = 0.0;
  double limit = 0.0, worst_row_limit = 0.0;
};

struct CheckReport {
  CheckDepth depth = CheckDepth::kStageByStage;
  std::string why_end_to_end;  ///< why it is not stage by stage
  int64_t rows = 0;            ///< sampled rows, of the permuted order
  int64_t whole_experts = 0;   ///< experts all of whose rows are among them
  int64_t tokens = 0;          ///< sampled tokens of y
  std::vector<StageCheck> stages;
  int64_t staged_values = 0;          ///< codes and scales compared bit for bit
  std::vector<std::string> findings;  ///< what is wrong; empty when nothing is

  bool passed() const { return findings.empty(); }
  /// Largest relative L2 of a stage.
  double worst() const;
};

/// A layer about to be timed.
struct CheckSubject {
  const Testbed* testbed = nullptr;
  const ExpertWeights* weights = nullptr;  ///< in the testbed's memory
  const MoeLayer* layer = nullptr;
  const LayerPlan* plan = nullptr;
  MatrixView<const Bf16> x;  ///< [T, H] on the host
  Routing routing;           ///< on the host
  ForwardArgs args;          ///< the same and y (bf16) in the testbed's memory, and a workspace; no taps
  uint64_t seed = 0;         ///< of the sample of columns
};

/// Memory that taps of all stages take.
int64_t tap_bytes(const LayerConfig& config, ActivationFormat format, int64_t tokens);

/// Runs the layer and compares. Throws Error when it cannot be checked.
CheckReport check_layer(const CheckSubject& subject, CheckDepth depth);

}  // namespace fourfold
