#include "tools/memory_estimate.h"

#include <algorithm>

#include "blackwell/block_weights.h"
#include "cpu/panel_matrix.h"
#include "fourfold/moe_layer.h"
#include "sm90/packed_layout.h"

namespace fourfold {
namespace {

int64_t tensor_bytes(const WeightView& weight) {
  const int64_t rows = rows_of(weight), cols = cols_of(weight);
  if (const auto* blocks = std::get_if<BlockScaledView>(&weight))
    return rows * cols / 2 + rows * blocks->blocks_per_row();
  if (std::holds_alternative<Fp8View>(weight)) return rows * cols;
  return rows * cols * (std::get<DenseView>(weight).type == ElementType::kF32 ? 4 : 2);
}

int64_t stored_bytes(const Expert& expert) {
  return tensor_bytes(expert.up) + tensor_bytes(expert.down) +
         (expert.has_gate() ? tensor_bytes(expert.gate) : 0);
}

int64_t cpu_bytes(const Expert& expert) {
  const auto bytes = [](const cpu::PanelSource& source) {
    const cpu::PanelStorage first = cpu::storage_for(source.matrix(0)),
                            second = cpu::storage_for(source.matrix(1));
    return source.pairs() *
           cpu::panel_pair_bytes(first == second ? first : cpu::PanelStorage::kFloat, source.depth());
  };
  return bytes(expert.has_gate() ? cpu::PanelSource{&expert.gate, &expert.up}
                                 : cpu::PanelSource{&expert.up, nullptr}) +
         bytes({&expert.down, nullptr});
}

int64_t sm90_bytes(const Expert& expert) {
  const int64_t hidden = cols_of(expert.up), intermediate = rows_of(expert.up);
  const auto order = expert.has_gate() ? sm90::RowOrder::kGateUpPaired : sm90::RowOrder::kPlain;
  return sm90::PackedShape{order, intermediate, hidden}.bytes() +
         sm90::PackedShape{sm90::RowOrder::kPlain, hidden, intermediate}.bytes();
}

int64_t blackwell_bytes(const Expert& expert) {
  const int64_t hidden = cols_of(expert.up), intermediate = rows_of(expert.up);
  return blackwell::expert_bytes({intermediate, hidden}, expert.has_gate() ? 2 : 1) +
         blackwell::expert_bytes({hidden, intermediate}, 1);
}

/// The mean over the experts that are there, times `experts`; and the shared one.
int64_t of_layer(const ExpertWeights& weights, int64_t experts, int64_t (*bytes)(const Expert&)) {
  int64_t sum = 0;
  for (const Expert& expert : weights.experts) sum += bytes(expert);
  return sum / std::max<int64_t>(1, weights.count()) * experts +
         (weights.shared ? bytes(weights.shared->expert) : 0);
}

}  // namespace

std::vector<MemoryEstimate> estimate_memory(const ExpertWeights& weights, int64_t experts) {
  const bool all_nvfp4 = std::all_of(weights.experts.begin(), weights.experts.end(), is_all_nvfp4) &&
                         (!weights.shared || is_all_nvfp4(weights.shared->expert));
  std::vector<MemoryEstimate> estimates(4);
  for (const auto& [at, backend, bytes] :
       {std::tuple(0, "blackwell", &blackwell_bytes), {1, "sm90", &sm90_bytes}}) {
    MemoryEstimate& estimate = estimates[static_cast<size_t>(at)];
    estimate.backend = backend;
    if (all_nvfp4) {
      estimate.bytes = of_layer(weights, experts, bytes);
    } else {
      estimate.why_not = "it multiplies NVFP4 experts alone";
    }
  }
  estimates[2].backend = "cpu";
  LayerOptions options;
  options.activations = ActivationFormat::kBf16;  // which need no scales
  estimates[2].why_not = cpu_backend().why_unsupported(weights, {}, options);
  if (estimates[2].why_not.empty()) estimates[2].bytes = of_layer(weights, experts, cpu_bytes);
  estimates[3].backend = "reference";
  estimates[3].bytes = of_layer(weights, experts, stored_bytes);
  for (MemoryEstimate& estimate : estimates) {
    estimate.is_compiled_in = std::any_of(backends().begin(), backends().end(), [&](const Backend* backend) {
      return backend->name() == estimate.backend;
    });
  }
  return estimates;
}

}  // namespace fourfold
