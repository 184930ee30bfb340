// Fuzzes everything from tensors to expert weights: detection of names and schemes, the readers of all of
// them, the router. Input bytes choose a layer of one of the real layouts, then a few damages, then contents.
// Every tensor lies in a block of its own of exactly its size: the address sanitizer sees a read that is one
// byte off.
#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "fourfold/checkpoint.h"
#include "fourfold/model_family.h"
#include "fuzz_target.h"

namespace fourfold {
namespace {

using fuzz::ByteSource;

constexpr int64_t kMostBytes = 1 << 18;  // of one tensor
constexpr std::array<const char*, 5> kBefore = {"model.layers.", "layers.", "model.language_model.layers.",
                                                "language_model.model.layers.", "backbone.layers."};
constexpr std::array<std::array<const char*, 4>, 5> kBlocks = {{
    {".mlp.", "gate_proj", "up_proj", "down_proj"},
    {".block_sparse_moe.", "w1", "w3", "w2"},
    {".ffn.", "w1", "w3", "w2"},
    {".feed_forward.", "gate_proj", "up_proj", "down_proj"},
    {".mixer.", "gate_proj", "up_proj", "down_proj"},
}};
constexpr std::array<const char*, 12> kModelTypes = {
    "qwen3_moe",  "mixtral",   "deepseek_v4", "deepseek_v3", "gpt_oss", "llama4",
    "nemotron_h", "qwen2_moe", "glm4_moe",    "qwen3_next",  "",        "unheard_of"};
constexpr std::array<DType, 12> kTypes = {DType::kU8,   DType::kI8,  DType::kF8E4m3, DType::kF8E8m0,
                                          DType::kBf16, DType::kF16, DType::kF32,    DType::kI32,
                                          DType::kI64,  DType::kF4,  DType::kBool,   DType::kF8E5m2};
constexpr std::array<const char*, 16> kSuffixes = {".weight",
                                                   ".weight_packed",
                                                   ".weight_scale",
                                                   ".weight_scale_2",
                                                   ".weight_global_scale",
                                                   ".input_scale",
                                                   ".input_global_scale",
                                                   ".scale",
                                                   ".weight_scale_inv",
                                                   ".bias",
                                                   "_blocks",
                                                   "_scales",
                                                   "_bias",
                                                   "_weight_scale",
                                                   "_weight_scale_2",
                                                   "_input_scale"};
constexpr std::array<int64_t, 6> kExtents = {16, 32, 64, 96, 48, 144};

int64_t bytes_of(DType type, const std::vector<int64_t>& shape) {
  int64_t bits = bits_of(type);
  for (const int64_t extent : shape) {
    if (extent < 0 || __builtin_mul_overflow(bits, extent, &bits) || bits > 8 * kMostBytes) return -1;
  }
  return bits % 8 == 0 ? bits / 8 : -1;
}

/// A layer under construction.
class Builder {
 public:
  explicit Builder(ByteSource& source) : source_(source) {}

  std::vector<Tensor>& tensors() { return tensors_; }

  void layer() {
    const auto& names = source_.pick(kBlocks);
    prefix_ = std::string(source_.pick(kBefore)) + "0" + names[0];
    experts_ = 1 + static_cast<int64_t>(source_.below(3));
    hidden_ = source_.pick(kExtents);
    intermediate_ = source_.pick(kExtents);
    const size_t style = source_.below(8);  // of all experts, or of each matrix
    if (style == 7) {
      fused();
    } else {
      for (int64_t id = 0; id < experts_; ++id)
        expert(prefix_ + "experts." + std::to_string(id), names, style);
    }
    if (source_.one_in(3)) expert(prefix_ + "shared_experts", names, source_.below(8));
    if (source_.one_in(4)) expert(prefix_ + "shared_expert", names, source_.below(8));
    if (source_.one_in(4)) add(prefix_ + "shared_expert_gate.weight", DType::kBf16, {1, hidden_});
    router();
  }

  void damage() {
    for (size_t count = source_.below(4); count > 0 && !tensors_.empty(); --count) {
      const size_t at = source_.below(tensors_.size());
      Tensor& tensor = tensors_[at];
      switch (source_.below(7)) {
        case 0:
          tensors_.erase(tensors_.begin() + static_cast<std::ptrdiff_t>(at));
          break;
        case 1:
          tensor.dtype = source_.pick(kTypes);
          break;
        case 2:
          change_extent(tensor);
          break;
        case 3:
          std::reverse(tensor.shape.begin(), tensor.shape.end());
          break;
        case 4:
          tensor.name = tensor.name.substr(0, tensor.name.find_last_of("._")) + source_.pick(kSuffixes);
          break;
        case 5: {
          Tensor extra = tensor;
          extra.name = extra.name.substr(0, extra.name.find_last_of('.')) + source_.pick(kSuffixes);
          extra.dtype = source_.pick(kTypes);
          tensors_.push_back(std::move(extra));
          break;
        }
        default:
          if (source_.one_in(2)) {
            tensor.shape.push_back(1);
          } else if (!tensor.shape.empty()) {
            tensor.shape.pop_back();
          }
      }
    }
  }

 private:
  void change_extent(Tensor& tensor) {
    if (tensor.shape.empty()) return;
    int64_t& extent = tensor.shape[source_.below(tensor.shape.size())];
    const int64_t doubled = extent > kMostBytes ? extent : 2 * extent;
    const int64_t more = extent > kMostBytes ? extent : extent + 1;
    const std::array<int64_t, 8> values = {0,       1,          more,      extent - 1,
                                           doubled, extent / 2, INT64_MAX, int64_t{1} << 62};
    extent = std::max<int64_t>(0, source_.pick(values));
  }

  void add(const std::string& name, DType type, std::vector<int64_t> shape) {
    Tensor tensor;
    tensor.name = name;
    tensor.dtype = type;
    tensor.shape = std::move(shape);
    tensor.file = "memory";
    tensors_.push_back(std::move(tensor));
  }

  void expert(const std::string& name, const std::array<const char*, 4>& names, size_t style) {
    for (size_t half = 1; half < names.size(); ++half) {
      if (half == 1 && std::string_view(names[0]) == ".mixer.") continue;
      const bool is_down = half == 3;
      linear(name + "." + names[half], is_down ? hidden_ : intermediate_, is_down ? intermediate_ : hidden_,
             style == 6 ? source_.below(9) : style);
    }
  }

  void linear(const std::string& name, int64_t out, int64_t in, size_t scheme) {
    const std::vector<int64_t> codes = {out, in / 2}, tiles = {(out + 127) / 128, (in + 127) / 128};
    switch (scheme) {
      case 0:
        add(name + ".weight", DType::kU8, codes);
        add(name + ".weight_scale", DType::kF8E4m3, {out, in / 16});
        add(name + ".weight_scale_2", DType::kF32, {});
        add(name + ".input_scale", DType::kF32, {1});
        break;
      case 1:
        add(name + ".weight_packed", DType::kU8, codes);
        add(name + ".weight_scale", DType::kF8E4m3, {out, in / 16});
        add(name + ".weight_global_scale", DType::kF32, {1});
        add(name + ".input_global_scale", DType::kF32, {1});
        break;
      case 2:
        add(name + ".weight", DType::kI8, codes);
        add(name + ".scale", DType::kF8E8m0, {out, in / 32});
        break;
      case 3:
        add(name + ".weight_packed", DType::kU8, codes);
        add(name + ".weight_scale", DType::kU8, {out, in / 32});
        break;
      case 4:
        add(name + ".weight", DType::kF8E4m3, {out, in});
        add(name + ".weight_scale_inv", DType::kF32, tiles);
        break;
      case 5:
        add(name + ".weight", DType::kF8E4m3, {out, in});
        add(name + ".scale", DType::kF8E8m0, tiles);
        break;
      case 7:
        add(name + ".weight", DType::kF8E4m3, {out, in});
        add(name + ".weight_scale", DType::kF32, {});
        break;
      default:
        add(name + ".weight", source_.one_in(3) ? DType::kF32 : DType::kBf16, {out, in});
        add(name + ".bias", DType::kBf16, {out});
    }
  }

  void fused() {
    const size_t scheme = source_.below(6);
    const bool transposed = scheme % 2 == 1;
    for (const bool is_down : {false, true}) {
      const std::string name = prefix_ + "experts." + (is_down ? "down_proj" : "gate_up_proj");
      const int64_t out = is_down ? hidden_ : 2 * intermediate_, in = is_down ? intermediate_ : hidden_;
      const auto matrix = [&](int64_t per_byte) {
        return transposed ? std::vector{experts_, in / per_byte, out}
                          : std::vector{experts_, out, in / per_byte};
      };
      if (scheme < 2) {
        add(name, DType::kBf16, matrix(1));
      } else if (scheme < 4) {
        add(name, DType::kU8, matrix(2));
        add(name + "_weight_scale", DType::kF8E4m3, matrix(16));
        add(name + "_weight_scale_2", DType::kF32,
            source_.one_in(2) ? std::vector{experts_} : std::vector<int64_t>{});
        add(name + "_input_scale", DType::kF32, {});
      } else {
        add(name + "_blocks", DType::kU8, {experts_, out, in / 32, 16});
        add(name + "_scales", DType::kU8, {experts_, out, in / 32});
        add(name + "_bias", DType::kBf16, {experts_, out});
      }
    }
  }

  void router() {
    const std::string name = prefix_ + (source_.one_in(2) ? "router" : "gate");
    if (source_.one_in(8)) return;
    add(name + ".weight", source_.one_in(2) ? DType::kF32 : DType::kBf16, {experts_, hidden_});
    if (source_.one_in(3)) add(name + ".bias", DType::kF32, {experts_});
    if (source_.one_in(3)) add(name + ".e_score_correction_bias", DType::kF32, {experts_});
    if (source_.one_in(3)) add(name + ".tid2eid", DType::kI64, {5, 1});
  }

  ByteSource& source_;
  std::vector<Tensor> tensors_;
  std::string prefix_;
  int64_t experts_ = 1, hidden_ = 16, intermediate_ = 16;
};

/// Data for all tensors, each in a block of its own; false where a shape is none that a file can have.
bool fill(std::vector<Tensor>& tensors, ByteSource& source,
          std::vector<std::unique_ptr<std::byte[]>>& blocks) {
  const uint8_t common = source.byte();
  for (Tensor& tensor : tensors) {
    tensor.bytes = bytes_of(tensor.dtype, tensor.shape);
    if (tensor.bytes < 0) return false;
    auto& block = blocks.emplace_back(std::make_unique<std::byte[]>(static_cast<size_t>(tensor.bytes)));
    std::memset(block.get(), tensor.dtype == DType::kI64 ? 0 : common, static_cast<size_t>(tensor.bytes));
    for (int64_t i = 0; i < std::min<int64_t>(tensor.bytes, 4) && !source.is_empty(); ++i) {
      block[static_cast<size_t>(i)] = static_cast<std::byte>(source.byte());
    }
    tensor.data = block.get();
  }
  return true;
}

/// Reads the first and the last row of a matrix: all of its ends.
void touch(const WeightView& weight) {
  const int64_t rows = rows_of(weight);
  if (rows == 0) return;
  std::vector<float> row(static_cast<size_t>(cols_of(weight)));
  dequantize_row(weight, 0, row.data());
  dequantize_row(weight, rows - 1, row.data());
}

void touch(const Expert& expert) {
  for (const WeightView* weight : {&expert.gate, &expert.up, &expert.down}) touch(*weight);
  for (const auto* bias : {&expert.gate_bias, &expert.up_bias, &expert.down_bias}) {
    if (*bias) touch(WeightView(**bias));
  }
}

void read_layer(const std::shared_ptr<const Checkpoint>& checkpoint, ByteSource& source) {
  constexpr std::array<GateUpOrder, 3> kOrders = {GateUpOrder::kGateFirst, GateUpOrder::kUpFirst,
                                                  GateUpOrder::kInterleaved};
  constexpr std::array<WeightScheme, 3> kSchemes = {WeightScheme::kModelOpt, WeightScheme::kCompressedTensors,
                                                    WeightScheme::kMxfp4};
  std::optional<GateUpOrder> order;
  std::optional<WeightScheme> scheme;
  if (source.one_in(3)) order = source.pick(kOrders);
  if (source.one_in(4)) scheme = source.pick(kSchemes);
  for (const int64_t layer : layers_with_experts(*checkpoint))
    fuzz::require(layer >= 0, "layers are numbers");
  const ExpertLayer layer = load_experts(checkpoint, 0, {}, order, scheme);
  const ExpertWeights& weights = layer.weights;
  fuzz::require(weights.count() > 0 && !layer.scheme.empty(), "a layer has experts");
  for (const Expert& expert : weights.experts) touch(expert);
  if (weights.shared) touch(weights.shared->expert);
  if (weights.shared && weights.shared->gate) touch(WeightView(*weights.shared->gate));
  const LayerRules rules = rules_of(checkpoint->config());
  static_cast<void>(layer_config(layer, rules));
  std::string why_not;
  const auto router = load_router(*checkpoint, 0, layer.experts_in_checkpoint, weights.hidden,
                                  rules.router.value(), rules.router_bias, why_not);
  if (router) touch(WeightView(router->weights.weight));
}

}  // namespace
}  // namespace fourfold

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace fourfold;
  ByteSource source(data, size);
  ModelConfig config;
  config.file = "config.json";
  config.model_type = source.pick(kModelTypes);
  config.top_k = static_cast<int64_t>(source.below(3));
  Builder builder(source);
  builder.layer();
  builder.damage();
  std::vector<std::unique_ptr<std::byte[]>> blocks;
  if (!fill(builder.tensors(), source, blocks)) return 0;
  try {
    read_layer(Checkpoint::from_tensors(builder.tensors(), config), source);
  } catch (const Error&) {
  }
  return 0;
}
