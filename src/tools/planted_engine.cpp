#include "tools/planted_engine.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <map>

#include "tools/planted_numbers.h"
#include "tools/planted_parts.h"

namespace fourfold {
namespace {

using diagnosis::Candidate;
using diagnosis::Fault;
using diagnosis::Staging;
using diagnosis::Subject;
using planted::bf16;
using planted::decoded;
using planted::e4m3_table;
using planted::nearest;
using planted::quantize_block;
using planted::tiled;

class Engine {
 public:
  Engine(const Subject& subject, const EngineStyle& style, const std::vector<Fault>& faults)
      : subject_(subject),
        style_(style),
        planted_(faults),
        x_faults_(input_scale_faults("x")),
        inner_faults_(input_scale_faults("intermediate")) {}

  Candidate run() {
    loaded_ = planted::load_weights(subject_, planted_);
    routes_ = planted::route_tokens(subject_, planted_);
    sort_slots();
    Candidate candidate;
    const auto slots = static_cast<size_t>(subject_.tokens * subject_.top_k);
    const auto hidden = static_cast<size_t>(subject_.hidden());
    std::vector<float> h(slots * static_cast<size_t>(loaded_.w13.rows)),
        a(slots * static_cast<size_t>(loaded_.w2.cols)), z(slots * hidden);
    for (size_t slot = 0; slot < slots; ++slot) {
      if (routes_.ids[slot] >= 0) run_slot(static_cast<int64_t>(slot), h, a, z);
    }
    candidate.output = sum_up(z);
    if (style_.keeps_stages) {
      candidate.h = std::move(h);
      candidate.activation = std::move(a);
    }
    return candidate;
  }

 private:
  const Fault* find(std::string_view id) const { return planted_.find(id); }
  bool has(std::string_view id) const { return planted_.has(id); }
  bool has_at(const std::string& id, const std::string& site) const { return planted_.has_at(id, site); }

  struct InputScaleFaults {
    bool of_first, stale, one, dropped, reciprocal, reciprocal_in_staging;
  };
  InputScaleFaults input_scale_faults(const std::string& site) const {
    return {has_at("input-scale-of-expert-0", site), has_at("input-scale-stale-in-alpha", site),
            has_at("input-scale-one", site),         has_at("input-scale-dropped", site),
            has_at("input-scale-reciprocal", site),  has_at("input-scale-reciprocal-in-staging", site)};
  }

  void sort_slots() {
    for (size_t slot = 0; slot < routes_.ids.size(); ++slot) {
      if (routes_.ids[slot] >= 0) sorted_.push_back(static_cast<int64_t>(slot));
    }
    std::stable_sort(sorted_.begin(), sorted_.end(), [&](int64_t a, int64_t b) {
      return routes_.ids[static_cast<size_t>(a)] < routes_.ids[static_cast<size_t>(b)];
    });
    row_of_slot_.resize(routes_.ids.size());
    for (size_t row = 0; row < sorted_.size(); ++row) row_of_slot_[static_cast<size_t>(sorted_[row])] = row;
  }

  int64_t weights_for(int64_t slot) const {
    const int64_t id = routes_.ids[static_cast<size_t>(slot)];
    if ((has("expert-next") || has("expert-next-in-gemms"))) return id + 1 == loaded_.experts ? 0 : id + 1;
    if ((has("expert-previous") || has("expert-previous-in-gemms")))
      return id == 0 ? loaded_.experts - 1 : id - 1;
    if (const Fault* map = planted_.find_prefix("expert-map-first-of-")) {
      const int64_t local = loaded_.experts / map->code;
      return id - id / local * local;
    }
    if (const Fault* map = planted_.find_prefix("expert-map-round-robin-")) {
      const int64_t rank = id % map->code, place = id / map->code;
      return rank * (loaded_.experts / map->code) + place;
    }
    if (const Fault* tile = planted_.find_prefix("expert-of-tile-")) {
      const size_t row = row_of_slot_[static_cast<size_t>(slot)];
      return routes_.ids[static_cast<size_t>(sorted_[row - row % static_cast<size_t>(tile->code)])];
    }
    return id;
  }

  std::vector<float> x_of(int64_t slot) const {
    const int64_t token = has("tokens-slot-modulo") ? slot % subject_.tokens : slot / subject_.top_k;
    std::vector<float> row(static_cast<size_t>(subject_.hidden()));
    for (size_t i = 0; i < row.size(); ++i) {
      const uint16_t bits =
          std::bit_cast<uint16_t>(subject_.x[static_cast<size_t>(token * subject_.hidden()) + i]);
      row[i] = std::bit_cast<float>(uint32_t{bits} << 16);
    }
    const bool on_input = has("weight-on-input") || (subject_.config.weight_on_input &&
                                                     !has("weight-on-output") && !has("weight-missing"));
    if (on_input) {
      for (float& value : row) value = bf16(value * routes_.weights[static_cast<size_t>(slot)]);
    }
    return row;
  }

  float input_scale(const Expert& expert, bool is_x) const {
    if (!is_x) return expert.down_input_scale.value_or(0.0f);
    return std::max(expert.gate_input_scale.value_or(0.0f), expert.up_input_scale.value_or(0.0f));
  }

  /// Quantizes a row; returns what alpha has of its scale.
  float stage(std::vector<float>& row, int64_t expert, bool is_x,
              std::vector<uint8_t>* scales = nullptr) const {
    const Staging& staging = style_.staging;
    if (staging.format == ActivationFormat::kBf16) return 1.0f;
    float amax = 0.0f;
    for (const float value : row) amax = std::max(amax, std::abs(value));
    if (staging.format == ActivationFormat::kFp8) return stage_fp8(row, amax);
    float global = amax == 0.0f ? 1.0f : amax / 2688.0f;
    const auto& experts = subject_.weights->experts;
    const float first = input_scale(experts[0], is_x);
    if (staging.policy == ScalePolicy::kStatic)
      global = input_scale(experts[static_cast<size_t>(expert)], is_x);
    if (staging.policy == ScalePolicy::kMaxOverExperts) {
      for (const Expert& other : experts)
        global = std::max(&other == &experts[0] ? 0.0f : global, input_scale(other, is_x));
    }
    const InputScaleFaults& wrong = is_x ? x_faults_ : inner_faults_;
    float alpha = global;
    if (wrong.of_first) global = alpha = first;
    if (wrong.stale) alpha = first;
    if (wrong.one) global = alpha = 1.0f;
    if (wrong.dropped) alpha = 1.0f;
    if (wrong.reciprocal) alpha = 1.0f / global;
    const float divisor = wrong.reciprocal_in_staging ? 1.0f / global : global;
    for (size_t k = 0; k < row.size(); k += 16) {
      const uint8_t code = quantize_block(row.data() + k, global, divisor, false, style_.reciprocal_multiply);
      if (scales) scales->push_back(code);
    }
    return alpha;
  }

  static float stage_fp8(std::vector<float>& row, float amax) {
    const float scale = amax == 0.0f ? 1.0f : amax / 448.0f;
    for (float& value : row) {
      const float magnitude =
          e4m3_table()[static_cast<size_t>(nearest(e4m3_table(), std::abs(value / scale)))];
      value = value < 0.0f ? -magnitude : magnitude;
    }
    return scale;
  }

  /// Scales of x as the kernel finds them: groups begin at multiples of 128 rows, it looks elsewhere.
  void misread_scales(int64_t slot, std::vector<float>& row) {
    const int64_t blocks = subject_.hidden() / 16, across = (blocks + 3) / 4 * 4;
    if (x_scales_.empty()) swizzle_x_scales(blocks, across);
    const auto at_row = static_cast<int64_t>(row_of_slot_[static_cast<size_t>(slot)]);
    int64_t first = at_row;
    while (first > 0 && routes_.ids[static_cast<size_t>(sorted_[static_cast<size_t>(first - 1)])] ==
                            routes_.ids[static_cast<size_t>(slot)])
      --first;
    std::vector<uint8_t> own;
    std::vector<float> staged = x_of(slot);
    stage(staged, weights_for(slot), true, &own);
    for (int64_t b = 0; b < blocks; ++b) {
      const auto at = static_cast<size_t>(first * across + tiled(at_row - first, b, blocks));
      const float found = at < x_scales_.size() ? e4m3_table()[x_scales_[at]] : 0.0f;
      const float right = e4m3_table()[own[static_cast<size_t>(b)]];
      for (int64_t k = b * 16; k < (b + 1) * 16; ++k)
        row[static_cast<size_t>(k)] = right == 0.0f ? 0.0f : row[static_cast<size_t>(k)] / right * found;
    }
  }

  void swizzle_x_scales(int64_t blocks, int64_t across) {
    std::map<int32_t, std::vector<int64_t>> groups;
    for (const int64_t slot : sorted_) groups[routes_.ids[static_cast<size_t>(slot)]].push_back(slot);
    for (const auto& [expert, slots] : groups) {
      const size_t base = x_scales_.size();
      x_scales_.resize(base +
                       static_cast<size_t>((static_cast<int64_t>(slots.size()) + 127) / 128 * 128 * across));
      for (size_t row = 0; row < slots.size(); ++row) {
        std::vector<float> x = x_of(slots[row]);
        std::vector<uint8_t> scales;
        stage(x, weights_for(slots[row]), true, &scales);
        for (int64_t b = 0; b < blocks; ++b)
          x_scales_[base + static_cast<size_t>(tiled(static_cast<int64_t>(row), b, blocks))] =
              scales[static_cast<size_t>(b)];
      }
    }
  }

  /// Sums in eight lanes, from the end.
  static float multiply_add(const float* a, const float* b, int64_t count) {
    std::array<float, 8> lanes{};
    for (int64_t k = count; k-- > 0;) lanes[static_cast<size_t>(k % 8)] += a[k] * b[k];
    return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
  }

  float rounded(float value) const { return style_.fused ? value : bf16(value); }

  void run_slot(int64_t slot, std::vector<float>& h, std::vector<float>& a, std::vector<float>& z) {
    const int64_t expert = weights_for(slot);
    std::vector<float> x = x_of(slot);
    const bool own_scales = has("expert-next-in-gemms") || has("expert-previous-in-gemms");
    const int64_t scaled_by = own_scales ? routes_.ids[static_cast<size_t>(slot)] : expert;
    float alpha = stage(x, scaled_by, true);
    if (const Fault* tile = planted_.find_prefix("padding-rows-read-"))
      alpha = take_padded_row(slot, tile->code, x);
    if (has("x-scales-unpadded-groups")) misread_scales(slot, x);
    std::vector<float> beyond;
    if (const Fault* tail = find("k-tail-over-read.w13")) beyond = row_behind(slot, tail->code);
    float* const h_row = h.data() + slot * loaded_.w13.rows;
    for (int64_t n = 0; n < loaded_.w13.rows; ++n) {
      const int64_t row = expert * loaded_.w13.rows + n;
      const float* const weight = loaded_.w13.values.data() + row * loaded_.w13.cols;
      float sum = multiply_add(x.data(), weight, loaded_.w13.cols);
      if (n + 1 < loaded_.w13.rows && !beyond.empty())
        sum += multiply_add(beyond.data(), weight + loaded_.w13.cols, static_cast<int64_t>(beyond.size()));
      h_row[n] = rounded(sum * (alpha * loaded_.w13.globals[static_cast<size_t>(row)]) +
                         loaded_.w13.biases[static_cast<size_t>(row)]);
    }
    std::vector<float> inner(static_cast<size_t>(loaded_.inner));
    for (int64_t i = 0; i < loaded_.inner; ++i) {
      const bool gated = loaded_.w13.rows != loaded_.inner;
      inner[static_cast<size_t>(i)] =
          rounded(activate(h_row[i], h_row[gated ? loaded_.inner + i : i], subject_.config.activation, true));
    }
    std::copy(inner.begin(), inner.end(), a.begin() + slot * loaded_.inner);
    const float alpha2 = stage(inner, scaled_by, false);
    const int64_t begin = has("ranks-lower-inner-missing") ? loaded_.inner / 2 : 0;
    const int64_t end = has("ranks-upper-inner-missing") ? loaded_.inner / 2 : loaded_.inner;
    for (int64_t n = 0; n < loaded_.w2.rows; ++n) {
      const int64_t row = expert * loaded_.w2.rows + n;
      const float sum = multiply_add(inner.data() + begin,
                                     loaded_.w2.values.data() + row * loaded_.w2.cols + begin, end - begin);
      z[static_cast<size_t>(slot * loaded_.w2.rows + n)] =
          sum * (alpha2 * loaded_.w2.globals[static_cast<size_t>(row)]);
    }
  }

  /// Rows lie in groups that are padded to `tile`; the kernel takes the row that lies where this slot's would
  /// without padding. Returns alpha, of which a scale by token comes with the row.
  float take_padded_row(int64_t slot, int tile, std::vector<float>& row) {
    if (padded_slots_.empty()) {
      for (size_t at = 0; at < sorted_.size(); ++at) {
        const bool opens_group = at == 0 || routes_.ids[static_cast<size_t>(sorted_[at])] !=
                                                routes_.ids[static_cast<size_t>(sorted_[at - 1])];
        while (opens_group && padded_slots_.size() % static_cast<size_t>(tile) != 0)
          padded_slots_.push_back(-1);
        padded_slots_.push_back(sorted_[at]);
      }
    }
    std::vector<float> own = x_of(slot);
    const float own_alpha = stage(own, weights_for(slot), true);
    const int64_t found = padded_slots_[row_of_slot_[static_cast<size_t>(slot)]];
    if (found < 0) {
      std::fill(row.begin(), row.end(), 0.0f);
      return own_alpha;
    }
    row = x_of(found);
    const float alpha = stage(row, weights_for(found), true);
    const bool by_row = style_.staging.format == ActivationFormat::kFp8 ||
                        style_.staging.policy == ScalePolicy::kDynamicToken;
    return by_row ? alpha : own_alpha;
  }

  std::vector<float> row_behind(int64_t slot, int tile) const {
    const auto count = static_cast<size_t>((tile - subject_.hidden() % tile) % tile);
    const size_t next = row_of_slot_[static_cast<size_t>(slot)] + 1;
    if (next >= sorted_.size()) return std::vector<float>(count);
    std::vector<float> row = x_of(sorted_[next]);
    stage(row, weights_for(sorted_[next]), true);
    row.resize(count);
    return row;
  }

  static float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

  float activate(float g, float u, ActivationFunction f, bool faulty) const {
    const auto broken = [&](std::string_view id) { return faulty && has(id); };
    faulty = faulty && planted_.is_any_in(diagnosis::FaultPlace::kActivation);
    if (f.kind == ActivationKind::kReluSquared) {
      if (broken("activation-silu")) return u * sigmoid(u);
      const float positive = u > 0.0f ? u : 0.0f;
      return broken("activation-relu") ? positive : positive * positive;
    }
    if (broken("clamp-missing") || has("clamp-missing-everywhere")) f.limit = INFINITY;
    if (broken("clamp-unasked-7")) f.limit = 7.0f;
    if (broken("clamp-unasked-10")) f.limit = 10.0f;
    if (const Fault* limit = faulty ? planted_.find_prefix("clamp-limit-") : nullptr) f.limit = limit->value;
    if (broken("activation-alpha")) f.alpha = f.alpha == 1.0f ? 1.702f : 1.0f;
    if (broken("activation-beta")) f.beta = f.beta == 0.0f ? 1.0f : 0.0f;
    if (broken("activation-gelu")) return g * 0.5f * std::erfc(-g * 0.70710678f) * u;
    if (broken("activation-gelu-tanh"))
      return 0.5f * g * (1.0f + std::tanh(0.7978845608f * (g + 0.044715f * g * g * g))) * u;
    const float up = broken("clamp-gate-alone")      ? u
                     : broken("clamp-up-from-above") ? std::min(u, f.limit)
                                                     : std::clamp(u, -f.limit, f.limit);
    if (f.kind == ActivationKind::kSwigluStep || broken("clamp-after-silu"))
      return std::min(g * sigmoid(g), f.limit) * up;
    float gate = broken("clamp-up-alone") ? g : std::min(g, f.limit);
    if (broken("clamp-gate-both-sides")) gate = std::max(gate, -f.limit);
    return gate * sigmoid(f.alpha * gate) * (up + f.beta);
  }

  float output_weight(int64_t slot) const {
    const float weight = routes_.weights[static_cast<size_t>(slot)];
    const bool on_input = subject_.config.weight_on_input;
    if (has("weight-missing") || has("weight-on-input")) return 1.0f;
    if (has("weight-on-output")) return weight;
    if (has("weight-twice")) return on_input ? weight : weight * weight;
    return on_input ? 1.0f : weight;
  }

  void add_slot(int64_t slot, const std::vector<float>& z, std::vector<float>& sum) const {
    const int64_t id = routes_.ids[static_cast<size_t>(slot)];
    const bool missing = (has("ranks-upper-experts-missing") && id >= loaded_.experts / 2) ||
                         (has("ranks-lower-experts-missing") && id < loaded_.experts / 2);
    if (id < 0 || missing) return;
    const size_t hidden = sum.size();
    const float* const bias = loaded_.w2.biases.data() + weights_for(slot) * static_cast<int64_t>(hidden);
    const float* const row = z.data() + static_cast<size_t>(slot) * hidden;
    const float weight = output_weight(slot);
    const bool weighs_first = has("weight-before-down");
    for (size_t c = 0; c < hidden; ++c) {
      sum[c] += weighs_first ? rounded(weight * row[c] + bias[c]) : weight * rounded(row[c] + bias[c]);
      if (style_.bf16_sums) sum[c] = bf16(sum[c]);
    }
  }

  std::vector<float> sum_up(const std::vector<float>& z) const {
    const int64_t hidden = subject_.hidden(), top_k = subject_.top_k;
    std::vector<float> y(static_cast<size_t>(subject_.tokens * hidden));
    for (int64_t token = 0; token < subject_.tokens; ++token) {
      const std::vector<float> shared = shared_row(token);
      std::vector<float> sum(static_cast<size_t>(hidden));
      for (int64_t k = 0; k < top_k; ++k)
        add_slot(token * top_k + (style_.bf16_sums ? top_k - 1 - k : k), z, sum);
      for (size_t c = 0; c < sum.size(); ++c) {
        y[static_cast<size_t>(token * hidden) + c] = bf16(shared.empty() ? sum[c] : sum[c] + shared[c]);
      }
    }
    const auto shift = [&](std::ptrdiff_t rows) {
      std::rotate(y.begin(), y.begin() + rows * hidden, y.end());
    };
    if (has("tokens-next")) shift(1);
    if (has("tokens-previous")) shift(subject_.tokens - 1);
    if (has("tokens-reversed")) {
      std::vector<float> reversed;
      for (int64_t token = subject_.tokens; token-- > 0;)
        reversed.insert(reversed.end(), y.begin() + token * hidden, y.begin() + (token + 1) * hidden);
      y = reversed;
    }
    return y;
  }

  /// What the shared expert adds to a token; empty where there is none.
  std::vector<float> shared_row(int64_t token) const {
    if (!subject_.weights->shared || has("shared-missing")) return {};
    const SharedExpert& shared = *subject_.weights->shared;
    const Expert& expert = shared.expert;
    const auto hidden = static_cast<size_t>(subject_.hidden());
    std::vector<float> x(hidden);
    for (size_t i = 0; i < hidden; ++i)
      x[i] = static_cast<float>(subject_.x[static_cast<size_t>(token) * hidden + i]);
    float factor = has("shared-twice") ? 2.0f : 1.0f;
    if (const Fault* scaled = find("shared-scaled")) factor *= scaled->value;
    if (shared.gate && !has("shared-gate-missing")) {
      const std::vector<float> gate = decoded(*shared.gate);
      factor *= sigmoid(multiply_add(x.data(), gate.data(), static_cast<int64_t>(hidden)));
    }
    const bool quantized = is_all_nvfp4(expert) && style_.staging.format != ActivationFormat::kBf16;
    const float alpha = quantized ? stage_shared(x, expert, true) : 1.0f;
    const bool gated = rows_of(expert.gate) > 0;
    std::vector<float> inner;
    for (int64_t i = 0; i < rows_of(expert.up); ++i) {
      const float up = rounded(row_times(expert.up, i, x, alpha));
      const float gate = gated ? rounded(row_times(expert.gate, i, x, alpha)) : up;
      inner.push_back(rounded(activate(gate, up, subject_.config.shared_activation, false)));
    }
    const float alpha2 = quantized ? stage_shared(inner, expert, false) : 1.0f;
    std::vector<float> y(hidden);
    for (size_t c = 0; c < hidden; ++c)
      y[c] = factor * rounded(row_times(expert.down, static_cast<int64_t>(c), inner, alpha2));
    return y;
  }

  /// Faults of routed experts' input scales are not the shared one's.
  float stage_shared(std::vector<float>& row, const Expert& expert, bool is_x) const {
    float amax = 0.0f;
    for (const float value : row) amax = std::max(amax, std::abs(value));
    if (style_.staging.format == ActivationFormat::kFp8) return stage_fp8(row, amax);
    const bool dynamic = style_.staging.policy == ScalePolicy::kDynamicToken;
    const float global = dynamic ? (amax == 0.0f ? 1.0f : amax / 2688.0f) : input_scale(expert, is_x);
    for (size_t k = 0; k < row.size(); k += 16)
      quantize_block(row.data() + k, global, global, false, style_.reciprocal_multiply);
    return global;
  }

  static float row_times(const WeightView& weight, int64_t row, const std::vector<float>& x, float alpha) {
    std::vector<float> values(x.size());
    decode_row(weight, row, values.data());
    return multiply_add(values.data(), x.data(), static_cast<int64_t>(x.size())) *
           (alpha * global_multiplier(weight));
  }

  const Subject& subject_;
  const EngineStyle& style_;
  planted::Faults planted_;
  InputScaleFaults x_faults_, inner_faults_;
  planted::Weights loaded_;
  planted::Routes routes_;
  std::vector<int64_t> sorted_;  // slots that have an expert, by expert
  std::vector<size_t> row_of_slot_;
  std::vector<uint8_t> x_scales_;      // swizzled group by group
  std::vector<int64_t> padded_slots_;  // slots as take_padded_row finds them; -1: padding
};

}  // namespace

Candidate run_planted_engine(const Subject& subject, const EngineStyle& style,
                             const std::vector<Fault>& faults) {
  return Engine(subject, style, faults).run();
}

}  // namespace fourfold
