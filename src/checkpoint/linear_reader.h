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

/// What is wrong with a global scale of this kind, or nothing: multipliers are finite and at least 0,
/// divisors finite and above 0.
std::optional<std::string> why_bad_global(GlobalScale global);

/// Whether scales of `type` may be read as `wanted`: they are that, or the bytes of e8m0 that writers without
/// a name for the type store as U8. `forced`, by a caller who names the scheme: any type of one byte.
bool is_scale_type(DType type, ScaleType wanted, bool forced);

/// Reads the tensors of one linear layer, e.g. everything that starts with "layers.0.ffn.experts.7.w1".
/// `scheme`: how to read codes of four bits, instead of what names and dtypes say.
class LinearReader {
 public:
  LinearReader(const Checkpoint& checkpoint, std::string name, std::optional<WeightScheme> scheme = {})
      : checkpoint_(checkpoint), name_(std::move(name)), scheme_(scheme) {}

  bool exists() const;
  /// The weight [out, in], whatever its scheme; adds the scheme's name to `schemes`.
  WeightView weight(std::set<std::string>& schemes) const;
  /// [1, out]; absent where the layer has none.
  std::optional<DenseView> bias(int64_t out) const;
  /// The multiplier; where the file holds a divisor, its reciprocal, rounded once.
  std::optional<float> input_scale() const;
  /// Refuses tensors beside the weight that nothing here reads: they would change what the layer computes.
  void require_all_known() const;

 private:
  /// Codes of four bits: how they are scaled, and by which tensors.
  struct FourBit {
    QuantFormat format = QuantFormat::kNvfp4;
    GlobalScaleKind global_kind = GlobalScaleKind::kMultiplier;
    const char* scales = "";
    const char* global = "";  ///< empty: none
    std::string_view name;    ///< of the scheme, for people
  };

  const Tensor* find(std::string_view suffix) const { return checkpoint_.find(name_ + std::string(suffix)); }
  const Tensor& required(const char* suffix) const;
  const Tensor& codes() const;
  FourBit four_bit(const Tensor& codes) const;
  const Tensor& scales(const char* suffix, DType type, int64_t rows, int64_t cols) const;
  WeightView block_scaled(const Tensor& codes, const FourBit& layout) const;
  GlobalScale global_scale(const FourBit& layout) const;
  void require_e8m0(const BlockScaledView& view, const Tensor& scales) const;
  const char* fp8_scales() const;
  WeightView fp8(const Tensor& weight) const;

  const Checkpoint& checkpoint_;
  std::string name_;
  std::optional<WeightScheme> scheme_;
};

/// Reads one matrix of all experts stored as one tensor, e.g. everything that starts with
/// "model.layers.0.mlp.experts.gate_up_proj": dense, NVFP4 or MXFP4, (E, out, in) or transposed (E, in, out);
/// or gpt-oss's MXFP4 blocks (E, out, in / 32, 16). `scheme` as for LinearReader.
class FusedReader {
 public:
  FusedReader(const Checkpoint& checkpoint, std::string name, std::optional<WeightScheme> scheme = {});

  int64_t experts() const { return weight_->shape[0]; }
  /// (out, in) of a matrix, if it is stored plainly or `transposed`; nullopt where that can't be.
  std::optional<std::pair<int64_t, int64_t>> shape(bool transposed) const;
  /// For messages.
  const Tensor& tensor() const { return *weight_; }
  std::string scheme() const;
  QuantFormat format() const { return format_; }  ///< of four-bit experts

  /// Expert's whole matrix [out, in]. Transposed ones are repacked into `storage`.
  WeightView matrix(int64_t expert, bool transposed, RepackedBytes& storage) const;
  /// Expert's bias [out]; absent where there is none.
  std::optional<DenseView> bias(int64_t expert, int64_t out) const;
  std::optional<float> input_scale(int64_t expert) const;
  /// Names of the tensors that are read.
  std::set<std::string> tensor_names() const;

 private:
  enum class Kind : uint8_t { kDense, kPacked, kMxfp4Blocks };

  void find_blocks();
  void find_matrix();
  const Tensor& required(const std::string& suffix) const;
  float scalar_of(const Tensor& tensor, int64_t expert) const;
  DenseView dense_matrix(int64_t expert) const;
  BlockScaledView block_scaled_matrix(int64_t expert, bool transposed) const;

  const Checkpoint& checkpoint_;
  std::string name_;
  std::optional<WeightScheme> scheme_;
  Kind kind_ = Kind::kDense;
  QuantFormat format_ = QuantFormat::kNvfp4;  // of kPacked and kMxfp4Blocks
  const Tensor* weight_ = nullptr;
  const Tensor* scales_ = nullptr;  // likewise
};

/// `source` [rows, cols] of elements of `size` bytes -> `out` [cols, rows], in tiles that stay in the cache.
void transpose(const std::byte* source, int64_t rows, int64_t cols, int64_t size, std::byte* out);

/// Rows first, first + step, ... of `weight`, `count` of them; a view of the same memory.
WeightView take_rows(const WeightView& weight, int64_t first, int64_t count, int64_t step);

}  // namespace fourfold
