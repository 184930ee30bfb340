// A job of the oracle driver: tensors and options in, tensors out.
#pragma once

#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "fourfold/activations.h"
#include "fourfold/gemm.h"
#include "fourfold/moe_layer.h"
#include "fourfold/safetensors.h"
#include "fourfold/scale_layout.h"
#include "fourfold/tensor.h"

namespace fourfold {

class Job {
 public:
  Job(const std::string& in, std::map<std::string, std::string> options)
      : file_(SafetensorsFile::open(in)), options_(std::move(options)) {}

  std::string option(const std::string& key, const std::string& fallback = "") const {
    const auto it = options_.find(key);
    return it == options_.end() ? fallback : it->second;
  }

  bool has(const std::string& name) const { return file_->find(name) != nullptr; }
  const std::vector<int64_t>& shape(const std::string& name) const { return file_->at(name).shape; }

  /// A tensor's elements, copied to where they are aligned.
  template <class T>
  std::vector<T> values(const std::string& name) const {
    const Tensor& tensor = file_->at(name);
    std::vector<T> copy(static_cast<size_t>(tensor.bytes) / sizeof(T));
    if (!copy.empty()) std::memcpy(copy.data(), tensor.data, copy.size() * sizeof(T));
    return copy;
  }

  /// A matrix kept alive by the job. Tensors of higher rank fold into [rows, last extent].
  template <class T>
  MatrixView<const T> matrix(const std::string& name) {
    const std::vector<int64_t>& extents = shape(name);
    const int64_t cols = extents.back();
    auto& bytes = kept_.emplace_back(values<std::byte>(name));
    const auto rows = cols == 0 ? 0 : static_cast<int64_t>(bytes.size() / sizeof(T)) / cols;
    return {reinterpret_cast<const T*>(bytes.data()), rows, cols};
  }

  /// A result of `shape`, zeroed, to be filled in.
  template <class T>
  T* result(const std::string& name, DType type, std::vector<int64_t> shape) {
    TensorSpec spec{name, type, std::move(shape)};
    auto& bytes = results_.emplace_back(static_cast<size_t>(spec.bytes()));
    specs_.push_back(std::move(spec));
    return reinterpret_cast<T*>(bytes.data());
  }

  template <class T>
  void result(const std::string& name, DType type, std::vector<int64_t> shape, const std::vector<T>& values) {
    T* data = result<T>(name, type, std::move(shape));
    if (!values.empty()) std::memcpy(data, values.data(), values.size() * sizeof(T));
  }

  void save(const std::string& out) const {
    std::vector<TensorData> tensors;
    for (size_t i = 0; i < specs_.size(); ++i) tensors.push_back({specs_[i], results_[i]});
    write_safetensors(out, tensors);
  }

 private:
  std::shared_ptr<const SafetensorsFile> file_;
  std::map<std::string, std::string> options_;
  std::deque<std::vector<std::byte>> kept_;
  std::deque<std::vector<std::byte>> results_;
  std::vector<TensorSpec> specs_;
};

inline int64_t ssize_of(const auto& container) {
  return static_cast<int64_t>(container.size());
}

inline Accumulation accumulation_of(const Job& job) {
  return job.option("accumulate", "f32") == "f64" ? Accumulation::kFloat64 : Accumulation::kFloat32;
}

/// By `kind`, `limit`, `alpha` and `beta`, each after `prefix`.
ActivationFunction activation_of(const Job& job, const std::string& prefix = "");

/// Swizzled scales whose padding is 0x7F, e4m3's NaN: a GEMM that reads padding shows it. `used` is what
/// swizzling ones gives.
std::vector<uint8_t> with_poisoned_padding(std::vector<uint8_t> swizzled, const std::vector<uint8_t>& used);

DenseView dense_view(const MatrixView<const Bf16>& matrix);
DenseView dense_vector(const MatrixView<const float>& vector);

/// A whole layer with every stage (oracle_layers.cpp).
void run_layer(Job& job);
/// A layer of a checkpoint on disk, routed by its own router.
void run_checkpoint_layer(Job& job);
/// Weights of every expert of a layer, dequantized: "E.gate", "E.up", "E.down" in float32.
void read_checkpoint_weights(Job& job);

}  // namespace fourfold
