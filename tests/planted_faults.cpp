#include "planted_faults.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "fourfold/error.h"
#include "fourfold/quantize.h"
#include "fourfold/reference.h"
#include "numeric/block_quantizer.h"

namespace fourfold {
namespace {

/// Bytes of changed weights, kept as long as the weights.
using ByteStore = std::vector<std::vector<uint8_t>>;

std::vector<uint8_t> scale_bytes(const BlockScaledView& weight) {
  std::vector<uint8_t> bytes;
  for (int64_t row = 0; row < weight.rows; ++row) {
    for (int64_t block = 0; block < weight.blocks_per_row(); ++block)
      bytes.push_back(weight.scale_code(row, block));
  }
  return bytes;
}

/// Replaces the scale of (row, block) by the one at `source(row, block)` of the same array.
void rearrange_scales(BlockScaledView& weight, ByteStore& store,
                      const std::function<int64_t(int64_t, int64_t)>& source) {
  const std::vector<uint8_t> original = scale_bytes(weight);
  std::vector<uint8_t> changed(original.size());
  const int64_t blocks = weight.blocks_per_row();
  for (int64_t row = 0; row < weight.rows; ++row) {
    for (int64_t block = 0; block < blocks; ++block) {
      changed[static_cast<size_t>(row * blocks + block)] = original[static_cast<size_t>(source(row, block))];
    }
  }
  weight.scales = store.emplace_back(std::move(changed)).data();
  weight.scale_stride = blocks;
}

void swap_nibbles(BlockScaledView& weight, ByteStore& store) {
  std::vector<uint8_t> swapped;
  for (int64_t row = 0; row < weight.rows; ++row) {
    for (int64_t col = 0; col < weight.cols / 2; ++col) {
      const uint8_t pair = weight.codes(row, col);
      swapped.push_back(static_cast<uint8_t>((pair >> 4) | (pair << 4)));
    }
  }
  weight.codes = {store.emplace_back(std::move(swapped)).data(), weight.rows, weight.cols / 2};
}

void break_matrix(Fault fault, BlockScaledView& weight, ByteStore& store) {
  const int64_t blocks = weight.blocks_per_row(), rows = weight.rows;
  switch (fault) {
    case Fault::kTransposedScales:
      return rearrange_scales(weight, store, [=](int64_t row, int64_t block) { return block * rows + row; });
    case Fault::kBlockOf32:
      return rearrange_scales(weight, store,
                              [=](int64_t row, int64_t block) { return row * (blocks / 2) + block / 2; });
    case Fault::kSwappedNibbles:
      return swap_nibbles(weight, store);
    case Fault::kReciprocalGlobal:
      weight.global.value = 1.0f / weight.global.value;
      return;
    default:
      return;
  }
}

ExpertWeights break_weights(Fault fault, ExpertWeights weights) {
  auto store = std::make_shared<ByteStore>();
  for (Expert& expert : weights.experts) {
    for (WeightView* weight : {&expert.gate, &expert.up, &expert.down}) {
      break_matrix(fault, std::get<BlockScaledView>(*weight), *store);
    }
    if (fault == Fault::kSwappedGateUp) std::swap(expert.gate, expert.up);
    if (fault == Fault::kGateGlobalForUp) {
      std::get<BlockScaledView>(expert.up).global = std::get<BlockScaledView>(expert.gate).global;
    }
  }
  if (fault == Fault::kExpertOffByOne) {
    std::rotate(weights.experts.begin(), weights.experts.begin() + 1, weights.experts.end());
  }
  weights.storage = std::make_shared<std::pair<std::shared_ptr<const void>, std::shared_ptr<ByteStore>>>(
      weights.storage, store);
  return weights;
}

/// e2m1 with ties away from zero.
uint8_t encode_ties_away(float value) {
  const float magnitude = std::abs(value);
  const int code = (magnitude >= 0.25f) + (magnitude >= 0.75f) + (magnitude >= 1.25f) + (magnitude >= 1.75f) +
                   (magnitude >= 2.5f) + (magnitude >= 3.5f) + (magnitude >= 5.0f);
  return static_cast<uint8_t>(code | (std::signbit(value) ? 8 : 0));
}

void stage_with_wrong_ties(MatrixView<const Bf16> rows, const StagedActivations& out) {
  for (int64_t row = 0; row < rows.rows; ++row) {
    for (int64_t k = 0; k < rows.cols; ++k) {
      const float global = out.row_scales[static_cast<size_t>(row)];
      const float x = static_cast<float>(rows(row, k)) * nvfp4_reciprocal(out.scales(row, k / 16), global);
      uint8_t& pair = out.codes(row, k / 2);
      pair = static_cast<uint8_t>(k % 2 == 0 ? encode_ties_away(x) : pair | (encode_ties_away(x) << 4));
    }
  }
}

/// Vectors behind one set of staged activations.
struct Staged {
  std::vector<uint8_t> codes, scales;
  std::vector<float> row_scales;
  StagedActivations views;

  Staged(int64_t rows, int64_t cols)
      : codes(static_cast<size_t>(rows * cols / 2)),
        scales(static_cast<size_t>(rows * cols / 16)),
        row_scales(static_cast<size_t>(rows)) {
    views.codes = {codes.data(), rows, cols / 2};
    views.scales = {scales.data(), rows, cols / 16};
    views.row_scales = row_scales;
  }
};

/// Taps of all stages, for callers that have none.
class OwnTaps {
 public:
  OwnTaps(int64_t slots, const LayerConfig& config)
      : offsets_(static_cast<size_t>(config.experts + 1)),
        slot_of_row_(static_cast<size_t>(slots)),
        row_of_slot_(static_cast<size_t>(slots)),
        staged_x_(slots, config.hidden),
        staged_intermediate_(slots, config.intermediate),
        h_(static_cast<size_t>(slots * config.h_columns())),
        activation_(static_cast<size_t>(slots * config.intermediate)),
        z_(static_cast<size_t>(slots * config.hidden)),
        slots_(slots),
        config_(config) {}

  StageTaps taps() {
    StageTaps taps;
    taps.group_offsets = offsets_;
    taps.slot_of_row = slot_of_row_;
    taps.row_of_slot = row_of_slot_;
    taps.staged_x = &staged_x_.views;
    taps.h = {h_.data(), slots_, config_.h_columns()};
    taps.activation = {activation_.data(), slots_, config_.intermediate};
    taps.staged_intermediate = &staged_intermediate_.views;
    taps.z = {z_.data(), slots_, config_.hidden};
    return taps;
  }

 private:
  std::vector<int32_t> offsets_, slot_of_row_, row_of_slot_;
  Staged staged_x_, staged_intermediate_;
  std::vector<Bf16> h_, activation_, z_;
  int64_t slots_;
  const LayerConfig& config_;
};

/// NVFP4 activations only; allocates freely.
class FaultyLayer final : public MoeLayer {
 public:
  FaultyLayer(Fault fault, const ExpertWeights& weights, const LayerConfig& config,
              const LayerOptions& options)
      : fault_(fault), weights_(break_weights(fault, weights)), config_(config), options_(options) {
    x_scales_ = x_input_scales(weights);
    intermediate_scales_ = intermediate_input_scales(weights);
  }

  const LayerConfig& config() const override { return config_; }
  const LayerOptions& options() const override { return options_; }
  LayerPlan plan(int64_t max_tokens) const override {
    return {max_tokens, 0, "planted", name_of(fault_), nullptr};
  }
  void experts(const LayerPlan&, const ExpertsArgs&) const override { refuse(); }
  void update_weights(const ExpertWeights&) override { refuse(); }

  void forward(const LayerPlan& plan, const ForwardArgs& caller) const override {
    validate(*this, plan, caller);
    OwnTaps own(caller.routing.tokens() * config_.top_k, config_);
    ForwardArgs args = caller;
    if (args.taps.z.empty()) args.taps = own.taps();
    const Permutation permutation = permute_by_expert(args.routing, config_.experts);
    std::copy(permutation.group_offsets.begin(), permutation.group_offsets.end(),
              args.taps.group_offsets.begin());
    std::copy(permutation.slot_of_row.begin(), permutation.slot_of_row.end(), args.taps.slot_of_row.begin());
    std::copy(permutation.row_of_slot.begin(), permutation.row_of_slot.end(), args.taps.row_of_slot.begin());
    const int64_t rows = permutation.rows();
    std::vector<Bf16> x(static_cast<size_t>(rows * config_.hidden));
    const MatrixView<Bf16> x_rows(x.data(), rows, config_.hidden);
    gather_rows(args.x, permutation.slot_of_row, config_.top_k, x_rows);

    const auto offsets = std::span<const int32_t>(permutation.group_offsets);
    const Staged staged_x = stage(x_rows, offsets, options_.x_scale, x_scales_, args.taps.staged_x);
    reference::gate_up(staged_x.views.view(ActivationFormat::kNvfp4, rows, config_.hidden), offsets, weights_,
                       options_, args.taps.h);
    reference::activate(config_.activation, args.taps.h, args.taps.activation);
    const Staged staged = stage(args.taps.activation, offsets, options_.intermediate_scale,
                                intermediate_scales_, args.taps.staged_intermediate);
    reference::down(staged.views.view(ActivationFormat::kNvfp4, rows, config_.intermediate), offsets,
                    weights_, options_, args.taps.z);
    combine(args, permutation);
  }

 private:
  [[noreturn]] static void refuse() {
    throw Error(ErrorCode::kUnsupported, "a planted fault runs forward alone");
  }

  Staged stage(MatrixView<const Bf16> rows, std::span<const int32_t> offsets, ScalePolicy policy,
               std::span<const float> expert_scales, const StagedActivations* tap) const {
    Staged staged(rows.rows, rows.cols);
    reference::activation_scales(policy, rows, offsets, expert_scales, staged.views.row_scales);
    reference::stage(ActivationFormat::kNvfp4, rows, staged.views);
    if (fault_ == Fault::kWrongTieRule) stage_with_wrong_ties(rows, staged.views);
    std::copy(staged.codes.begin(), staged.codes.end(), tap->codes.data);
    std::copy(staged.scales.begin(), staged.scales.end(), tap->scales.data);
    std::copy(staged.row_scales.begin(), staged.row_scales.end(), tap->row_scales.begin());
    if (fault_ == Fault::kDroppedInputScale)
      std::fill(staged.row_scales.begin(), staged.row_scales.end(), 1.0f);
    return staged;
  }

  void combine(const ForwardArgs& args, const Permutation& permutation) const {
    const MatrixView<const float> weights = args.routing.topk_weights;
    const std::vector<float> ones(static_cast<size_t>(weights.rows * weights.cols), 1.0f);
    reference::combine(args.taps.z, permutation.row_of_slot,
                       fault_ == Fault::kMissingRoutingWeight
                           ? MatrixView<const float>(ones.data(), weights.rows, weights.cols)
                           : weights,
                       config_, {}, args.y);
  }

  Fault fault_;
  ExpertWeights weights_;
  LayerConfig config_;
  LayerOptions options_;
  std::vector<float> x_scales_, intermediate_scales_;
};

class FaultyBackend final : public Backend {
 public:
  explicit FaultyBackend(Fault fault) : fault_(fault), name_(name_of(fault)) {}
  std::string_view name() const override { return name_; }
  std::string_view description() const override { return "a planted fault"; }
  std::string why_unavailable() const override { return ""; }
  std::string why_unsupported(const ExpertWeights& weights, const LayerConfig&,
                              const LayerOptions& options) const override {
    if (weights.shared) return "routed experts alone";
    return options.activations == ActivationFormat::kNvfp4 ? "" : "nvfp4 activations alone";
  }
  std::unique_ptr<MoeLayer> make_layer(const ExpertWeights& weights, const LayerConfig& config,
                                       const LayerOptions& options) const override {
    return std::make_unique<FaultyLayer>(fault_, weights, config, options);
  }
  void gemm(const GemmArgs& args) const override { reference::gemm(args); }
  void grouped_gemm(const GroupedGemmArgs& args) const override { reference::grouped_gemm(args); }

 private:
  Fault fault_;
  std::string name_;
};

}  // namespace

std::string name_of(Fault fault) {
  switch (fault) {
    case Fault::kNone:
      return "none";
    case Fault::kTransposedScales:
      return "transposed_scales";
    case Fault::kSwappedNibbles:
      return "swapped_nibbles";
    case Fault::kSwappedGateUp:
      return "swapped_gate_up";
    case Fault::kGateGlobalForUp:
      return "gate_global_for_up";
    case Fault::kReciprocalGlobal:
      return "reciprocal_global";
    case Fault::kDroppedInputScale:
      return "dropped_input_scale";
    case Fault::kWrongTieRule:
      return "wrong_tie_rule";
    case Fault::kExpertOffByOne:
      return "expert_off_by_one";
    case Fault::kMissingRoutingWeight:
      return "missing_routing_weight";
    case Fault::kBlockOf32:
      return "block_of_32";
  }
  return "?";
}

std::unique_ptr<Backend> make_faulty_backend(Fault fault) {
  return std::make_unique<FaultyBackend>(fault);
}

}  // namespace fourfold
