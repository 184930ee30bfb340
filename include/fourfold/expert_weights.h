// The expert weights of one MoE layer, exactly as a checkpoint stores them.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "fourfold/block_scaled.h"
#include "fourfold/export.h"

namespace FOURFOLD_EXPORT fourfold {

/// One expert. Gate and up keep their own global scales. Views may be strided.
struct Expert {
  WeightView gate;                              ///< [I, H]; no rows where the activation has no gate
  WeightView up;                                ///< [I, H]
  WeightView down;                              ///< [H, I]
  std::optional<DenseView> gate_bias, up_bias;  ///< [1, I]
  std::optional<DenseView> down_bias;           ///< [1, H]
  /// Calibrated activation scales (multipliers, amax/2688); absent where the checkpoint has none.
  std::optional<float> gate_input_scale, up_input_scale, down_input_scale;

  bool has_gate() const { return rows_of(gate) > 0; }

  std::string name;  ///< e.g. "layers.3.ffn.experts.17", for messages
};

/// Whether all of its matrices are NVFP4.
bool is_all_nvfp4(const Expert& expert);

/// An expert that every token goes through; its output is added to the routed experts' once.
struct SharedExpert {
  Expert expert;                  ///< gate and up [S, H], down [H, S]
  int64_t intermediate = 0;       ///< S, its own: often not I
  std::optional<DenseView> gate;  ///< [1, H]: the output is multiplied by sigmoid(x . gate). Absent: by 1
};

/// One layer's experts: views into a mapped checkpoint or a framework's tensors. `storage` keeps them alive.
struct ExpertWeights {
  int64_t hidden = 0;        ///< H
  int64_t intermediate = 0;  ///< I
  std::vector<Expert> experts;
  /// Where the experts are spread over ranks, one rank alone has it: it is added once.
  std::optional<SharedExpert> shared;
  std::shared_ptr<const void> storage;

  int64_t count() const { return static_cast<int64_t>(experts.size()); }
};

/// Throws Error, naming expert and tensor, when a shape disagrees with `hidden` and `intermediate`.
void validate(const ExpertWeights& weights);

/// Whether all matrices of the shared expert are stored as the routed experts' are. `weights` must have one.
bool shared_is_stored_as_routed(const ExpertWeights& weights);

/// The shared expert as a layer of one expert, which every token goes to. `weights` must have one.
ExpertWeights shared_as_layer(const ExpertWeights& weights);

/// An input_scale that staging can use: present, finite, at least kSmallestDynamicScale.
bool is_usable_input_scale(std::optional<float> scale);

/// Static scale of x for every expert [E]: the larger of gate's and up's; 0 where there is none.
std::vector<float> x_input_scales(const ExpertWeights& weights);
/// Static scale of the intermediate for every expert [E]: down's; 0 where there is none.
std::vector<float> intermediate_input_scales(const ExpertWeights& weights);

/// What folding gate's and up's global scales into one changed.
struct FoldReport {
  int64_t blocks = 0;       ///< blocks of the rescaled halves
  int64_t changed = 0;      ///< of those, blocks whose scale x global is not what it was
  int64_t underflowed = 0;  ///< of those, scales that became zero
  double largest_relative_change = 0.0;
};

/// `--gate-up fold`: for kernels that take one alpha an expert. global = max(gate, up); the smaller half's
/// block scales are multiplied by own/global in float32 and rounded once to e4m3. Weights other than NVFP4
/// are left alone. The shared expert is folded alike.
ExpertWeights fold_gate_up(const ExpertWeights& weights, FoldReport* report = nullptr);

/// `--double-quantize`: what a serving engine does that goes through bf16 and quantizes again with ModelOpt's
/// rule, gate and up as one tensor; the shared expert too where it is NVFP4. Shows the loss; nobody should
/// want it.
ExpertWeights quantize_again(const ExpertWeights& weights);

}  // namespace fourfold
