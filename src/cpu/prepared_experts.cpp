#include "cpu/prepared_experts.h"

#include <algorithm>

#include "base/fail.h"
#include "base/thread_scratch.h"

namespace fourfold::cpu {
namespace {

PanelSource up_source(const Expert& expert) {
  return expert.has_gate() ? PanelSource{&expert.gate, &expert.up} : PanelSource{&expert.up, nullptr};
}
PanelSource down_source(const Expert& expert) {
  return {&expert.down, nullptr};
}

/// Both panels are stored alike.
PanelStorage storage_of(const PanelSource& source) {
  const PanelStorage first = storage_for(source.matrix(0)), second = storage_for(source.matrix(1));
  return first == second ? first : PanelStorage::kFloat;
}

const char* storage_name(PanelStorage storage) {
  switch (storage) {
    case PanelStorage::kNvfp4:
      return "nvfp4";
    case PanelStorage::kBf16:
      return "bf16";
    case PanelStorage::kFloat:
      break;
  }
  return "float32, fp8 or f16";
}

/// A bias, as rows of panels lie.
void spread_bias(const PanelSource& source, const std::optional<DenseView> biases[2], std::span<float> out) {
  std::vector<float> values(static_cast<size_t>(source.rows()));
  for (int panel = 0; panel < 2; ++panel) {
    const auto& bias = biases[source.second != nullptr ? panel : 0];
    if (!bias) continue;
    decode_row(*bias, 0, values.data());
    for (int64_t pair = 0; pair < source.pairs(); ++pair) {
      std::copy_n(values.begin() + std::min(source.first_row(pair, panel), source.rows()),
                  source.rows_of_panel(pair, panel), out.begin() + pair * kPairRows + panel * kPanelRows);
    }
  }
}

}  // namespace

/// One matrix to pack.
struct PreparedExperts::Packing {
  PanelSource source;
  ExpertMatrix* matrix = nullptr;
  int64_t first_pair = 0;  // in the order of all matrices
};

PreparedExperts::PreparedExperts(const ExpertWeights& weights, const LayerConfig& config,
                                 const LayerOptions& options)
    : config_(config), options_(options) {
  lay_out(weights);
  update(weights);
}

void PreparedExperts::require_alike(const ExpertWeights& weights) const {
  if (static_cast<int64_t>(weights.experts.size()) != count()) {
    reject("update_weights: experts", count(), weights.experts.size());
  }
  const auto require = [](const Expert& expert, const char* which, const PanelSource& source,
                          const PanelMatrix& panels) {
    if (source.rows() == panels.rows && source.depth() == panels.depth &&
        storage_of(source) == panels.storage && (source.second != nullptr) == panels.is_gate_up) {
      return;
    }
    reject(fmt::format("update_weights: {} {}", expert.name, which),
           fmt::format("{} {}", storage_name(panels.storage), shape_text(panels.rows, panels.depth)),
           fmt::format("{} {}", format_name(source.matrix(1)), shape_text(source.rows(), source.depth())));
  };
  for (size_t e = 0; e < weights.experts.size(); ++e) {
    const Expert& expert = weights.experts[e];
    require(expert, "gate and up", up_source(expert), up_[e].panels);
    require(expert, "down", down_source(expert), down_[e].panels);
  }
}

void PreparedExperts::update(const ExpertWeights& weights) {
  pack(weights);
  read_scales(weights);
  read_biases(weights);
}

/// Sizes everything and sets the matrices' pointers.
void PreparedExperts::lay_out(const ExpertWeights& weights) {
  up_.resize(weights.experts.size());
  down_.resize(weights.experts.size());
  int64_t bytes = 0, pairs = 0;
  std::vector<int64_t> offsets;
  const auto add = [&](const PanelSource& source, ExpertMatrix& matrix) {
    PanelMatrix& panels = matrix.panels;
    panels.storage = storage_of(source);
    panels.rows = source.rows();
    panels.depth = source.depth();
    panels.pairs = source.pairs();
    panels.is_gate_up = source.second != nullptr;
    needs_floats_ |= panels.storage != PanelStorage::kNvfp4;
    offsets.push_back(bytes);
    bytes += panels.pairs * panel_pair_bytes(panels.storage, panels.depth);
    pairs += panels.pairs;
  };
  for (size_t e = 0; e < weights.experts.size(); ++e) {
    add(up_source(weights.experts[e]), up_[e]);
    add(down_source(weights.experts[e]), down_[e]);
  }
  buffer_ = HugeBuffer(static_cast<size_t>(bytes));
  irregular_.resize(static_cast<size_t>(pairs));
  const uint8_t* irregular = irregular_.data();
  for (size_t i = 0; i < offsets.size(); ++i) {
    PanelMatrix& panels = (i % 2 == 0 ? up_ : down_)[i / 2].panels;
    panels.data = buffer_.data() + offsets[i];
    panels.irregular = irregular;
    irregular += panels.pairs;
  }
}

void PreparedExperts::pack(const ExpertWeights& weights) {
  std::vector<Packing> packings;
  int64_t pairs = 0;
  const auto add = [&](const PanelSource& source, ExpertMatrix& matrix) {
    packings.push_back({source, &matrix, pairs});
    pairs += matrix.panels.pairs;
    matrix.globals[0] = global_multiplier(source.matrix(0));
    matrix.globals[1] = global_multiplier(source.matrix(1));
  };
  for (size_t e = 0; e < weights.experts.size(); ++e) {
    add(up_source(weights.experts[e]), up_[e]);
    add(down_source(weights.experts[e]), down_[e]);
  }
  ThreadScratch scratch(std::max(config_.hidden, config_.intermediate));
  // Static: a thread touches neighbouring pages first, and later reads most of what it packed.
#pragma omp parallel for schedule(static)
  for (int64_t index = 0; index < pairs; ++index) {
    const auto next =
        std::upper_bound(packings.begin(), packings.end(), index,
                         [](int64_t i, const Packing& packing) { return i < packing.first_pair; });
    const Packing& packing = *(next - 1);
    const PanelMatrix& panels = packing.matrix->panels;
    const int64_t pair = index - packing.first_pair;
    std::byte* const out = buffer_.data() + (panels.pair(pair) - buffer_.data());
    irregular_[static_cast<size_t>(index)] =
        pack_pair(packing.source, pair, panels.storage, scratch.mine().data(), out);
  }
  has_irregular_pairs_ =
      std::any_of(irregular_.begin(), irregular_.end(), [](uint8_t pair) { return pair != 0; });
}

void PreparedExperts::read_scales(const ExpertWeights& weights) {
  x_scales_ = x_input_scales(weights);
  intermediate_scales_ = intermediate_input_scales(weights);
  const auto spread_largest = [](ScalePolicy policy, std::optional<float> over_all,
                                 std::vector<float>& scales) {
    if (policy != ScalePolicy::kMaxOverExperts || scales.empty()) return;
    scales.assign(scales.size(), over_all ? *over_all : *std::max_element(scales.begin(), scales.end()));
  };
  spread_largest(options_.x_scale, options_.x_max_scale, x_scales_);
  spread_largest(options_.intermediate_scale, options_.intermediate_max_scale, intermediate_scales_);
}

void PreparedExperts::read_biases(const ExpertWeights& weights) {
  const auto up_floats = [](const ExpertMatrix& matrix) { return matrix.panels.pairs * kPairRows; };
  int64_t floats = 0;
  for (size_t e = 0; e < up_.size(); ++e) floats += up_floats(up_[e]) + up_floats(down_[e]);
  const bool has_any = std::any_of(weights.experts.begin(), weights.experts.end(), [](const Expert& expert) {
    return expert.gate_bias || expert.up_bias || expert.down_bias;
  });
  biases_.assign(static_cast<size_t>(has_any ? floats : 0), 0.0f);
  std::span<float> rest = biases_;
  for (size_t e = 0; e < up_.size(); ++e) {
    const Expert& expert = weights.experts[e];
    const std::optional<DenseView> gate_up[2] = {expert.has_gate() ? expert.gate_bias : expert.up_bias,
                                                 expert.up_bias};
    const std::optional<DenseView> down[2] = {expert.down_bias, std::nullopt};
    up_[e].biases = down_[e].biases = nullptr;
    if (!has_any) continue;
    const auto take = [&](const PanelSource& source, const std::optional<DenseView> biases[2],
                          ExpertMatrix& matrix) {
      const std::span<float> own = rest.first(static_cast<size_t>(up_floats(matrix)));
      rest = rest.subspan(own.size());
      if (!biases[0] && !biases[1]) return;
      spread_bias(source, biases, own);
      matrix.biases = own.data();
    };
    take(up_source(expert), gate_up, up_[e]);
    take(down_source(expert), down, down_[e]);
  }
}

}  // namespace fourfold::cpu
