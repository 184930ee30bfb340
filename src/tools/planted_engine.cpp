#include "tools/planted_engine.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <map>
#include <numeric>

namespace fourfold {
namespace {

using diagnosis::Candidate;
using diagnosis::Fault;
using diagnosis::Staging;
using diagnosis::Subject;

float bf16(float value) {
  if (std::isnan(value)) return value;
  const auto bits = std::bit_cast<uint32_t>(value);
  return std::bit_cast<float>((bits + 0x7FFFu + (bits >> 16 & 1u)) & 0xFFFF0000u);
}

/// Values of e4m3 bytes, by sign, exponent and mantissa.
float e4m3_value(int byte, int bias, int largest) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  if ((byte & 127) > largest) return byte & 128 ? -240.0f : 240.0f;
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -2 - bias)
                                        : std::ldexp(static_cast<float>(8 + mantissa), exponent - bias - 3);
  return byte & 128 ? -magnitude : magnitude;
}

/// Nearest of an ascending table of magnitudes, ties to the even index, the last one beyond its end.
template <size_t kCount>
int nearest(const std::array<float, kCount>& table, float magnitude) {
  const auto above =
      static_cast<size_t>(std::lower_bound(table.begin(), table.end(), magnitude) - table.begin());
  if (above == 0) return 0;
  if (above == kCount) return static_cast<int>(kCount) - 1;
  const double middle = (double{table[above - 1]} + double{table[above]}) / 2.0;
  if (magnitude == middle) return static_cast<int>(above % 2 == 0 ? above : above - 1);
  return static_cast<int>(magnitude < middle ? above - 1 : above);
}

constexpr std::array<float, 8> kFp4 = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};

const std::array<float, 127>& e4m3_table() {
  static const std::array<float, 127> table = [] {
    std::array<float, 127> values{};
    for (int byte = 0; byte < 127; ++byte) values[static_cast<size_t>(byte)] = e4m3_value(byte, 7, 126);
    return values;
  }();
  return table;
}

/// Weights of all experts, one after another, as an engine's loader leaves them.
struct Stack {
  int64_t experts = 0, rows = 0, cols = 0, block = 16;
  bool has_codes = false, is_e4m3 = false;
  std::vector<uint8_t> codes, scales;  // [E, R, K/2], [E, R, K/block]
  std::vector<float> values;           // [E, R, K], what a kernel multiplies by
  std::vector<float> globals;          // [E, R]
  std::vector<float> biases;           // [E, R]

  int64_t blocks() const { return cols / block; }
};

struct StoredMatrix {
  const WeightView* weight;
  const std::optional<DenseView>* bias;
};

std::vector<float> decoded(const DenseView& bias) {
  std::vector<float> values(static_cast<size_t>(bias.cols));
  decode_row(bias, 0, values.data());
  return values;
}

void append(Stack& stack, const StoredMatrix& matrix) {
  const int64_t rows = rows_of(*matrix.weight);
  if (const auto* view = std::get_if<BlockScaledView>(matrix.weight)) {
    stack.has_codes = true;
    stack.is_e4m3 = view->format == QuantFormat::kNvfp4;
    stack.block = stack.is_e4m3 ? 16 : 32;
    for (int64_t row = 0; row < rows; ++row) {
      stack.codes.insert(stack.codes.end(), view->codes.row(row), view->codes.row(row) + stack.cols / 2);
      for (int64_t b = 0; b < stack.blocks(); ++b) stack.scales.push_back(view->scale_code(row, b));
    }
  } else {
    const size_t first = stack.values.size();
    stack.values.resize(first + static_cast<size_t>(rows * stack.cols));
    for (int64_t row = 0; row < rows; ++row)
      decode_row(*matrix.weight, row, stack.values.data() + first + static_cast<size_t>(row * stack.cols));
  }
  float global = 1.0f;
  if (const auto* view = std::get_if<BlockScaledView>(matrix.weight)) {
    global = view->global.kind == GlobalScaleKind::kDivisor ? 1.0f / view->global.value : view->global.value;
  }
  stack.globals.insert(stack.globals.end(), static_cast<size_t>(rows), global);
  if (*matrix.bias) {
    const std::vector<float> values = decoded(**matrix.bias);
    stack.biases.insert(stack.biases.end(), values.begin(), values.end());
  } else {
    stack.biases.insert(stack.biases.end(), static_cast<size_t>(rows), 0.0f);
  }
}

class Engine {
 public:
  Engine(const Subject& subject, const EngineStyle& style, const std::vector<Fault>& faults)
      : subject_(subject),
        style_(style),
        faults_(faults),
        x_faults_(input_scale_faults("x")),
        inner_faults_(input_scale_faults("intermediate")) {}

  Candidate run() {
    load();
    route();
    sort_slots();
    Candidate candidate;
    const auto slots = static_cast<size_t>(subject_.tokens * subject_.top_k);
    const auto hidden = static_cast<size_t>(subject_.hidden());
    std::vector<float> h(slots * static_cast<size_t>(w13_.rows)), a(slots * static_cast<size_t>(w2_.cols)),
        z(slots * hidden);
    for (size_t slot = 0; slot < slots; ++slot) {
      if (ids_[slot] >= 0) run_slot(static_cast<int64_t>(slot), h, a, z);
    }
    candidate.output = sum_up(z);
    if (style_.keeps_stages) {
      candidate.h = std::move(h);
      candidate.activation = std::move(a);
    }
    return candidate;
  }

 private:
  const Fault* find(std::string_view id) const {
    const auto found =
        std::find_if(faults_.begin(), faults_.end(), [&](const Fault& f) { return f.id == id; });
    return found == faults_.end() ? nullptr : &*found;
  }
  bool has(std::string_view id) const { return find(id) != nullptr; }
  /// In w13, w2, x or the intermediate, or everywhere.
  bool has_at(const std::string& id, const std::string& site) const {
    return has(id) || has(id + "." + site);
  }
  const Fault* find_prefix(std::string_view prefix, std::string_view suffix = "") const {
    for (const Fault& fault : faults_) {
      if (fault.id.starts_with(prefix) && fault.id.ends_with(suffix)) return &fault;
    }
    return nullptr;
  }

  struct InputScaleFaults {
    bool of_first, stale, one, dropped, reciprocal, reciprocal_in_staging;
  };
  InputScaleFaults input_scale_faults(const std::string& site) const {
    return {has_at("input-scale-of-expert-0", site), has_at("input-scale-stale-in-alpha", site),
            has_at("input-scale-one", site),         has_at("input-scale-dropped", site),
            has_at("input-scale-reciprocal", site),  has_at("input-scale-reciprocal-in-staging", site)};
  }

  // ---- weights ----

  void load() {
    const ExpertWeights* weights = subject_.weights;
    if (has("layer-before")) weights = subject_.layer_before;
    if (has("layer-after")) weights = subject_.layer_after;
    experts_ = static_cast<int64_t>(weights->experts.size());
    const bool gated = rows_of(weights->experts[0].gate) > 0;
    inner_ = weights->intermediate;
    w13_ = {experts_, gated ? 2 * inner_ : inner_, weights->hidden, 16, false, false, {}, {}, {}, {}, {}};
    w2_ = {experts_, weights->hidden, inner_, 16, false, false, {}, {}, {}, {}, {}};
    for (const Expert& expert : weights->experts) {
      const bool swapped = has("gate-up-swapped");
      const StoredMatrix gate{&expert.gate, &expert.gate_bias}, up{&expert.up, &expert.up_bias};
      if (gated) append(w13_, swapped ? up : gate);
      append(w13_, swapped ? gate : up);
      append(w2_, {&expert.down, &expert.down_bias});
    }
    decode(w13_, "w13");
    decode(w2_, "w2");
    if (gated) arrange_gate_and_up();
    if (has("gate-up-folded")) fold();
    if (has("quantized-again")) quantize_again();
    if (has("bias-missing") || has("bias-missing.w13"))
      std::fill(w13_.biases.begin(), w13_.biases.end(), 0.0f);
    if (has("bias-missing") || has("bias-missing.w2")) std::fill(w2_.biases.begin(), w2_.biases.end(), 0.0f);
    if (gated) share_globals();
  }

  /// Offset of a scale in the tensor core's tiles: (row block, column block, 32, 4, 4).
  static int64_t tiled(int64_t row, int64_t col, int64_t blocks) {
    const int64_t across = (blocks + 3) / 4;
    return (((row / 128 * across + col / 4) * 32 + row % 32) * 4 + row / 32 % 4) * 4 + col % 4;
  }

  std::vector<uint8_t> read_scales(const Stack& s, const std::string& site) const {
    const int64_t blocks = s.blocks(), each = s.rows * blocks;
    const int64_t padded = (s.rows + 127) / 128 * 128 * ((blocks + 3) / 4 * 4);
    std::vector<uint8_t> swizzled(static_cast<size_t>(s.experts * padded)), read(s.scales.size());
    const auto each_scale = [&](auto&& visit) {
      for (int64_t e = 0, i = 0; e < s.experts; ++e) {
        for (int64_t r = 0; r < s.rows; ++r) {
          for (int64_t b = 0; b < blocks; ++b, ++i) visit(e, r, b, static_cast<size_t>(i));
        }
      }
    };
    each_scale([&](int64_t e, int64_t r, int64_t b, size_t i) {
      swizzled[static_cast<size_t>(e * padded + tiled(r, b, blocks))] = s.scales[i];
    });
    const auto at = [](const std::vector<uint8_t>& bytes, int64_t offset) {
      return offset < static_cast<int64_t>(bytes.size()) ? bytes[static_cast<size_t>(offset)] : uint8_t{0};
    };
    const int64_t half = site == "w13" && s.rows != inner_ ? s.rows / 2 : s.rows;
    const bool transposed = has_at("scales-transposed", site),
               linear = has_at("scales-linear-as-swizzled", site);
    const bool halves = site == "w13" && has("scales-transposed-halves");
    const bool is_swizzled = has_at("scales-swizzled-as-linear", site),
               unpadded = has_at("scales-unpadded-stride", site);
    each_scale([&](int64_t e, int64_t r, int64_t b, size_t i) {
      read[i] = s.scales[i];
      if (transposed) read[i] = at(s.scales, e * each + b * s.rows + r);
      if (halves) read[i] = at(s.scales, e * each + r / half * half * blocks + b * half + r % half);
      if (linear) read[i] = at(s.scales, e * each + tiled(r, b, blocks));
      if (is_swizzled) read[i] = at(swizzled, e * padded + r * blocks + b);
      if (unpadded) read[i] = at(swizzled, e * each + tiled(r, b, blocks));
    });
    return read;
  }

  float scale_value(uint8_t byte, bool is_e4m3, const std::string& site) const {
    if (!is_e4m3 || has_at("scales-as-e8m0", site)) return std::ldexp(1.0f, byte - 127);
    if (has_at("scales-as-fnuz", site)) return e4m3_value(byte, 8, 127);
    return e4m3_value(byte, 7, has_at("scales-saturated-240", site) ? 0x77 : 127);
  }

  void decode(Stack& s, const std::string& site) {
    if (s.has_codes) {
      std::array<float, 8> table = kFp4;
      if (const Fault* code = find_prefix("e2m1-code-")) table[static_cast<size_t>(code->code)] = code->value;
      const std::vector<uint8_t> scales = read_scales(s, site);
      std::array<float, 256> value_of_scale{};
      for (int byte = 0; byte < 256; ++byte) {
        value_of_scale[static_cast<size_t>(byte)] = scale_value(static_cast<uint8_t>(byte), s.is_e4m3, site);
      }
      const int first = has_at("nibbles-swapped", site) ? 4 : 0;
      s.values.resize(2 * s.codes.size());
      for (size_t i = 0; i < s.values.size(); ++i) {
        const int nibble = s.codes[i / 2] >> (i % 2 == 0 ? first : 4 - first) & 15;
        const float magnitude = table[static_cast<size_t>(nibble & 7)];
        s.values[i] =
            (nibble & 8 ? -magnitude : magnitude) * value_of_scale[scales[i / static_cast<size_t>(s.block)]];
      }
    }
    if (has_at("weight-global-dropped", site)) std::fill(s.globals.begin(), s.globals.end(), 1.0f);
    if (has_at("weight-global-reciprocal", site)) {
      for (float& global : s.globals) global = 1.0f / global;
    }
    if (const Fault* tail = find_prefix("k-tail-dropped-", "." + site)) {
      const int64_t kept = s.cols - s.cols % tail->code;
      for (size_t i = 0; i < s.values.size(); ++i) {
        if (static_cast<int64_t>(i) % s.cols >= kept) s.values[i] = 0.0f;
      }
    }
  }

  /// w13's rows in another order, when a kernel takes one for the other.
  void arrange_gate_and_up() {
    std::vector<int64_t> order(static_cast<size_t>(w13_.rows));
    std::iota(order.begin(), order.end(), 0);
    if (has("gate-up-rows-swapped")) std::rotate(order.begin(), order.begin() + inner_, order.end());
    std::vector<int64_t> mixed;
    if (has("gate-up-read-interleaved")) {
      for (int64_t first : {0, 1}) {
        for (int64_t row = first; row < w13_.rows; row += 2) mixed.push_back(row);
      }
      order = mixed;
    } else if (has("gate-up-read-as-halves")) {
      for (int64_t row = 0; row < inner_; ++row) mixed.insert(mixed.end(), {row, inner_ + row});
      order = mixed;
    }
    const std::vector<float> values = w13_.values, biases = w13_.biases;
    for (int64_t e = 0; e < experts_; ++e) {
      for (int64_t r = 0; r < w13_.rows; ++r) {
        const int64_t from = e * w13_.rows + order[static_cast<size_t>(r)], to = e * w13_.rows + r;
        std::copy_n(values.begin() + from * w13_.cols, w13_.cols, w13_.values.begin() + to * w13_.cols);
        w13_.biases[static_cast<size_t>(to)] = biases[static_cast<size_t>(from)];
      }
    }
  }

  void share_globals() {
    for (int64_t e = 0; e < experts_; ++e) {
      float* const globals = w13_.globals.data() + e * w13_.rows;
      const float gate = globals[0], up = globals[inner_];
      float both = 0.0f;
      if (has("gate-global-for-up")) both = gate;
      if (has("up-global-for-gate")) both = up;
      if (has("larger-global-without-rescale")) both = std::max(gate, up);
      if (both != 0.0f) std::fill(globals, globals + w13_.rows, both);
    }
  }

  /// One global for both halves: block scales of the smaller half rounded to e4m3 again.
  void fold() {
    for (int64_t e = 0; e < experts_; ++e) {
      float* const globals = w13_.globals.data() + e * w13_.rows;
      const float larger = std::max(globals[0], globals[inner_]);
      for (int64_t r = 0; r < w13_.rows; ++r) {
        const float ratio = globals[r] / larger;
        if (ratio != 1.0f) {
          for (int64_t b = 0; b < w13_.blocks(); ++b) rescale(e * w13_.rows + r, b, ratio);
        }
        globals[r] = larger;
      }
    }
  }

  void rescale(int64_t row, int64_t block, float ratio) {
    const float scale = e4m3_value(w13_.scales[static_cast<size_t>(row * w13_.blocks() + block)], 7, 127);
    const float rounded = e4m3_table()[static_cast<size_t>(nearest(e4m3_table(), scale * ratio))];
    for (int64_t k = 0; k < 16; ++k) {
      float& value = w13_.values[static_cast<size_t>(row * w13_.cols + block * 16 + k)];
      value = scale == 0.0f ? 0.0f : value / scale * rounded;
    }
  }

  /// Through bf16, and by amax / 2688 of gate and up together, and of down.
  void quantize_again() {
    for (Stack* s : {&w13_, &w2_}) {
      const int64_t each = s->rows * s->cols;
      for (int64_t e = 0; e < experts_; ++e) {
        float amax = 0.0f;
        for (int64_t i = e * each; i < (e + 1) * each; ++i) {
          float& value = s->values[static_cast<size_t>(i)];
          value = bf16(value * s->globals[static_cast<size_t>(i / s->cols)]);
          amax = std::max(amax, std::abs(value));
        }
        const float global = amax == 0.0f ? 1.0f : amax / 2688.0f;
        for (int64_t i = e * each; i < (e + 1) * each; i += 16)
          quantize_block(s->values.data() + i, global, global, true);
        std::fill_n(s->globals.begin() + e * s->rows, s->rows, global);
      }
    }
  }

  /// 16 values become e2m1 x e4m3, without the global; returns the e4m3 code.
  uint8_t quantize_block(float* values, float global, float divisor, bool is_weight) const {
    float amax = 0.0f;
    for (int k = 0; k < 16; ++k) amax = std::max(amax, std::abs(values[k]));
    const float wanted = style_.reciprocal_multiply && !is_weight ? amax * (1.0f / 6.0f) * (1.0f / divisor)
                                                                  : amax / 6.0f / divisor;
    int code = nearest(e4m3_table(), wanted);
    if (is_weight && code == 0) code = amax == 0.0f ? 0x38 : 1;
    const float scale = e4m3_table()[static_cast<size_t>(code)];
    for (int k = 0; k < 16; ++k) {
      const float x = scale == 0.0f ? 0.0f : values[k] * (1.0f / (scale * (is_weight ? global : divisor)));
      const float rounded = kFp4[static_cast<size_t>(nearest(kFp4, std::abs(x)))] * scale;
      values[k] = x < 0.0f ? -rounded : rounded;
    }
    return static_cast<uint8_t>(code);
  }

  // ---- routing ----

  std::vector<float> scores(int64_t token, bool softmax_of_chosen) const {
    const auto& router = *subject_.router;
    std::vector<float> result(router.logits.begin() + token * experts_,
                              router.logits.begin() + (token + 1) * experts_);
    RouterScore score = router.config.score;
    if (has("router-score")) {
      score = score == RouterScore::kSoftmax ? RouterScore::kSigmoid : RouterScore::kSoftmax;
    }
    if (score == RouterScore::kSoftmaxOfTopK && !softmax_of_chosen) return result;
    float sum = 0.0f;
    const float largest = *std::max_element(result.begin(), result.end());
    for (const float logit : result) sum += std::exp(logit - largest);
    for (float& logit : result) {
      if (score == RouterScore::kSigmoid) logit = 1.0f / (1.0f + std::exp(-logit));
      if (score == RouterScore::kSqrtSoftplus) logit = std::sqrt(std::log1p(std::exp(logit)));
      if (score == RouterScore::kSoftmax || score == RouterScore::kSoftmaxOfTopK)
        logit = std::exp(logit - largest) / sum;
    }
    return result;
  }

  bool changes_router() const { return find_prefix("router-") != nullptr; }

  void route() {
    ids_.assign(subject_.topk_ids.begin(), subject_.topk_ids.end());
    weights_.assign(subject_.topk_weights.begin(), subject_.topk_weights.end());
    if (changes_router()) {
      for (int64_t token = 0; token < subject_.tokens; ++token) route_token(token);
    }
    const auto top_k = static_cast<std::ptrdiff_t>(subject_.top_k);
    for (std::ptrdiff_t first = 0; first < static_cast<std::ptrdiff_t>(ids_.size()); first += top_k) {
      if (has("weights-reversed")) std::reverse(weights_.begin() + first, weights_.begin() + first + top_k);
      if (has("ids-sorted")) std::sort(ids_.begin() + first, ids_.begin() + first + top_k);
    }
    const float factor = subject_.router ? subject_.router->config.scaling_factor : 1.0f;
    for (float& weight : weights_) {
      if (has("scaling-factor-missing")) weight /= factor;
      if (has("scaling-factor-twice")) weight *= factor;
    }
  }

  void route_token(int64_t token) {
    const auto& router = *subject_.router;
    const std::vector<float> own = scores(token, false);
    std::vector<float> biased = own;
    for (size_t e = 0; !router.correction_bias.empty() && !has("router-bias-ignored") && e < own.size();
         ++e) {
      biased[e] += router.correction_bias[e];
    }
    std::vector<int32_t> chosen(static_cast<size_t>(subject_.top_k));
    if (router.by_token_id) {
      std::copy_n(subject_.topk_ids.begin() + token * subject_.top_k, subject_.top_k, chosen.begin());
    } else {
      chosen = choose(biased, router.config);
    }
    const bool whole = has("router-score") && router.config.score == RouterScore::kSoftmaxOfTopK;
    const std::vector<float> weighed = whole                           ? scores(token, true)
                                       : has("router-bias-in-weights") ? biased
                                                                       : own;
    bool renormalises = router.config.renormalise != has("router-renormalise");
    if (router.config.score == RouterScore::kSoftmaxOfTopK) renormalises = false;
    float sum = 0.0f;
    for (const int32_t id : chosen) sum += weighed[static_cast<size_t>(id)];
    for (size_t k = 0; k < chosen.size(); ++k) {
      const size_t slot = static_cast<size_t>(token * subject_.top_k) + k;
      ids_[slot] = chosen[k];
      weights_[slot] = weighed[static_cast<size_t>(chosen[k])] / (renormalises ? sum : 1.0f) *
                       router.config.scaling_factor;
    }
  }

  std::vector<int32_t> choose(std::vector<float> selection, const RouterConfig& config) const {
    const auto count = selection.size();
    if (config.groups > 1 && !has("router-groups-ignored")) {
      const size_t size = count / static_cast<size_t>(config.groups);
      std::vector<std::pair<float, size_t>> groups;
      for (size_t first = 0; first < count; first += size) {
        std::vector<float> sorted(selection.begin() + static_cast<std::ptrdiff_t>(first),
                                  selection.begin() + static_cast<std::ptrdiff_t>(first + size));
        std::sort(sorted.rbegin(), sorted.rend());
        groups.emplace_back(-(sorted[0] + (size > 1 ? sorted[1] : 0.0f)), first);
      }
      std::sort(groups.begin(), groups.end());
      for (size_t g = static_cast<size_t>(config.top_groups); g < groups.size(); ++g) {
        std::fill_n(selection.begin() + static_cast<std::ptrdiff_t>(groups[g].second), size, -INFINITY);
      }
    }
    std::vector<int32_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return selection[static_cast<size_t>(a)] > selection[static_cast<size_t>(b)];
    });
    order.resize(static_cast<size_t>(subject_.top_k));
    return order;
  }

  // ---- rows ----

  void sort_slots() {
    for (size_t slot = 0; slot < ids_.size(); ++slot) {
      if (ids_[slot] >= 0) sorted_.push_back(static_cast<int64_t>(slot));
    }
    std::stable_sort(sorted_.begin(), sorted_.end(), [&](int64_t a, int64_t b) {
      return ids_[static_cast<size_t>(a)] < ids_[static_cast<size_t>(b)];
    });
    row_of_slot_.resize(ids_.size());
    for (size_t row = 0; row < sorted_.size(); ++row) row_of_slot_[static_cast<size_t>(sorted_[row])] = row;
  }

  int64_t weights_for(int64_t slot) const {
    const int64_t id = ids_[static_cast<size_t>(slot)];
    if (has("expert-next")) return id + 1 == experts_ ? 0 : id + 1;
    if (has("expert-previous")) return id == 0 ? experts_ - 1 : id - 1;
    if (const Fault* map = find_prefix("expert-map-first-of-")) {
      const int64_t local = experts_ / map->code;
      return id - id / local * local;
    }
    if (const Fault* map = find_prefix("expert-map-round-robin-")) {
      const int64_t rank = id % map->code, place = id / map->code;
      return rank * (experts_ / map->code) + place;
    }
    if (const Fault* tile = find_prefix("expert-of-tile-")) {
      const size_t row = row_of_slot_[static_cast<size_t>(slot)];
      return ids_[static_cast<size_t>(sorted_[row - row % static_cast<size_t>(tile->code)])];
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
      for (float& value : row) value = bf16(value * weights_[static_cast<size_t>(slot)]);
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
      const uint8_t code = quantize_block(row.data() + k, global, divisor, false);
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
    while (first > 0 && ids_[static_cast<size_t>(sorted_[static_cast<size_t>(first - 1)])] ==
                            ids_[static_cast<size_t>(slot)])
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
    for (const int64_t slot : sorted_) groups[ids_[static_cast<size_t>(slot)]].push_back(slot);
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
    const float alpha = stage(x, expert, true);
    if (has("x-scales-unpadded-groups")) misread_scales(slot, x);
    std::vector<float> beyond;
    if (const Fault* tail = find("k-tail-over-read.w13")) beyond = row_behind(slot, tail->code);
    float* const h_row = h.data() + slot * w13_.rows;
    for (int64_t n = 0; n < w13_.rows; ++n) {
      const int64_t row = expert * w13_.rows + n;
      const float* const weight = w13_.values.data() + row * w13_.cols;
      float sum = multiply_add(x.data(), weight, w13_.cols);
      if (n + 1 < w13_.rows && !beyond.empty())
        sum += multiply_add(beyond.data(), weight + w13_.cols, static_cast<int64_t>(beyond.size()));
      h_row[n] = rounded(sum * (alpha * w13_.globals[static_cast<size_t>(row)]) +
                         w13_.biases[static_cast<size_t>(row)]);
    }
    std::vector<float> inner(static_cast<size_t>(inner_));
    for (int64_t i = 0; i < inner_; ++i) {
      const bool gated = w13_.rows != inner_;
      inner[static_cast<size_t>(i)] =
          rounded(activate(h_row[i], h_row[gated ? inner_ + i : i], subject_.config.activation, true));
    }
    std::copy(inner.begin(), inner.end(), a.begin() + slot * inner_);
    const float alpha2 = stage(inner, expert, false);
    const int64_t begin = has("ranks-lower-inner-missing") ? inner_ / 2 : 0;
    const int64_t end = has("ranks-upper-inner-missing") ? inner_ / 2 : inner_;
    for (int64_t n = 0; n < w2_.rows; ++n) {
      const int64_t row = expert * w2_.rows + n;
      const float sum =
          multiply_add(inner.data() + begin, w2_.values.data() + row * w2_.cols + begin, end - begin);
      z[static_cast<size_t>(slot * w2_.rows + n)] = sum * (alpha2 * w2_.globals[static_cast<size_t>(row)]);
    }
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
    faulty = faulty && find_place(diagnosis::FaultPlace::kActivation);
    if (f.kind == ActivationKind::kReluSquared) {
      if (broken("activation-silu")) return u * sigmoid(u);
      const float positive = u > 0.0f ? u : 0.0f;
      return broken("activation-relu") ? positive : positive * positive;
    }
    if (broken("clamp-missing")) f.limit = INFINITY;
    if (broken("clamp-unasked-7")) f.limit = 7.0f;
    if (broken("clamp-unasked-10")) f.limit = 10.0f;
    if (const Fault* limit = faulty ? find_prefix("clamp-limit-") : nullptr) f.limit = limit->value;
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

  bool find_place(diagnosis::FaultPlace place) const {
    return std::any_of(faults_.begin(), faults_.end(),
                       [&](const Fault& fault) { return fault.place == place; });
  }

  // ---- combine ----

  float output_weight(int64_t slot) const {
    const float weight = weights_[static_cast<size_t>(slot)];
    const bool on_input = subject_.config.weight_on_input;
    if (has("weight-missing") || has("weight-on-input")) return 1.0f;
    if (has("weight-on-output")) return weight;
    if (has("weight-twice")) return on_input ? weight : weight * weight;
    return on_input ? 1.0f : weight;
  }

  void add_slot(int64_t slot, const std::vector<float>& z, std::vector<float>& sum) const {
    const int64_t id = ids_[static_cast<size_t>(slot)];
    const bool missing = (has("ranks-upper-experts-missing") && id >= experts_ / 2) ||
                         (has("ranks-lower-experts-missing") && id < experts_ / 2);
    if (id < 0 || missing) return;
    const size_t hidden = sum.size();
    const float* const bias = w2_.biases.data() + weights_for(slot) * static_cast<int64_t>(hidden);
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
    for (size_t k = 0; k < row.size(); k += 16) quantize_block(row.data() + k, global, global, false);
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
  const std::vector<Fault>& faults_;
  InputScaleFaults x_faults_, inner_faults_;
  int64_t experts_ = 0, inner_ = 0;
  Stack w13_, w2_;
  std::vector<int32_t> ids_;
  std::vector<float> weights_;
  std::vector<int64_t> sorted_;  // slots that have an expert, by expert
  std::vector<size_t> row_of_slot_;
  std::vector<uint8_t> x_scales_;  // swizzled group by group
};

}  // namespace

Candidate run_planted_engine(const Subject& subject, const EngineStyle& style,
                             const std::vector<Fault>& faults) {
  return Engine(subject, style, faults).run();
}

}  // namespace fourfold
