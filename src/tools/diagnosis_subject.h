// From a checkpoint and an input to the subject of a diagnosis.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "diagnosis/subject.h"
#include "fourfold/checkpoint.h"
#include "fourfold/model_family.h"
#include "tools/layer_inputs.h"

namespace fourfold {

/// What the command line says of the layer.
struct SubjectSource {
  std::string checkpoint;  ///< a model directory
  int64_t layer = 0;
  RuleOverrides overrides;
  std::optional<GateUpOrder> gate_up_order;
  std::optional<WeightScheme> scheme;
  uint64_t seed = 0;  ///< of routing, where nothing else says
};

/// All experts of a layer, of its neighbours where the checkpoint has them, and its router on `inputs`.
class LoadedSubject {
 public:
  /// `inputs` without ids are routed by the checkpoint's router. Throws Error where something is missing.
  LoadedSubject(const SubjectSource& source, LayerInputs inputs);
  LoadedSubject(const LoadedSubject&) = delete;
  LoadedSubject& operator=(const LoadedSubject&) = delete;

  /// Views into this object.
  const diagnosis::Subject& subject() const { return subject_; }
  const ExpertLayer& layer() const { return layer_; }
  const LayerRules& rules() const { return rules_; }
  const LayerInputs& inputs() const { return inputs_; }
  const std::string& model() const { return checkpoint_->config().model_type; }
  const std::vector<std::string>& notes() const { return notes_; }
  /// Why there is no router to compare with; empty where there is one.
  const std::string& why_no_router() const { return why_no_router_; }

 private:
  void load_router_logits(const SubjectSource& source);

  std::shared_ptr<const Checkpoint> checkpoint_;
  ExpertLayer layer_;
  std::optional<ExpertLayer> before_, after_;
  LayerRules rules_;
  LayerInputs inputs_;
  std::vector<std::string> notes_;
  std::string why_no_router_;
  diagnosis::Subject subject_;
};

}  // namespace fourfold
