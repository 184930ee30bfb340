#include "diagnosis/replay.h"

#include <algorithm>
#include <cmath>

#include "diagnosis/replay_stages.h"
#include "diagnosis/weight_reader.h"
#include "fourfold/quantize.h"
#include "fourfold/reference.h"
#include "fourfold/routing.h"
#include "fourfold/scale_layout.h"

namespace fourfold::diagnosis {
namespace {

constexpr size_t kCachedFirsts = 12;  // results of first GEMMs that are kept

Permutation permutation_of(const RoutedSlots& routed, const Subject& subject) {
  const Routing routing{MatrixView<const int32_t>(routed.ids.data(), subject.tokens, subject.top_k),
                        {routed.weights.data(), subject.tokens, subject.top_k}};
  return permute_by_expert(routing, subject.experts());
}

std::vector<float> x_row(const Subject& subject, int64_t token) {
  const Bf16* row = subject.x.data() + token * subject.hidden();
  return {row, row + subject.hidden()};
}

/// What another way to write the quantizer's arithmetic may do to a value.
float nudge_of(Rounding rounding) {
  return rounding == Rounding::kFused ? 1.0f + 0x1p-21f : 1.0f;
}

Sums sums_of(Rounding rounding) {
  return rounding == Rounding::kFused ? Sums::kFloat64 : Sums::kFloat32;
}

bool weight_on_input(WeightUse use, const LayerConfig& config) {
  return use == WeightUse::kOnInput ||
         (config.weight_on_input && (use == WeightUse::kRight || use == WeightUse::kTwice));
}

/// What an expert's output is multiplied by.
float output_weight(WeightUse use, const LayerConfig& config, float weight) {
  switch (use) {
    case WeightUse::kRight:
      return config.weight_on_input ? 1.0f : weight;
    case WeightUse::kMissing:
    case WeightUse::kOnInput:
      return 1.0f;
    case WeightUse::kOnOutput:
      return weight;
    case WeightUse::kTwice:
      return config.weight_on_input ? weight : weight * weight;
  }
  return weight;
}

bool is_missing(Missing missing, int64_t expert, int64_t experts) {
  return (missing == Missing::kUpperExperts && expert >= experts / 2) ||
         (missing == Missing::kLowerExperts && expert < experts / 2);
}

bool mixes_up_output(TokenOrder order) {
  return order == TokenOrder::kNext || order == TokenOrder::kPrevious || order == TokenOrder::kReversed;
}

}  // namespace

int64_t source_token(TokenOrder order, int64_t token, int64_t tokens) {
  if (order == TokenOrder::kNext) return (token + 1) % tokens;
  if (order == TokenOrder::kPrevious) return (token + tokens - 1) % tokens;
  return order == TokenOrder::kReversed ? tokens - 1 - token : token;
}

/// A sampled (token, k).
struct Replay::Slot {
  int64_t slot = 0;     // in the whole batch, of the token that is computed here
  int64_t expert = -1;  // that the routing names; -1: elsewhere
  int64_t read = -1;    // whose weights are read
  int64_t x_token = 0;
  float weight = 0.0f;
};

struct Replay::FirstResult {
  FirstDeviation deviation;
  Staging staging;
  Rounding rounding = Rounding::kSpecified;
  std::vector<Slot> slots;
  std::vector<float> h;
};

/// Experts of a layer, those that were needed replaced.
struct Replay::Converted {
  WeightSource source = WeightSource::kStored;
  ExpertWeights weights;
  std::vector<bool> done;
  std::vector<std::shared_ptr<const void>> storage;
};

Replay::Replay(const Subject& subject, std::vector<int64_t> tokens)
    : subject_(subject), tokens_(std::move(tokens)) {
  if (!subject.weights->shared) return;
  shared_layer_ = shared_as_layer(*subject.weights);
  shared_weights_.resize(static_cast<size_t>(subject.tokens));
  reference::weigh_shared({subject.x.data(), subject.tokens, subject.hidden()}, *subject.weights->shared,
                          shared_weights_);
}

Replay::~Replay() = default;

int64_t Replay::read_expert(const FirstDeviation& deviation, const Permutation& permutation, int64_t slot,
                            int64_t expert) const {
  const int64_t experts = subject_.experts(), ranks = deviation.expert_ranks;
  switch (deviation.expert_map) {
    case ExpertMap::kRight:
      return expert;
    case ExpertMap::kNext:
      return (expert + 1) % experts;
    case ExpertMap::kPrevious:
      return (expert + experts - 1) % experts;
    case ExpertMap::kModuloRanks:
      return expert % (experts / ranks);
    case ExpertMap::kRoundRobin:
      return expert % ranks * (experts / ranks) + expert / ranks;
    case ExpertMap::kOfTile: {
      const int32_t row = permutation.row_of_slot[static_cast<size_t>(slot)];
      const auto& offsets = permutation.group_offsets;
      const int32_t first = row / deviation.expert_tile * deviation.expert_tile;
      return std::upper_bound(offsets.begin(), offsets.end(), first) - offsets.begin() - 1;
    }
  }
  return expert;
}

std::vector<Replay::Slot> Replay::make_slots(const FirstDeviation& deviation,
                                             const RoutedSlots& routed) const {
  Permutation permutation;
  if (deviation.expert_map == ExpertMap::kOfTile) permutation = permutation_of(routed, subject_);
  std::vector<Slot> slots;
  for (const int64_t token : tokens_) {
    const int64_t source = source_token(deviation.tokens, token, subject_.tokens);
    for (int64_t k = 0; k < subject_.top_k; ++k) {
      Slot& slot = slots.emplace_back();
      slot.slot = source * subject_.top_k + k;
      slot.expert = routed.ids[static_cast<size_t>(slot.slot)];
      slot.weight = routed.weights[static_cast<size_t>(slot.slot)];
      slot.x_token = deviation.tokens == TokenOrder::kSlotModulo ? slot.slot % subject_.tokens : source;
      if (slot.expert >= 0) slot.read = read_expert(deviation, permutation, slot.slot, slot.expert);
    }
  }
  return slots;
}

const ExpertWeights& Replay::weights_of(WeightSource source, const std::vector<Slot>& slots) {
  if (source == WeightSource::kStored) return *subject_.weights;
  if (source == WeightSource::kLayerBefore) return *subject_.layer_before;
  if (source == WeightSource::kLayerAfter) return *subject_.layer_after;
  auto found = std::find_if(converted_.begin(), converted_.end(),
                            [&](const auto& entry) { return entry->source == source; });
  if (found == converted_.end()) {
    found = converted_.insert(converted_.end(), std::make_unique<Converted>());
    (*found)->source = source;
    (*found)->weights = *subject_.weights;
    (*found)->weights.shared.reset();
    (*found)->done.resize(static_cast<size_t>(subject_.experts()));
  }
  Converted& converted = **found;
  for (const Slot& slot : slots) {
    if (slot.read < 0 || converted.done[static_cast<size_t>(slot.read)]) continue;
    ExpertWeights alone = *subject_.weights;
    alone.shared.reset();
    alone.experts = {subject_.weights->experts[static_cast<size_t>(slot.read)]};
    alone = source == WeightSource::kFolded ? fold_gate_up(alone) : quantize_again(alone);
    converted.weights.experts[static_cast<size_t>(slot.read)] = alone.experts.front();
    converted.storage.push_back(alone.storage);
    converted.done[static_cast<size_t>(slot.read)] = true;
  }
  return converted.weights;
}

namespace {

/// Stages rows of x, with what faults there do to them.
class XStaging {
 public:
  XStaging(const Subject& subject, const FirstDeviation& deviation, const Staging& staging,
           const RoutedSlots& routed, Rounding rounding)
      : subject_(subject),
        deviation_(deviation),
        staging_(staging),
        routed_(routed),
        nudge_(nudge_of(rounding)) {
    scales_ = x_input_scales(*subject.weights);
    largest_ = *std::max_element(scales_.begin(), scales_.end());
    const bool in_rows = deviation.scale_groups_unpadded || deviation.rows_padded_to > 0 ||
                         deviation.reading.tail == KTail::kOverRead;
    if (in_rows) permutation_ = permutation_of(routed, subject);
  }

  StagedRow stage(int64_t slot, int64_t token, int64_t expert) const {
    StagedRow row =
        deviation_.rows_padded_to > 0 ? stage_padded(slot, token, expert) : stage_plain(slot, token, expert);
    if (deviation_.scale_groups_unpadded) misread_scales(slot, row);
    if (deviation_.reading.tail == KTail::kOverRead) read_beyond(slot, row);
    return row;
  }

 private:
  StagedRow stage_plain(int64_t slot, int64_t token, int64_t expert) const {
    std::vector<float> row = x_row(subject_, token);
    if (weight_on_input(deviation_.weight, subject_.config)) {
      for (float& value : row) value = round_bf16(value * routed_.weights[static_cast<size_t>(slot)]);
    }
    const RowScales scales = row_scales(staging_.policy, deviation_.input_scale, row,
                                        scales_[static_cast<size_t>(expert)], scales_[0], largest_);
    return stage_row(staging_.format, row, scales, nudge_);
  }

  StagedRow stage_permuted(int64_t row) const {
    const int64_t slot = permutation_.slot_of_row[static_cast<size_t>(row)];
    const int64_t token =
        deviation_.tokens == TokenOrder::kSlotModulo ? slot % subject_.tokens : slot / subject_.top_k;
    return stage_plain(slot, token, routed_.ids[static_cast<size_t>(slot)]);
  }

  /// What lies at this slot's row where groups are padded: another slot's row, or zeros.
  StagedRow stage_padded(int64_t slot, int64_t token, int64_t expert) const {
    const int64_t row = permutation_.row_of_slot[static_cast<size_t>(slot)], tile = deviation_.rows_padded_to;
    StagedRow own = stage_plain(slot, token, expert);
    int64_t first = 0;  // of the group, with padding
    for (size_t group = 0; group + 1 < permutation_.group_offsets.size(); ++group) {
      const int64_t start = permutation_.group_offsets[group];
      const int64_t size = permutation_.group_offsets[group + 1] - start;
      if (row >= first && row < first + size) {
        StagedRow found = stage_permuted(start + row - first);
        if (!has_scale_by_token()) found.alpha = own.alpha;
        return found;
      }
      first += round_up(size, tile);
    }
    std::fill(own.codes.begin(), own.codes.end(), uint8_t{0});
    std::fill(own.values.begin(), own.values.end(), 0.0f);
    return own;
  }

  bool has_scale_by_token() const {
    return staging_.format == ActivationFormat::kFp8 || staging_.policy == ScalePolicy::kDynamicToken;
  }

  /// The rows of x that lie behind this one; zeros behind the last. A narrow row needs several to fill a
  /// tile.
  void read_beyond(int64_t slot, StagedRow& row) const {
    const int64_t cols = subject_.hidden(), tile = deviation_.reading.tail_tile;
    const int64_t next = permutation_.row_of_slot[static_cast<size_t>(slot)] + 1;
    const int64_t missing = round_up(cols, tile) - cols;
    row.beyond.assign(static_cast<size_t>(missing), 0.0f);
    for (int64_t filled = 0; filled < missing && next + filled / cols < permutation_.rows(); filled += cols) {
      const StagedRow behind = stage_permuted(next + filled / cols);
      std::copy_n(behind.values.begin(), std::min(cols, missing - filled), row.beyond.begin() + filled);
    }
  }

  /// Groups are padded to 128 rows; the engine looks for this row's group as if they were not.
  void misread_scales(int64_t slot, StagedRow& row) const {
    const auto& offsets = permutation_.group_offsets;
    const std::vector<int64_t> padded = padded_group_rows(offsets);
    const int64_t at_row = permutation_.row_of_slot[static_cast<size_t>(slot)];
    const int64_t group = std::upper_bound(offsets.begin(), offsets.end(), at_row) - offsets.begin() - 1;
    const auto blocks = static_cast<int64_t>(row.scales.size());
    const int64_t bytes_a_row = round_up(blocks, kScaleTileCols), first = offsets[static_cast<size_t>(group)];
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t at = first * bytes_a_row + swizzled_scale_offset(at_row - first, block, blocks);
      row.scales[static_cast<size_t>(block)] = swizzled_byte(at, padded, bytes_a_row, blocks);
    }
    decode_staged(row);
  }

  uint8_t swizzled_byte(int64_t at, const std::vector<int64_t>& padded, int64_t bytes_a_row,
                        int64_t blocks) const {
    const int64_t group =
        std::upper_bound(padded.begin(), padded.end(), at / bytes_a_row) - padded.begin() - 1;
    if (group >= subject_.experts()) return 0;
    const int64_t offset = at - padded[static_cast<size_t>(group)] * bytes_a_row, tile = offset / 512;
    const int64_t tiles_across = bytes_a_row / kScaleTileCols, within = offset % 512;
    const int64_t row = tile / tiles_across * kScaleTileRows + within / 16 + within % 16 / 4 * 32;
    const int64_t block = tile % tiles_across * kScaleTileCols + within % 4;
    const int64_t first = permutation_.group_offsets[static_cast<size_t>(group)];
    if (block >= blocks || first + row >= permutation_.group_offsets[static_cast<size_t>(group + 1)])
      return 0;
    return stage_permuted(first + row).scales[static_cast<size_t>(block)];
  }

  const Subject& subject_;
  const FirstDeviation& deviation_;
  const Staging& staging_;
  const RoutedSlots& routed_;
  float nudge_;
  std::vector<float> scales_;
  float largest_ = 1.0f;
  Permutation permutation_;
};

void round_all(std::vector<float>& values, Rounding rounding) {
  if (rounding == Rounding::kFused) return;
  for (float& value : values) value = round_bf16(value);
}

}  // namespace

Replay::FirstResult Replay::compute_first(const FirstDeviation& deviation, const Staging& staging,
                                          Rounding rounding) {
  FirstResult result{deviation, staging, rounding, {}, {}};
  const RoutedSlots routed = route_with(subject_, deviation.routing);
  result.slots = make_slots(deviation, routed);
  const XStaging x(subject_, deviation, staging, routed, rounding);
  std::vector<StagedRow> rows;
  std::vector<int64_t> experts;
  for (const Slot& slot : result.slots) {
    const int64_t scaled_by = deviation.own_input_scales ? slot.expert : slot.read;
    rows.push_back(slot.read < 0 ? StagedRow{} : x.stage(slot.slot, slot.x_token, scaled_by));
    experts.push_back(slot.read);
  }
  const WeightReader reader(weights_of(deviation.source, result.slots), deviation);
  result.h.assign(result.slots.size() * static_cast<size_t>(reader.rows()), 0.0f);
  multiply(reader, rows, experts, 0, reader.cols(), {}, sums_of(rounding), result.h.data());
  round_all(result.h, rounding);
  return result;
}

const Replay::FirstResult& Replay::first(const FirstDeviation& deviation, const Staging& staging,
                                         Rounding rounding) {
  const auto found = std::find_if(cache_.begin(), cache_.end(), [&](const FirstResult& entry) {
    return entry.rounding == rounding && entry.staging == staging && entry.deviation == deviation;
  });
  if (found != cache_.end()) {
    cache_.splice(cache_.begin(), cache_, found);
  } else {
    cache_.push_front(compute_first(deviation, staging, rounding));
    if (cache_.size() > kCachedFirsts) cache_.pop_back();
  }
  return cache_.front();
}

void Replay::activate(const FirstResult& before, const ActivationChange& change, Rounding rounding,
                      Stages& stages) const {
  const size_t count = before.slots.size(), inner = static_cast<size_t>(subject_.intermediate());
  const size_t width = before.h.size() / std::max<size_t>(1, count);
  stages.h = before.h;
  stages.activation.assign(count * inner, 0.0f);
  for (size_t r = 0; r < count; ++r) {
    if (before.slots[r].read < 0) continue;
    activate_row(subject_.config.activation, change, {before.h.data() + r * width, width},
                 {stages.activation.data() + r * inner, inner});
  }
  round_all(stages.activation, rounding);
}

std::vector<float> Replay::second(const FirstResult& before, const Deviation& deviation,
                                  const Staging& staging, Rounding rounding,
                                  const std::vector<float>& activation, std::vector<float>& weights) {
  const std::vector<float> scales = intermediate_input_scales(*subject_.weights);
  const float largest = *std::max_element(scales.begin(), scales.end());
  const size_t count = before.slots.size(), inner = static_cast<size_t>(subject_.intermediate());
  std::vector<StagedRow> rows(count);
  std::vector<int64_t> experts(count, -1);
  std::vector<float> bias_factor(count, deviation.down_bias == DownBias::kMissing ? 0.0f : 1.0f);
  for (size_t r = 0; r < count; ++r) {
    const Slot& slot = before.slots[r];
    if (slot.read < 0 || is_missing(deviation.missing, slot.expert, subject_.experts())) {
      weights[r] = 0.0f;
      continue;
    }
    const std::span row(activation.data() + r * inner, inner);
    const int64_t scaled_by = deviation.first.own_input_scales ? slot.expert : slot.read;
    const RowScales globals = row_scales(staging.policy, deviation.intermediate_scale, row,
                                         scales[static_cast<size_t>(scaled_by)], scales[0], largest);
    rows[r] = stage_row(staging.format, row, globals, nudge_of(rounding));
    experts[r] = slot.read;
    weights[r] = output_weight(deviation.first.weight, subject_.config, slot.weight);
    if (deviation.down_bias == DownBias::kUnweighted && weights[r] != 0.0f)
      bias_factor[r] = 1.0f / weights[r];
  }
  const WeightReader reader(weights_of(deviation.first.source, before.slots), deviation.down);
  std::vector<float> z(count * static_cast<size_t>(subject_.hidden()), 0.0f);
  const int64_t last = subject_.intermediate(), middle = last / 2;
  multiply(reader, rows, experts, deviation.missing == Missing::kLowerInner ? middle : 0,
           deviation.missing == Missing::kUpperInner ? middle : last, bias_factor, sums_of(rounding),
           z.data());
  return z;
}

void Replay::combine(const Deviation& deviation, const Staging& staging, Rounding rounding,
                     const std::vector<float>& weights, const std::vector<float>& z, Stages& stages) {
  const auto hidden = static_cast<size_t>(subject_.hidden()), top_k = static_cast<size_t>(subject_.top_k);
  stages.output.assign(tokens_.size() * hidden, 0.0f);
  for (size_t r = 0; r < weights.size(); ++r) {
    if (weights[r] == 0.0f) continue;
    float* const sum = stages.output.data() + r / top_k * hidden;
    for (size_t col = 0; col < hidden; ++col) {
      sum[col] += weights[r] * z[r * hidden + col];
      if (rounding == Rounding::kFused) sum[col] = round_bf16(sum[col]);
    }
  }
  add_shared(deviation, staging, rounding, stages);
  for (float& value : stages.output) value = round_bf16(value);
}

Stages Replay::run(const Deviation& deviation, const Staging& staging, Rounding rounding) {
  ++runs_;
  const FirstResult& before = first(deviation.first, staging, rounding);
  Stages stages;
  activate(before, deviation.activation, rounding, stages);
  std::vector<float> weights(before.slots.size());
  std::vector<float> z = second(before, deviation, staging, rounding, stages.activation, weights);
  round_all(z, rounding);
  combine(deviation, staging, rounding, weights, z, stages);
  if (mixes_up_output(deviation.first.tokens)) {
    stages.h.clear();
    stages.activation.clear();
  }
  return stages;
}

Stages Replay::run_after(const Stages& given, const Staging& staging) {
  ++runs_;
  const FirstResult& before = first({}, staging, Rounding::kSpecified);
  FirstResult forced = before;
  if (!given.h.empty()) forced.h = given.h;
  Stages stages;
  activate(forced, {}, Rounding::kSpecified, stages);
  stages.h = before.h;
  std::vector<float> weights(before.slots.size());
  std::vector<float> z = second(before, {}, staging, Rounding::kSpecified,
                                given.activation.empty() ? stages.activation : given.activation, weights);
  round_all(z, Rounding::kSpecified);
  combine({}, staging, Rounding::kSpecified, weights, z, stages);
  return stages;
}

const std::vector<float>& Replay::shared_output(const Deviation& deviation, TokenOrder order,
                                                const Staging& staging, Rounding rounding) {
  const SharedKey key{order, deviation.shared.not_clamped, staging, rounding};
  for (const auto& [other, output] : shared_) {
    if (other == key) return output;
  }
  const SharedExpert& shared = *subject_.weights->shared;
  const Staging own = is_all_nvfp4(shared.expert) ? staging : Staging{};
  const int64_t inner = shared.intermediate, hidden = subject_.hidden();
  const WeightReader first(*shared_layer_, FirstDeviation{}), second(*shared_layer_, WeightReading{});
  const std::vector<float> x_scale = x_input_scales(*shared_layer_),
                           inner_scale = intermediate_input_scales(*shared_layer_);
  std::vector<StagedRow> rows;
  for (const int64_t token : tokens_) {
    const std::vector<float> row = x_row(subject_, source_token(order, token, subject_.tokens));
    rows.push_back(
        stage_row(own.format, row,
                  row_scales(own.policy, InputScaleUse::kRight, row, x_scale[0], x_scale[0], x_scale[0])));
  }
  const std::vector<int64_t> experts(tokens_.size(), 0);
  std::vector<float> h(tokens_.size() * static_cast<size_t>(first.rows()));
  multiply(first, rows, experts, 0, first.cols(), {}, sums_of(rounding), h.data());
  round_all(h, rounding);
  ActivationChange change;
  if (deviation.shared.not_clamped) change.limit = INFINITY;
  for (size_t r = 0; r < tokens_.size(); ++r) {
    std::vector<float> activation(static_cast<size_t>(inner));
    activate_row(subject_.config.shared_activation, change,
                 {h.data() + static_cast<int64_t>(r) * first.rows(), static_cast<size_t>(first.rows())},
                 activation);
    round_all(activation, rounding);
    rows[r] = stage_row(own.format, activation,
                        row_scales(own.policy, InputScaleUse::kRight, activation, inner_scale[0],
                                   inner_scale[0], inner_scale[0]));
  }
  std::vector<float> z(tokens_.size() * static_cast<size_t>(hidden));
  multiply(second, rows, experts, 0, inner, {}, sums_of(rounding), z.data());
  round_all(z, rounding);
  return shared_.emplace_back(key, std::move(z)).second;
}

void Replay::add_shared(const Deviation& deviation, const Staging& staging, Rounding rounding,
                        Stages& stages) {
  if (!shared_layer_ || deviation.shared.times == 0) return;
  const TokenOrder order =
      deviation.first.tokens == TokenOrder::kSlotModulo ? TokenOrder::kRight : deviation.first.tokens;
  const std::vector<float>& z = shared_output(deviation, order, staging, rounding);
  for (size_t s = 0; s < tokens_.size(); ++s) {
    const int64_t source = source_token(order, tokens_[s], subject_.tokens);
    const float gate = deviation.shared.gate_ignored ? 1.0f : shared_weights_[static_cast<size_t>(source)];
    const float factor = gate * deviation.shared.factor * static_cast<float>(deviation.shared.times);
    const auto hidden = static_cast<size_t>(subject_.hidden());
    for (size_t col = s * hidden; col < (s + 1) * hidden; ++col) stages.output[col] += factor * z[col];
  }
}

}  // namespace fourfold::diagnosis
