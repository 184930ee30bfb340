#include "tools/layer_inputs.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>

#include "base/fail.h"
#include "fourfold/safetensors.h"
#include "tools/random.h"

namespace fourfold {
namespace {

[[noreturn]] void bad_input(const Tensor& tensor, const std::string& expected) {
  fail(ErrorCode::kBadFile, "{}: tensor '{}': expected {}, found {}", tensor.file, tensor.name, expected,
       tensor.describe());
}

template <class T>
T element(const Tensor& tensor, int64_t index) {
  T value;
  std::memcpy(&value, tensor.data + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

/// NaN in the input would be blamed on the layer.
void require_finite(const Tensor& tensor, int64_t token, float value) {
  if (!std::isfinite(value)) {
    fail(ErrorCode::kBadFile, "{}: tensor '{}', token {}: expected finite numbers, found {}", tensor.file,
         tensor.name, token, value);
  }
}

void require_x(const Tensor& x, int64_t hidden) {
  if ((x.dtype != DType::kBf16 && x.dtype != DType::kF16 && x.dtype != DType::kF32) || x.shape.size() != 2 ||
      x.shape[1] != hidden) {
    bad_input(x, fmt::format("BF16, F16 or F32 [T, {}]", hidden));
  }
  if (x.shape[0] == 0) bad_input(x, "at least one token");
}

/// Tokens from `first` on, as many as `inputs` is to have.
void read_x(const Tensor& tensor, int64_t first, LayerInputs& inputs) {
  ElementType type = ElementType::kBf16;
  if (tensor.dtype == DType::kF16) type = ElementType::kF16;
  if (tensor.dtype == DType::kF32) type = ElementType::kF32;
  const DenseView rows{
      type, tensor.data, tensor.shape[0], inputs.hidden, inputs.hidden * bits_of(tensor.dtype) / 8, {}};
  inputs.x.resize(static_cast<size_t>(inputs.tokens * inputs.hidden));
  std::vector<float> row(static_cast<size_t>(inputs.hidden));
  for (int64_t token = 0; token < inputs.tokens; ++token) {
    decode_row(rows, first + token, row.data());
    for (const float value : row) require_finite(tensor, first + token, value);
    std::transform(row.begin(), row.end(), inputs.x.begin() + token * inputs.hidden, encode_bf16);
  }
}

/// The same of ids and weights, which are as long as x.
void read_routing(const Tensor& ids, const Tensor& weights, int64_t tokens_in_file, int64_t first,
                  LayerInputs& inputs) {
  const bool wide = ids.dtype == DType::kI64;
  if ((!wide && ids.dtype != DType::kI32) || ids.shape.size() != 2 || ids.shape[0] != tokens_in_file ||
      ids.shape[1] < 1) {
    bad_input(ids, fmt::format("I32 or I64 [{}, K]", tokens_in_file));
  }
  if (weights.dtype != DType::kF32 || weights.shape != ids.shape) {
    bad_input(weights, fmt::format("F32 {}", shape_text(ids.shape[0], ids.shape[1])));
  }
  inputs.top_k = ids.shape[1];
  for (int64_t slot = first * inputs.top_k; slot < (first + inputs.tokens) * inputs.top_k; ++slot) {
    const int64_t id = wide ? element<int64_t>(ids, slot) : element<int32_t>(ids, slot);
    if (id < kAbsentExpert || id > INT32_MAX) {
      fail(ErrorCode::kBadFile, "{}: tensor '{}': expected expert numbers (or -1), found {}", ids.file,
           ids.name, id);
    }
    inputs.topk_ids.push_back(static_cast<int32_t>(id));
    inputs.topk_weights.push_back(element<float>(weights, slot));
    require_finite(weights, slot / inputs.top_k, inputs.topk_weights.back());
  }
  inputs.routing_origin = ids.file;
}

void read_token_ids(const Tensor& tensor, int64_t tokens_in_file, int64_t first, LayerInputs& inputs) {
  const bool wide = tensor.dtype == DType::kI64;
  if ((!wide && tensor.dtype != DType::kI32) || tensor.shape != std::vector{tokens_in_file}) {
    bad_input(tensor, fmt::format("I32 or I64 [{}]", tokens_in_file));
  }
  for (int64_t token = first; token < first + inputs.tokens; ++token) {
    inputs.token_ids.push_back(wide ? element<int64_t>(tensor, token) : element<int32_t>(tensor, token));
  }
}

/// "layers.3.x" -> 3.
std::optional<int64_t> layer_of_x(std::string_view name) {
  constexpr std::string_view kBefore = "layers.", kAfter = ".x";
  if (!name.starts_with(kBefore)) return std::nullopt;
  name.remove_prefix(kBefore.size());
  int64_t layer = -1;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), layer);
  const std::string_view rest = name.substr(static_cast<size_t>(end - name.data()));
  if (error != std::errc() || layer < 0 || rest != kAfter) return std::nullopt;
  return layer;
}

}  // namespace

Routing LayerInputs::routing() const {
  return {MatrixView<const int32_t>(topk_ids.data(), tokens, top_k), {topk_weights.data(), tokens, top_k}};
}

LayerInputs make_inputs(int64_t tokens, int64_t hidden, uint64_t seed, bool outliers) {
  LayerInputs inputs;
  inputs.tokens = tokens;
  inputs.hidden = hidden;
  inputs.made_up = true;
  inputs.x.resize(static_cast<size_t>(tokens * hidden));
  inputs.x_origin = fmt::format("{} x, seed {}", outliers ? "heavy-tailed" : "Gaussian", seed);
  std::vector<double> channel_scale(static_cast<size_t>(hidden), 1.0);
  if (outliers) {
    Random channels(seed, Random::Purpose::kChannel, 0);
    for (int64_t i = 0; i < std::max<int64_t>(1, hidden / 64); ++i) {
      channel_scale[static_cast<size_t>(channels.below(hidden))] = 10.0 + 20.0 * channels.uniform();
    }
  }
#pragma omp parallel for schedule(static)
  for (int64_t token = 0; token < tokens; ++token) {
    Random random(seed, Random::Purpose::kToken, static_cast<uint64_t>(token));
    for (int64_t channel = 0; channel < hidden; ++channel) {
      const double value = outliers ? random.student_t(5) : random.normal();
      inputs.x[static_cast<size_t>(token * hidden + channel)] =
          encode_bf16(static_cast<float>(value * channel_scale[static_cast<size_t>(channel)]));
    }
  }
  return inputs;
}

void route_at_random(LayerInputs& inputs, int64_t experts, int64_t top_k, uint64_t seed) {
  inputs.top_k = top_k;
  inputs.topk_ids.clear();
  inputs.topk_weights.clear();
  inputs.routing_origin = fmt::format("uniform top-{} of {} experts, seed {}", top_k, experts, seed);
  std::vector<int32_t> ids(static_cast<size_t>(experts));
  for (int64_t token = 0; token < inputs.tokens; ++token) {
    Random random(seed, Random::Purpose::kRouting, static_cast<uint64_t>(token));
    std::iota(ids.begin(), ids.end(), 0);
    std::vector<double> weights;
    for (int64_t k = 0; k < top_k; ++k) {
      std::swap(ids[static_cast<size_t>(k)], ids[static_cast<size_t>(k + random.below(experts - k))]);
      inputs.topk_ids.push_back(ids[static_cast<size_t>(k)]);
      weights.push_back(0.05 + random.uniform());
    }
    const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
    for (const double weight : weights) inputs.topk_weights.push_back(static_cast<float>(weight / sum));
  }
}

InputFile::InputFile(const std::filesystem::path& path) : file_(SafetensorsFile::open(path)) {
  for (const auto& [name, tensor] : file_->tensors()) {
    if (const auto layer = layer_of_x(name)) layers_.insert(*layer);
  }
  if (layers_.empty() || file_->find("x") == nullptr) return;
  fail(ErrorCode::kBadFile,
       "{}: expected 'x' (one layer's inputs) or 'layers.L.x' (several layers'), found both", path.string());
}

std::string InputFile::prefix(int64_t layer) const {
  return layers_.empty() ? "" : fmt::format("layers.{}.", layer);
}

int64_t InputFile::tokens(int64_t layer) const {
  const Tensor& x = file_->at(prefix(layer) + "x");
  if (x.shape.size() != 2) bad_input(x, "BF16, F16 or F32 [T, H]");
  return x.shape[0];
}

LayerInputs InputFile::read(int64_t layer, int64_t hidden, int64_t first, int64_t count) const {
  const std::string before = prefix(layer);
  const Tensor& x = file_->at(before + "x");
  require_x(x, hidden);
  const int64_t tokens_in_file = x.shape[0];
  LayerInputs inputs;
  inputs.tokens = std::clamp<int64_t>(tokens_in_file - first, 0, count);
  inputs.hidden = hidden;
  inputs.x_origin = path().string();
  read_x(x, first, inputs);
  const Tensor* ids = file_->find(before + "topk_ids");
  const Tensor* weights = file_->find(before + "topk_weights");
  if ((ids == nullptr) != (weights == nullptr)) {
    fail(ErrorCode::kBadFile, "{}: expected {}topk_ids and {}topk_weights together, found {}{} alone",
         path().string(), before, before, before, ids ? "topk_ids" : "topk_weights");
  }
  if (ids) read_routing(*ids, *weights, tokens_in_file, first, inputs);
  const Tensor* token_ids = file_->find(before + "token_ids");
  if (token_ids == nullptr) token_ids = file_->find("token_ids");
  if (token_ids) read_token_ids(*token_ids, tokens_in_file, first, inputs);
  return inputs;
}

LayerInputs read_inputs(const std::filesystem::path& path, int64_t layer, int64_t hidden,
                        int64_t max_tokens) {
  const InputFile file(path);
  return file.read(layer, hidden, 0, max_tokens > 0 ? max_tokens : file.tokens(layer));
}

LayerInputs read_routing(const std::filesystem::path& path) {
  const auto file = SafetensorsFile::open(path);
  const Tensor& ids = file->at("topk_ids");
  if (ids.shape.size() != 2 || ids.shape[0] < 1) bad_input(ids, "at least one token");
  LayerInputs inputs;
  inputs.tokens = ids.shape[0];
  read_routing(ids, file->at("topk_weights"), inputs.tokens, 0, inputs);
  return inputs;
}

void write_inputs(const std::filesystem::path& path, const LayerInputs& inputs) {
  std::vector<TensorData> tensors = {
      {{"x", DType::kBf16, {inputs.tokens, inputs.hidden}}, std::as_bytes(std::span(inputs.x))}};
  if (!inputs.topk_ids.empty()) {
    const std::vector<int64_t> slots = {inputs.tokens, inputs.top_k};
    tensors.push_back({{"topk_ids", DType::kI32, slots}, std::as_bytes(std::span(inputs.topk_ids))});
    tensors.push_back({{"topk_weights", DType::kF32, slots}, std::as_bytes(std::span(inputs.topk_weights))});
  }
  if (!inputs.token_ids.empty()) {
    tensors.push_back(
        {{"token_ids", DType::kI64, {inputs.tokens}}, std::as_bytes(std::span(inputs.token_ids))});
  }
  write_safetensors(path, tensors);
}

}  // namespace fourfold
