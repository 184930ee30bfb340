// One linear layer of a checkpoint, and one fused tensor of all experts, in whatever scheme they are stored.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "fourfold/checkpoint.h"

namespace fourfold {

[[noreturn]] void bad_tensor(const Tensor& tensor, const std::string& expected, const std::string& hint = "");

/// nullopt for types that are not plain numbers of 16 or 32 bits.
std::optional<ElementType> dense_type(DType type);

/// `tensor` as a matrix; it must be BF16, F16 or F32 and have exactly `shape`, [rows, cols] or [cols].
DenseView dense_tensor(const Tensor& tensor, const std::vector<int64_t>& shape);

/// Bytes that views of a loaded layer point to, beside the mapped files.
class RepackedBytes {
 public:
  std::byte* add(int64_t bytes);

 private:
  std::vector<std::unique_ptr<std::byte[]>> blocks_;
};

/// Reads the tensors of one linear layer, e.g. everything that starts with "layers.0.ffn.experts.7.w1".
class LinearReader {
 public:
  LinearReader(const Checkpoint& checkpoint, std::string name)
      : checkpoint_(checkpoint), name_(std::move(name)) {}

  bool exists() const;
  /// The weight [out, in], whatever its scheme; adds the scheme's name to `schemes`.
  WeightView weight(std::set<std::string>& schemes) const;
  /// [1, out]; absent where the layer has none.
  std::optional<DenseView> bias(int64_t out) const;
  std::optional<float> input_scale() const;
  /// Refuses tensors beside the weight that nothing here reads: they would change what the layer computes.
  void require_all_known() const;

 private:
  const Tensor* find(const char* suffix) const { return checkpoint_.find(name_ + suffix); }
  const Tensor& required(const char* suffix) const;
  const Tensor& scales(const char* suffix, DType type, int64_t rows, int64_t cols) const;
  BlockScaledView block_scaled(const Tensor& weight, QuantFormat format, const char* suffix,
                               DType type) const;
  WeightView nvfp4(const Tensor& weight) const;
  WeightView mxfp4(const Tensor& weight) const;
  WeightView fp8(const Tensor& weight) const;

  const Checkpoint& checkpoint_;
  std::string name_;
};

/// Reads one matrix of all experts stored as one tensor, e.g. everything that starts with
/// "model.layers.0.mlp.experts.gate_up_proj": dense or NVFP4, (E, out, in) or transposed (E, in, out); or
/// gpt-oss's MXFP4 blocks (E, out, in / 32, 16).
class FusedReader {
 public:
  FusedReader(const Checkpoint& checkpoint, std::string name);

  int64_t experts() const { return weight_->shape[0]; }
  /// (out, in) of a matrix, if it is stored plainly or `transposed`; nullopt where that can't be.
  std::optional<std::pair<int64_t, int64_t>> shape(bool transposed) const;
  /// For messages.
  const Tensor& tensor() const { return *weight_; }
  std::string scheme() const;

  /// Expert's whole matrix [out, in]. Transposed ones are repacked into `storage`.
  WeightView matrix(int64_t expert, bool transposed, RepackedBytes& storage) const;
  /// Expert's bias [out]; absent where there is none.
  std::optional<DenseView> bias(int64_t expert, int64_t out) const;
  std::optional<float> input_scale(int64_t expert) const;
  /// Names of the tensors that are read.
  std::set<std::string> tensor_names() const;

 private:
  enum class Kind : uint8_t { kDense, kNvfp4, kMxfp4 };

  const Tensor& required(const std::string& suffix) const;
  float scalar_of(const Tensor& tensor, int64_t expert) const;
  DenseView dense_matrix(int64_t expert) const;
  BlockScaledView block_scaled_matrix(int64_t expert, bool transposed) const;

  const Checkpoint& checkpoint_;
  std::string name_;
  Kind kind_ = Kind::kDense;
  const Tensor* weight_ = nullptr;
  const Tensor* scales_ = nullptr;  // of kNvfp4 and kMxfp4
};

/// Rows first, first + step, ... of `weight`, `count` of them; a view of the same memory.
WeightView take_rows(const WeightView& weight, int64_t first, int64_t count, int64_t step);

}  // namespace fourfold
