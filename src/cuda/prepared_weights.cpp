// Packing a layer's weights, expert by expert.
#include "cuda/prepared_weights.h"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "base/fail.h"
#include "cuda/device.h"
#include "fourfold/scale_layout.h"

namespace fourfold::cuda {
namespace {

constexpr int64_t kSourceAlignment = 256;

/// A bias that changes no sum: x + -0 is x for every x, -0 among them.
constexpr float kNoBias = -0.0f;

int64_t scale_bytes(const BlockScaledView& view) {
  return view.scale_layout == ScaleLayout::kRowMajor ? view.rows * view.blocks_per_row()
                                                     : swizzled_scale_bytes(view.rows, view.blocks_per_row());
}

/// Bytes of `view` in the staging buffer; none where it is on the device already.
int64_t staged_bytes(const BlockScaledView& view) {
  if (view.codes.device.kind != Device::Kind::kHost) return 0;
  return round_up(view.rows * view.cols / 2, kSourceAlignment) +
         round_up(scale_bytes(view), kSourceAlignment);
}

const BlockScaledView& blocks_of(const WeightView& weight) {
  return std::get<BlockScaledView>(weight);
}

/// Brings one expert's matrices at a time to the device, in the order of the default stream.
class Staging {
 public:
  Staging(const ExpertWeights& weights, const Memory& memory) {
    int64_t most = 0;
    for (const Expert& expert : weights.experts) {
      const int64_t pair =
          staged_bytes(blocks_of(expert.up)) + (expert.has_gate() ? staged_bytes(blocks_of(expert.gate)) : 0);
      most = std::max({most, pair, staged_bytes(blocks_of(expert.down))});
    }
    buffer_ = memory.allocate(static_cast<size_t>(most));
  }

  /// Takes the place of what was brought so far: the stream reads that before it overwrites it.
  void restart() { used_ = 0; }

  /// `view` on the device, dense.
  BlockScaledView bring(const BlockScaledView& view) {
    if (view.codes.device.kind != Device::Kind::kHost) return view;
    BlockScaledView brought = view;
    const int64_t code_bytes = view.cols / 2, blocks = view.blocks_per_row();
    uint8_t* codes = take(view.rows * code_bytes);
    copy_rows_async(codes, code_bytes, view.codes.data, view.codes.stride, code_bytes, view.rows, nullptr);
    uint8_t* scales = take(scale_bytes(view));
    if (view.scale_layout == ScaleLayout::kRowMajor) {
      copy_rows_async(scales, blocks, view.scales, view.scale_stride, blocks, view.rows, nullptr);
    } else {
      copy_async(scales, view.scales, static_cast<size_t>(scale_bytes(view)), nullptr);
    }
    brought.codes = {codes, view.rows, code_bytes, code_bytes, buffer_.device()};
    brought.scales = scales;
    brought.scale_stride = blocks;
    return brought;
  }

 private:
  uint8_t* take(int64_t bytes) {
    auto* place = reinterpret_cast<uint8_t*>(buffer_.data()) + used_;
    used_ += round_up(bytes, kSourceAlignment);
    return place;
  }

  Buffer buffer_;
  int64_t used_ = 0;
};

/// A bias in float32; kNoBias where there is none.
void append_bias(const std::optional<DenseView>& bias, int64_t channels, std::vector<float>& out) {
  const std::vector<float> values =
      bias ? decode_to_host(*bias) : std::vector<float>(static_cast<size_t>(channels), kNoBias);
  out.insert(out.end(), values.begin(), values.end());
}

using Bias = std::optional<DenseView> Expert::*;
using Half = WeightView Expert::*;

bool any_has(const ExpertWeights& weights, Bias bias) {
  return std::any_of(weights.experts.begin(), weights.experts.end(),
                     [&](const Expert& expert) { return (expert.*bias).has_value(); });
}

bool gate_up_has_bias(const ExpertWeights& weights) {
  return any_has(weights, &Expert::gate_bias) || any_has(weights, &Expert::up_bias);
}

std::vector<float> policy_scales(ScalePolicy policy, std::vector<float> scales,
                                 std::optional<float> over_all) {
  if (policy == ScalePolicy::kMaxOverExperts && !scales.empty()) {
    scales.assign(scales.size(), over_all ? *over_all : *std::max_element(scales.begin(), scales.end()));
  }
  return scales;
}

void upload(const Memory& memory, const std::vector<float>& values, const Buffer& to) {
  memory.copy_from_host(to.data(), values.data(), values.size() * sizeof(float));
}

Buffer allocate_floats(const Memory& memory, int64_t count) {
  return memory.allocate(static_cast<size_t>(count) * sizeof(float));
}

/// `rows`: of all matrices of an expert that this one GEMM multiplies by; `halves`: how many there are.
PreparedMatrix allocate_matrix(const Memory& memory, int64_t experts, int64_t bytes, int64_t halves,
                               int64_t rows, bool bias) {
  return {memory.allocate(static_cast<size_t>(experts * bytes)), allocate_floats(memory, experts * halves),
          allocate_floats(memory, bias ? experts * rows : 0)};
}

/// Why one matrix can't be prepared; empty when it can.
std::string why_not(std::string_view backend, const WeightView& weight, int device) {
  const auto* blocks = std::get_if<BlockScaledView>(&weight);
  if (blocks == nullptr || blocks->format != QuantFormat::kNvfp4) {
    return fmt::format("is {}: {} multiplies NVFP4 experts alone", format_name(weight), backend);
  }
  const Device where = device_of(weight);
  if (where.kind == Device::Kind::kCuda && where.index != device) {
    return fmt::format("lies on CUDA device {}, and the layer would on {}", where.index, device);
  }
  return "";
}

}  // namespace

std::string why_unpreparable(std::string_view backend, const ExpertWeights& weights, int device) {
  std::vector<const Expert*> experts;
  for (const Expert& expert : weights.experts) experts.push_back(&expert);
  if (weights.shared) experts.push_back(&weights.shared->expert);
  for (const Expert* expert : experts) {
    for (const auto& [which, half] : {std::pair<const char*, Half>("gate", &Expert::gate),
                                      {"up", &Expert::up},
                                      {"down", &Expert::down}}) {
      if (half == Half(&Expert::gate) && !expert->has_gate()) continue;
      const std::string reason = why_not(backend, expert->*half, device);
      if (!reason.empty()) return fmt::format("{} {} {}", expert->name, which, reason);
    }
  }
  return "";
}

std::vector<float> decode_to_host(const DenseView& row) {
  DenseView host = row;
  std::vector<std::byte> bytes;
  if (row.device.kind != Device::Kind::kHost) {
    bytes.resize(static_cast<size_t>(row.cols) * (row.type == ElementType::kF32 ? 4 : 2));
    device_memory(row.device.index).copy_to_host(bytes.data(), row.data, bytes.size());
    host.data = bytes.data();
    host.device = Device::host();
  }
  std::vector<float> values(static_cast<size_t>(row.cols));
  decode_row(host, 0, values.data());
  return values;
}

PreparedWeights::PreparedWeights(std::string_view backend, const ExpertWeights& weights,
                                 const LayerConfig& config, const LayerOptions& options, const Memory& memory,
                                 std::unique_ptr<const WeightPacker> packer)
    : backend_(backend),
      config_(config),
      options_(options),
      memory_(memory),
      packer_(std::move(packer)),
      described_(weights) {
  described_.storage.reset();
  described_.shared.reset();
  const int64_t experts = config.experts;
  gate_up_ =
      allocate_matrix(memory, experts, packer_->gate_up_bytes(), is_gated(config.activation.kind) ? 2 : 1,
                      config.h_columns(), gate_up_has_bias(weights));
  down_ = allocate_matrix(memory, experts, packer_->down_bytes(), 1, config.hidden,
                          any_has(weights, &Expert::down_bias));
  x_scales_ = allocate_floats(memory, experts);
  intermediate_scales_ = allocate_floats(memory, experts);
  fill(weights);
}

void PreparedWeights::require_replaceable_by(const ExpertWeights& weights) const {
  validate(weights, config_, options_);
  validate_update(described_, weights);
  const std::string reason = why_unpreparable(backend_, weights, memory_.device().index);
  if (!reason.empty()) throw Error(ErrorCode::kUnsupported, "update_weights: " + reason);
  for (const auto& [what, had, has] :
       {std::tuple("gate/up biases", gate_up_.bias.bytes() > 0, gate_up_has_bias(weights)),
        std::tuple("down biases", down_.bias.bytes() > 0, any_has(weights, &Expert::down_bias))}) {
    if (had != has)
      reject(fmt::format("update_weights: {}", what), had ? "some" : "none", has ? "some" : "none");
  }
}

void PreparedWeights::update(const ExpertWeights& weights) {
  memory_.synchronize();  // for calls in flight that still read what will be replaced
  fill(weights);
}

void PreparedWeights::fill(const ExpertWeights& weights) {
  pack(weights);
  std::vector<float> gate_up_globals, down_globals, gate_up_bias, down_bias;
  for (const Expert& expert : weights.experts) {
    if (expert.has_gate()) {
      gate_up_globals.push_back(global_multiplier(expert.gate));
      append_bias(expert.gate_bias, config_.intermediate, gate_up_bias);
    }
    gate_up_globals.push_back(global_multiplier(expert.up));
    append_bias(expert.up_bias, config_.intermediate, gate_up_bias);
    down_globals.push_back(global_multiplier(expert.down));
    append_bias(expert.down_bias, config_.hidden, down_bias);
  }
  upload(memory_, gate_up_globals, gate_up_.globals);
  upload(memory_, down_globals, down_.globals);
  if (gate_up_.bias.bytes() > 0) upload(memory_, gate_up_bias, gate_up_.bias);
  if (down_.bias.bytes() > 0) upload(memory_, down_bias, down_.bias);
  upload(memory_, policy_scales(options_.x_scale, x_input_scales(weights), options_.x_max_scale), x_scales_);
  upload(memory_,
         policy_scales(options_.intermediate_scale, intermediate_input_scales(weights),
                       options_.intermediate_max_scale),
         intermediate_scales_);
  memory_.synchronize();
}

void PreparedWeights::pack(const ExpertWeights& weights) {
  Staging staging(weights, memory_);
  std::byte* gate_up = gate_up_.packed.data();
  std::byte* down = down_.packed.data();
  for (const Expert& expert : weights.experts) {
    if (expert.has_gate()) {
      const BlockScaledView gate = staging.bring(blocks_of(expert.gate));
      packer_->pack_gate_up(&gate, staging.bring(blocks_of(expert.up)), gate_up);
    } else {
      packer_->pack_gate_up(nullptr, staging.bring(blocks_of(expert.up)), gate_up);
    }
    staging.restart();
    packer_->pack_down(staging.bring(blocks_of(expert.down)), down);
    staging.restart();
    gate_up += packer_->gate_up_bytes();
    down += packer_->down_bytes();
  }
  memory_.synchronize();  // before the staging buffer goes
}

}  // namespace fourfold::cuda
