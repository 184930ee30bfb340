// How the lists of known faults are written: what they ask of the layer, and how a fault is added.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "diagnosis/faults.h"

namespace fourfold::diagnosis {

class FaultList {
 protected:
  using Apply = void (*)(Deviation&, const Fault&);

  /// Adds to `faults`; both must outlive it.
  FaultList(const Subject& subject, std::vector<Fault>& faults) : subject_(subject), faults_(faults) {}

  const ExpertWeights& weights() const { return *subject_.weights; }
  const Expert& expert() const { return weights().experts.front(); }
  bool gated() const { return expert().has_gate(); }

  template <class Holds>
  bool in_all_matrices(Holds holds) const {
    return std::all_of(weights().experts.begin(), weights().experts.end(), [&](const Expert& e) {
      return (!e.has_gate() || holds(e.gate)) && holds(e.up) && holds(e.down);
    });
  }
  bool has_blocks() const {
    return in_all_matrices([](const WeightView& w) { return std::holds_alternative<BlockScaledView>(w); });
  }
  bool is_nvfp4() const {
    return in_all_matrices([](const WeightView& w) { return is_stored_as(w, QuantFormat::kNvfp4); });
  }

  Fault& add(std::string id, FaultPlace place, Apply apply, std::string sentence, std::string remedy) {
    Fault fault;
    fault.id = std::move(id);
    fault.sentence = std::move(sentence);
    fault.remedy = std::move(remedy);
    fault.place = place;
    fault.apply = apply;
    return faults_.emplace_back(std::move(fault));
  }

  const Subject& subject_;
  std::vector<Fault>& faults_;
};

/// How weights are read: scales, codes, global scales, tails of K, gate and up, other layers' weights.
void add_weight_faults(const Subject& subject, std::vector<Fault>& faults);
/// How activations are staged, and what an expert computes between its GEMMs.
void add_stage_faults(const Subject& subject, std::vector<Fault>& faults);
/// Which expert computes which row, with which weight, and what is summed.
void add_routing_faults(const Subject& subject, std::vector<Fault>& faults);

}  // namespace fourfold::diagnosis
