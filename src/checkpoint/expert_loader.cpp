// From tensor names and dtypes to the expert weights of a layer. Views into the mapped files; only what is
// stored transposed, and biases of interleaved rows, are copied.
#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <set>

#include "base/fail.h"
#include "checkpoint/linear_reader.h"
#include "checkpoint/moe_names.h"
#include "checkpoint/quantization_claim.h"
#include "fourfold/model_family.h"

namespace fourfold {
namespace {

constexpr std::array<std::pair<GateUpOrder, std::string_view>, 3> kOrders = {{
    {GateUpOrder::kGateFirst, "gate-first"},
    {GateUpOrder::kUpFirst, "up-first"},
    {GateUpOrder::kInterleaved, "interleaved"},
}};

constexpr std::array<std::pair<WeightScheme, std::string_view>, 3> kSchemes = {{
    {WeightScheme::kModelOpt, "modelopt"},
    {WeightScheme::kCompressedTensors, "compressed-tensors"},
    {WeightScheme::kMxfp4, "mxfp4"},
}};

/// Which rows of a fused matrix of 2I rows are gate's, and which up's.
struct HalfRows {
  int64_t gate_first, up_first, step;
};

HalfRows rows_of_halves(GateUpOrder order, int64_t half) {
  if (order == GateUpOrder::kInterleaved) return {0, 1, 2};
  return order == GateUpOrder::kGateFirst ? HalfRows{0, half, 1} : HalfRows{half, 0, 1};
}

/// Numbers of the experts under `prefix`.
std::vector<int64_t> expert_ids(const Checkpoint& checkpoint, const std::string& prefix) {
  std::set<int64_t> ids;
  for (const Tensor* tensor : tensors_under(checkpoint, prefix)) {
    const auto id = leading_number(std::string_view(tensor->name).substr(prefix.size()), '.');
    if (!id) {
      fail(ErrorCode::kBadFile,
           "{}: tensor '{}': expected an expert's number after '{}', found something else", tensor->file,
           tensor->name, prefix);
    }
    ids.insert(*id);
  }
  return {ids.begin(), ids.end()};
}

/// "a" or "mixed: a, b".
std::string scheme_text(const std::set<std::string>& schemes) {
  return schemes.size() == 1 ? *schemes.begin() : fmt::format("mixed: {}", fmt::join(schemes, ", "));
}

/// What the views of a loaded layer point to.
struct LayerStorage {
  std::shared_ptr<const Checkpoint> checkpoint;
  RepackedBytes repacked;
};

/// Builds the layer from either kind of naming.
class LayerLoader {
 public:
  LayerLoader(std::shared_ptr<const Checkpoint> checkpoint, int64_t layer, const std::vector<int64_t>& wanted,
              std::optional<GateUpOrder> order, std::optional<WeightScheme> scheme)
      : storage_(std::make_shared<LayerStorage>()),
        checkpoint_(*checkpoint),
        layer_number_(layer),
        block_(find_block(checkpoint_, layer)),
        wanted_(wanted),
        order_(order),
        scheme_(scheme) {
    storage_->checkpoint = std::move(checkpoint);
  }

  ExpertLayer load() {
    require_known_children();
    const std::string experts = block_.prefix + std::string(kExperts);
    ExpertLayer layer = is_fused(experts) ? load_fused(experts) : load_separate(experts);
    load_shared(layer);
    layer.weights.intermediate = rows_of(layer.weights.experts.front().up);
    layer.weights.hidden = cols_of(layer.weights.experts.front().up);
    layer.weights.storage = storage_;
    require_four_bits_for_scheme(layer);
    try {
      validate(layer.weights);
    } catch (const Error& error) {
      fail(ErrorCode::kBadFile, "{}: {}", checkpoint_.path().string(), error.what());
    }
    compare_with_config(layer);
    checkpoint_.require_intact();  // scales have been read
    return layer;
  }

 private:
  /// Tensors beside the experts that nothing here reads would change what the layer computes.
  void require_known_children() const {
    for (const Tensor* tensor : tensors_under(checkpoint_, block_.prefix)) {
      const std::string_view child = std::string_view(tensor->name).substr(block_.prefix.size());
      const auto starts = [&](std::string_view known) { return child.starts_with(known); };
      if (starts(kExperts) || starts(kSharedGate) || std::any_of(kRouters.begin(), kRouters.end(), starts) ||
          std::any_of(kSharedExperts.begin(), kSharedExperts.end(), starts)) {
        continue;
      }
      fail(ErrorCode::kUnsupported,
           "{}: tensor '{}': expected experts, a router and shared experts under '{}', found {} too, which "
           "this version does not read",
           tensor->file, tensor->name, block_.prefix, tensor->describe());
    }
  }

  bool is_fused(const std::string& experts) const {
    return checkpoint_.find(experts + "gate_up_proj") || checkpoint_.find(experts + "gate_up_proj_blocks");
  }

  // ---- expert by expert ----

  ExpertLayer load_separate(const std::string& prefix) {
    require_not_fused(prefix);
    const std::vector<int64_t> ids = expert_ids(checkpoint_, prefix);
    const int64_t count = static_cast<int64_t>(ids.size());
    if (ids.back() != count - 1) {
      int64_t first_missing = 0;
      while (ids[static_cast<size_t>(first_missing)] == first_missing) ++first_missing;
      fail(ErrorCode::kBadFile,
           "{}: layer {}: expected experts 0 to {}, found {} of them: expert {} ('{}{}') is missing; is a "
           "shard?",
           checkpoint_.path().string(), layer_number_, ids.back(), count, first_missing, prefix,
           first_missing);
    }
    ExpertLayer layer;
    select(layer, count);
    std::set<std::string> schemes;
    std::map<std::string, std::vector<int64_t>> experts_by_scheme;
    for (const int64_t id : layer.expert_ids) {
      std::set<std::string> own;
      layer.weights.experts.push_back(read_expert(fmt::format("{}{}", prefix, id), own));
      experts_by_scheme[scheme_text(own)].push_back(id);
      schemes.merge(own);
    }
    require_same_gates(layer);
    layer.naming = fmt::format("{}E.{}", prefix, linear_names(layer.weights.experts.front()));
    layer.scheme = scheme_text(schemes);
    note_mixture(experts_by_scheme, layer);
    return layer;
  }

  /// Experts of several schemes are legal, and nobody expects them: of each scheme but the commonest, which.
  static void note_mixture(const std::map<std::string, std::vector<int64_t>>& by_scheme, ExpertLayer& layer) {
    constexpr size_t kMostNamed = 8;
    const auto fewer = [](const auto& a, const auto& b) { return a.second.size() < b.second.size(); };
    const auto commonest = std::max_element(by_scheme.begin(), by_scheme.end(), fewer);
    for (auto it = by_scheme.begin(); it != by_scheme.end(); ++it) {
      if (it == commonest) continue;
      std::vector<int64_t> named = it->second;
      const size_t more = named.size() - std::min(named.size(), kMostNamed);
      named.resize(named.size() - more);
      layer.notes.push_back(fmt::format(
          "expert{} {}{}: {}, others: {}", it->second.size() > 1 ? "s" : "", fmt::join(named, ", "),
          more > 0 ? fmt::format(" and {} more", more) : "", it->first, commonest->first));
    }
  }

  /// All experts have a gate, or none has.
  void require_same_gates(const ExpertLayer& layer) const {
    const std::vector<Expert>& experts = layer.weights.experts;
    const bool any =
        std::any_of(experts.begin(), experts.end(), [](const Expert& e) { return e.has_gate(); });
    for (const Expert& expert : experts) {
      if (expert.has_gate() == any) continue;
      fail(ErrorCode::kBadFile, "{}: expected a tensor '{}.{}.weight', as other experts have, found none",
           checkpoint_.path().string(), expert.name, block_.names.gate);
    }
  }

  /// Other layouts under the same prefix are named, not overlooked.
  void require_not_fused(const std::string& prefix) const {
    constexpr std::array<std::string_view, 3> kFusedNames = {"gate_up_proj", "up_proj", "down_proj"};
    for (const std::string_view name : kFusedNames) {
      const std::vector<const Tensor*> fused = tensors_under(checkpoint_, prefix + std::string(name));
      if (fused.empty()) continue;
      fail(ErrorCode::kUnsupported,
           "{}: tensor '{}': expected experts one by one ('{}0...') or fused as '{}gate_up_proj', found "
           "{}, a layout that this version does not read",
           fused.front()->file, fused.front()->name, prefix, prefix, fused.front()->describe());
    }
  }

  std::string linear_names(const Expert& expert) const {
    const BlockNames& names = block_.names;
    return expert.has_gate() ? fmt::format("{{{},{},{}}}", names.gate, names.up, names.down)
                             : fmt::format("{{{},{}}}", names.up, names.down);
  }

  Expert read_expert(const std::string& name, std::set<std::string>& schemes) const {
    Expert expert;
    expert.name = name;
    const auto reader = [&](std::string_view which) {
      return LinearReader(checkpoint_, fmt::format("{}.{}", name, which), scheme_);
    };
    const LinearReader gate = reader(block_.names.gate), up = reader(block_.names.up),
                       down = reader(block_.names.down);
    require_linears_alone(name);
    // An expert whose gate is missing altogether is one without a gate; the rules say whether that is right.
    if (gate.exists()) expert.gate = gate.weight(schemes);
    expert.up = up.weight(schemes);
    expert.down = down.weight(schemes);
    if (gate.exists()) expert.gate_bias = gate.bias(rows_of(expert.gate));
    expert.up_bias = up.bias(rows_of(expert.up));
    expert.down_bias = down.bias(rows_of(expert.down));
    if (gate.exists()) gate.require_all_known();
    up.require_all_known();
    down.require_all_known();
    expert.gate_input_scale = gate.input_scale();
    expert.up_input_scale = up.input_scale();
    expert.down_input_scale = down.input_scale();
    return expert;
  }

  void require_linears_alone(const std::string& expert) const {
    const BlockNames& names = block_.names;
    for (const Tensor* tensor : tensors_under(checkpoint_, expert + ".")) {
      const std::string_view rest = std::string_view(tensor->name).substr(expert.size() + 1);
      const std::string_view linear = rest.substr(0, rest.find('.'));
      if (linear != names.gate && linear != names.up && linear != names.down) {
        fail(ErrorCode::kUnsupported,
             "{}: tensor '{}': expected an expert of {}, {} and {}, found {} too, which this version does "
             "not read",
             tensor->file, tensor->name, names.gate, names.up, names.down, tensor->describe());
      }
    }
  }

  // ---- fused ----

  ExpertLayer load_fused(const std::string& prefix) {
    const FusedReader gate_up(checkpoint_, prefix + "gate_up_proj", scheme_),
        down(checkpoint_, prefix + "down_proj", scheme_);
    const bool transposed = !fits(gate_up, down, false);
    if (gate_up.experts() != down.experts() || (transposed && !fits(gate_up, down, true))) {
      bad_tensor(down.tensor(), "experts [E, H, I] beside gate_up_proj [E, 2I, H], or both transposed",
                 fmt::format(" beside {}", gate_up.tensor().describe()));
    }
    require_fused_known(prefix, gate_up, down);
    const GateUpOrder order = fused_order(prefix);
    ExpertLayer layer;
    layer.naming = prefix + "{gate_up_proj,down_proj}";
    select(layer, gate_up.experts());
    for (const int64_t id : layer.expert_ids) {
      layer.weights.experts.push_back(
          read_fused_expert(fmt::format("{}{}", prefix, id), id, gate_up, down, transposed, order));
    }
    std::string layout = "fused";
    if (order != GateUpOrder::kGateFirst) layout += fmt::format(", {}", to_string(order));
    if (transposed) layout += ", transposed: repacked";
    layer.scheme = scheme_text(
        {fmt::format("{} ({})", gate_up.scheme(), layout), fmt::format("{} ({})", down.scheme(), layout)});
    return layer;
  }

  /// Whether the shapes of both tensors are those of gate_up [2I, H] and down [H, I].
  static bool fits(const FusedReader& gate_up, const FusedReader& down, bool transposed) {
    const auto first = gate_up.shape(transposed), second = down.shape(transposed);
    return first && second && first->first == 2 * second->second && first->second == second->first;
  }

  /// What the caller says, or the family's order: it is never guessed from numbers.
  GateUpOrder fused_order(const std::string& prefix) const {
    if (order_) return *order_;
    if (const auto order = fused_gate_up_order(checkpoint_.config())) return *order;
    fail(ErrorCode::kUnsupported,
         "{}: expected a known family, which tells how gate and up lie in '{}gate_up_proj', found {}; give "
         "--gate-up-order gate-first, up-first or interleaved",
         checkpoint_.path().string(), prefix, identity(checkpoint_.config()));
  }

  Expert read_fused_expert(const std::string& name, int64_t id, const FusedReader& gate_up,
                           const FusedReader& down, bool transposed, GateUpOrder order) {
    RepackedBytes& repacked = storage_->repacked;
    Expert expert;
    expert.name = name;
    const WeightView both = gate_up.matrix(id, transposed, repacked);
    const int64_t half = rows_of(both) / 2;
    const HalfRows rows = rows_of_halves(order, half);
    expert.gate = take_rows(both, rows.gate_first, half, rows.step);
    expert.up = take_rows(both, rows.up_first, half, rows.step);
    expert.down = down.matrix(id, transposed, repacked);
    if (const auto bias = gate_up.bias(id, 2 * half)) {
      expert.gate_bias = take_columns(*bias, rows.gate_first, half, rows.step);
      expert.up_bias = take_columns(*bias, rows.up_first, half, rows.step);
    }
    expert.down_bias = down.bias(id, rows_of(expert.down));
    expert.gate_input_scale = expert.up_input_scale = gate_up.input_scale(id);
    expert.down_input_scale = down.input_scale(id);
    return expert;
  }

  /// Every `step`-th element of a row vector from `first` on, `count` of them; copied where they are not
  /// neighbours.
  DenseView take_columns(const DenseView& row, int64_t first, int64_t count, int64_t step) {
    const int64_t size = row.row_stride_bytes / row.cols;
    DenseView part{row.type, row.data + first * size, 1, count, count * size, {}};
    if (step == 1) return part;
    std::byte* copy = storage_->repacked.add(count * size);
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(copy + i * size, row.data + (first + i * step) * size, static_cast<size_t>(size));
    }
    part.data = copy;
    return part;
  }

  void require_fused_known(const std::string& prefix, const FusedReader& gate_up,
                           const FusedReader& down) const {
    std::set<std::string> known = gate_up.tensor_names();
    known.merge(down.tensor_names());
    for (const Tensor* tensor : tensors_under(checkpoint_, prefix)) {
      if (known.contains(tensor->name)) continue;
      fail(ErrorCode::kUnsupported,
           "{}: tensor '{}': expected gate_up_proj and down_proj alone under '{}', found {} too, which "
           "this version does not read",
           tensor->file, tensor->name, prefix, tensor->describe());
    }
  }

  // ---- what both have ----

  void load_shared(ExpertLayer& layer) const {
    for (const std::string_view child : kSharedExperts) {
      const std::string name = block_.prefix + std::string(child.substr(0, child.size() - 1));
      if (tensors_under(checkpoint_, name + ".").empty()) continue;
      if (layer.weights.shared) {
        fail(ErrorCode::kBadFile, "{}: expected one of '{}' and '{}', found both",
             checkpoint_.path().string(), kSharedExperts[0], kSharedExperts[1]);
      }
      std::set<std::string> schemes;
      SharedExpert shared;
      shared.expert = read_expert(name, schemes);
      if (!shared.expert.has_gate() && layer.weights.experts.front().has_gate()) {
        fail(ErrorCode::kBadFile,
             "{}: expected a tensor '{}.{}.weight', as the routed experts have, found none",
             checkpoint_.path().string(), name, block_.names.gate);
      }
      shared.intermediate = rows_of(shared.expert.up);
      layer.shared_scheme = scheme_text(schemes);
      layer.shared_naming = fmt::format("{}.{}", name, linear_names(shared.expert));
      layer.weights.shared = std::move(shared);
    }
    const std::string gate = block_.prefix + std::string(kSharedGate);
    for (const Tensor* tensor : tensors_under(checkpoint_, gate)) {
      if (!layer.weights.shared || tensor->name != gate + "weight") {
        fail(ErrorCode::kUnsupported,
             "{}: tensor '{}': expected a shared expert and its '{}weight', found {}", tensor->file,
             tensor->name, gate, tensor->describe());
      }
      layer.weights.shared->gate = dense_tensor(*tensor, {1, cols_of(layer.weights.shared->expert.up)});
    }
  }

  /// A scheme that nothing is read by was meant for something.
  void require_four_bits_for_scheme(const ExpertLayer& layer) const {
    if (!scheme_) return;
    const auto is_four_bit = [](const Expert& expert) {
      return std::holds_alternative<BlockScaledView>(expert.gate) ||
             std::holds_alternative<BlockScaledView>(expert.up) ||
             std::holds_alternative<BlockScaledView>(expert.down);
    };
    const ExpertWeights& weights = layer.weights;
    if (std::any_of(weights.experts.begin(), weights.experts.end(), is_four_bit)) return;
    if (weights.shared && is_four_bit(weights.shared->expert)) return;
    fail(ErrorCode::kInvalidArgument, "{}: layer {}: --scheme {}: expected codes of four bits, found {}",
         checkpoint_.path().string(), layer_number_, to_string(*scheme_), layer.scheme);
  }

  /// Which of `count` experts to read.
  void select(ExpertLayer& layer, int64_t count) const {
    layer.experts_in_checkpoint = count;
    layer.expert_ids = wanted_;
    for (int64_t id = 0; wanted_.empty() && id < count; ++id) layer.expert_ids.push_back(id);
    for (const int64_t id : layer.expert_ids) {
      if (id < 0 || id >= count) {
        fail(ErrorCode::kInvalidArgument, "{}: layer {}: expert {}: expected 0 to {}",
             checkpoint_.path().string(), layer_number_, id, count - 1);
      }
    }
  }

  /// DeepSeek's n shared experts are stored as one of n times the size; Qwen and Nemotron-H give the size.
  void compare_shared(ExpertLayer& layer) const {
    const ModelConfig& config = checkpoint_.config();
    const auto count = config.shared_experts;
    std::optional<int64_t> claimed = config.shared_intermediate;
    if (!claimed && count) claimed = *count * layer.weights.intermediate;
    const int64_t found = layer.weights.shared ? layer.weights.shared->intermediate : 0;
    if (!claimed || *claimed == found) return;
    layer.notes.push_back(
        fmt::format("config.json says {}shared experts of intermediate size {} in all, the tensors have {}: "
                    "the tensors are "
                    "used",
                    count ? fmt::format("{} ", *count) : "", *claimed,
                    found > 0 ? fmt::format("size {}", found) : "none"));
  }

  void compare_with_config(ExpertLayer& layer) const {
    const ModelConfig& config = checkpoint_.config();
    const auto compare = [&](const char* what, std::optional<int64_t> claimed, int64_t found) {
      if (claimed && *claimed != found) {
        layer.notes.push_back(fmt::format("config.json says {} {}, the tensors say {}: the tensors are used",
                                          what, *claimed, found));
      }
    };
    compare("hidden size", config.hidden, layer.weights.hidden);
    compare("expert intermediate size", config.intermediate, layer.weights.intermediate);
    compare("experts", config.experts, layer.experts_in_checkpoint);
    compare_shared(layer);
    const std::vector<std::string> notes = compare_claim(config.claim, layer, block_.names.up);
    layer.notes.insert(layer.notes.end(), notes.begin(), notes.end());
  }

  std::shared_ptr<LayerStorage> storage_;
  const Checkpoint& checkpoint_;
  int64_t layer_number_;
  MoeBlock block_;
  const std::vector<int64_t>& wanted_;
  std::optional<GateUpOrder> order_;
  std::optional<WeightScheme> scheme_;
};

}  // namespace

std::string_view to_string(WeightScheme scheme) {
  for (const auto& [entry, name] : kSchemes) {
    if (entry == scheme) return name;
  }
  return "?";
}

std::optional<WeightScheme> parse_weight_scheme(std::string_view name) {
  for (const auto& [scheme, entry] : kSchemes) {
    if (entry == name) return scheme;
  }
  return std::nullopt;
}

std::string_view to_string(GateUpOrder order) {
  for (const auto& [entry, name] : kOrders) {
    if (entry == order) return name;
  }
  return "?";
}

std::optional<GateUpOrder> parse_gate_up_order(std::string_view name) {
  for (const auto& [order, entry] : kOrders) {
    if (entry == name) return order;
  }
  return std::nullopt;
}

ExpertLayer load_experts(std::shared_ptr<const Checkpoint> checkpoint, int64_t layer,
                         const std::vector<int64_t>& experts, std::optional<GateUpOrder> order,
                         std::optional<WeightScheme> scheme) {
  return LayerLoader(std::move(checkpoint), layer, experts, order, scheme).load();
}

}  // namespace fourfold
