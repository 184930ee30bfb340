#include "tools/stress_call.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

namespace fourfold {
namespace {

constexpr size_t kGuardBytes = 256;
constexpr uint8_t kUntouched = 0xA5;

/// `rows` of `width` values, `stride` apart, in a buffer of `bytes`; all else is `poison`.
template <class T>
void upload(const Memory& memory, const Buffer& buffer, const T* values, int64_t rows, int64_t width,
            int64_t stride, T poison) {
  std::vector<T> padded(buffer.bytes() / sizeof(T), poison);
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(values + row * width, width, padded.begin() + row * stride);
  }
  memory.copy_from_host(buffer.data(), padded.data(), padded.size() * sizeof(T));
}

bool is_untouched(const std::byte* bytes, size_t count) {
  return std::all_of(bytes, bytes + count, [](std::byte byte) { return byte == std::byte{kUntouched}; });
}

}  // namespace

std::vector<float> CallOutput::values(bool is_float) const {
  std::vector<float> values(y.size() / (is_float ? 4 : 2));
  if (is_float) {
    std::memcpy(values.data(), y.data(), y.size());
    return values;
  }
  for (size_t i = 0; i < values.size(); ++i) {
    Bf16 value;
    std::memcpy(&value, y.data() + 2 * i, 2);
    values[i] = static_cast<float>(value);
  }
  return values;
}

StressCall::StressCall(const MoeLayer& layer, const Memory& memory, int64_t max_tokens,
                       const CallSettings& settings)
    : layer_(layer),
      memory_(memory),
      settings_(settings),
      plan_(layer.plan(max_tokens)),
      max_tokens_(max_tokens) {
  const LayerConfig& config = layer.config();
  const auto bytes = [&](int64_t width, int64_t element) {
    // A row more than there can be, and never nothing.
    return static_cast<size_t>((max_tokens + 1) * (width + settings.padding) * element);
  };
  x_ = memory.allocate(bytes(config.hidden, 2));
  ids_ = memory.allocate(bytes(config.top_k, settings.wide_ids ? 8 : 4));
  weights_ = memory.allocate(bytes(config.top_k, 4));
  y_ = memory.allocate(bytes(config.hidden, y_element()));
  workspace_ = memory.allocate(plan_.workspace_bytes + kGuardBytes);
  status_ = memory.allocate(sizeof(int32_t));
  memory.fill(workspace_.data(), settings.workspace_byte, plan_.workspace_bytes);
  memory.fill(workspace_.data() + plan_.workspace_bytes, kUntouched, kGuardBytes);
  memory.fill(status_.data(), 0, sizeof(int32_t));
  if (settings.local_experts.empty()) return;
  local_experts_ = memory.allocate(settings.local_experts.size_bytes());
  memory.copy_from_host(local_experts_.data(), settings.local_experts.data(),
                        settings.local_experts.size_bytes());
}

void StressCall::set(const LayerInputs& inputs) {
  const LayerConfig& config = layer_.config();
  tokens_ = inputs.tokens;
  const int64_t x_stride = config.hidden + settings_.padding, stride = config.top_k + settings_.padding;
  upload(memory_, x_, inputs.x.data(), tokens_, config.hidden, x_stride, Bf16{0x7FFF});
  upload(memory_, weights_, inputs.topk_weights.data(), tokens_, config.top_k, stride,
         std::numeric_limits<float>::quiet_NaN());
  if (settings_.wide_ids) {
    const std::vector<int64_t> ids(inputs.topk_ids.begin(), inputs.topk_ids.end());
    upload(memory_, ids_, ids.data(), tokens_, config.top_k, stride, std::numeric_limits<int64_t>::max());
  } else {
    upload(memory_, ids_, inputs.topk_ids.data(), tokens_, config.top_k, stride,
           std::numeric_limits<int32_t>::max());
  }
  memory_.fill(y_.data(), kUntouched, y_.bytes());
  memory_.synchronize();
}

void StressCall::enqueue(void* stream) const {
  const LayerConfig& config = layer_.config();
  const Device device = memory_.device();
  const auto matrix = [&]<class T>(const Buffer& buffer, int64_t width, T*) {
    return MatrixView<T>(reinterpret_cast<T*>(buffer.data()), tokens_, width, width + settings_.padding,
                         device);
  };
  ForwardArgs args;
  args.x = matrix(x_, config.hidden, static_cast<const Bf16*>(nullptr));
  if (settings_.wide_ids) {
    args.routing.topk_ids = matrix(ids_, config.top_k, static_cast<const int64_t*>(nullptr));
  } else {
    args.routing.topk_ids = matrix(ids_, config.top_k, static_cast<const int32_t*>(nullptr));
  }
  args.routing.topk_weights = matrix(weights_, config.top_k, static_cast<const float*>(nullptr));
  args.routing.local_experts = {reinterpret_cast<const int32_t*>(local_experts_.data()),
                                settings_.local_experts.size()};
  if (settings_.float_output) {
    args.y = matrix(y_, config.hidden, static_cast<float*>(nullptr));
  } else {
    args.y = matrix(y_, config.hidden, static_cast<Bf16*>(nullptr));
  }
  args.workspace = {workspace_.data(), plan_.workspace_bytes};
  args.status = reinterpret_cast<int32_t*>(status_.data());
  args.stream = stream;
  layer_.forward(plan_, args);
}

CallOutput StressCall::output() const {
  memory_.synchronize();
  CallOutput output;
  std::vector<std::byte> padded(y_.bytes()), guard(kGuardBytes);
  memory_.copy_to_host(padded.data(), y_.data(), padded.size());
  memory_.copy_to_host(guard.data(), workspace_.data() + plan_.workspace_bytes, kGuardBytes);
  memory_.copy_to_host(&output.status, status_.data(), sizeof(int32_t));
  const auto width = static_cast<size_t>(layer_.config().hidden * y_element());
  const auto stride = static_cast<size_t>((layer_.config().hidden + settings_.padding) * y_element());
  for (size_t row = 0; row < static_cast<size_t>(max_tokens_ + 1); ++row) {
    const std::byte* const first = padded.data() + row * stride;
    const bool is_token = row < static_cast<size_t>(tokens_);
    if (is_token) output.y.insert(output.y.end(), first, first + width);
    const size_t written = is_token ? width : 0;
    if (!is_untouched(first + written, stride - written)) {
      output.trespass = is_token ? fmt::format("it wrote behind row {} of y", row)
                                 : fmt::format("it wrote to row {} of y, which has {} rows", row, tokens_);
    }
  }
  if (!is_untouched(guard.data(), guard.size())) output.trespass = "it wrote behind its workspace";
  return output;
}

CallOutput call_layer(const MoeLayer& layer, const Memory& memory, const LayerInputs& inputs,
                      const CallSettings& settings) {
  StressCall call(layer, memory, inputs.tokens, settings);
  call.set(inputs);
  call.enqueue(nullptr);
  return call.output();
}

}  // namespace fourfold
