// The loader of the planted engine: stacks an engine's weights, and gets it wrong where that is planted.
#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "tools/planted_numbers.h"
#include "tools/planted_parts.h"

namespace fourfold::planted {
namespace {

using diagnosis::Fault;
using diagnosis::Subject;

struct StoredMatrix {
  const WeightView* weight;
  const std::optional<DenseView>* bias;
};

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

class Loader {
 public:
  Loader(const Subject& subject, const Faults& faults) : subject_(subject), faults_(faults) {}

  Weights load() {
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
    return {experts_, inner_, std::move(w13_), std::move(w2_)};
  }

 private:
  bool has(std::string_view id) const { return faults_.has(id); }
  bool has_at(const std::string& id, const std::string& site) const { return faults_.has_at(id, site); }

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
      if (const Fault* code = faults_.find_prefix("e2m1-code-"))
        table[static_cast<size_t>(code->code)] = code->value;
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
    if (const Fault* tail = faults_.find_prefix("k-tail-dropped-", "." + site)) {
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
          quantize_block(s->values.data() + i, global, global, true, false);
        std::fill_n(s->globals.begin() + e * s->rows, s->rows, global);
      }
    }
  }

  const Subject& subject_;
  const Faults& faults_;
  int64_t experts_ = 0, inner_ = 0;
  Stack w13_, w2_;
};

}  // namespace

const Fault* Faults::find(std::string_view id) const {
  const auto found = std::find_if(faults_.begin(), faults_.end(), [&](const Fault& f) { return f.id == id; });
  return found == faults_.end() ? nullptr : &*found;
}

const Fault* Faults::find_prefix(std::string_view prefix, std::string_view suffix) const {
  for (const Fault& fault : faults_) {
    if (fault.id.starts_with(prefix) && fault.id.ends_with(suffix)) return &fault;
  }
  return nullptr;
}

bool Faults::is_any_in(diagnosis::FaultPlace place) const {
  return std::any_of(faults_.begin(), faults_.end(), [&](const Fault& f) { return f.place == place; });
}

std::vector<float> decoded(const DenseView& vector) {
  std::vector<float> values(static_cast<size_t>(vector.cols));
  decode_row(vector, 0, values.data());
  return values;
}

int64_t tiled(int64_t row, int64_t col, int64_t blocks) {
  const int64_t across = (blocks + 3) / 4;
  return (((row / 128 * across + col / 4) * 32 + row % 32) * 4 + row / 32 % 4) * 4 + col % 4;
}

Weights load_weights(const Subject& subject, const Faults& faults) {
  return Loader(subject, faults).load();
}

}  // namespace fourfold::planted
