// Carving one caller-owned workspace into arrays. The same code, run without memory, gives the size.
#pragma once

#include <cstddef>
#include <span>

#include "fourfold/activations.h"
#include "fourfold/error.h"
#include "fourfold/moe_layer.h"

namespace fourfold {

class WorkspaceCarver {
 public:
  /// Only counts bytes.
  WorkspaceCarver() = default;
  /// Hands out parts of `workspace`, which starts at a multiple of kWorkspaceAlignment; throws Error when it
  /// is too small.
  explicit WorkspaceCarver(std::span<std::byte> workspace)
      : base_(workspace.data()), bytes_(workspace.size()) {}

  template <class T>
  std::span<T> take(int64_t count) {
    const size_t offset = used_;
    size_t bytes = 0;
    if (count < 0 || __builtin_mul_overflow(static_cast<size_t>(count), sizeof(T), &bytes) ||
        __builtin_add_overflow(used_, bytes + kWorkspaceAlignment, &bytes)) {
      throw Error(ErrorCode::kInvalidArgument, "workspace: expected a size that fits 64 bits, found more");
    }
    used_ = (bytes - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
    if (base_ == nullptr) return {};
    if (used_ > bytes_) {
      throw Error(ErrorCode::kInvalidArgument, "workspace: expected at least " + std::to_string(used_) +
                                                   " bytes, found " + std::to_string(bytes_));
    }
    return {reinterpret_cast<T*>(base_ + offset), static_cast<size_t>(count)};
  }

  template <class T>
  MatrixView<T> take(int64_t rows, int64_t cols) {
    return {take<T>(rows * cols).data(), rows, cols};
  }

  /// Room for `rows` x `cols` staged activations.
  StagedActivations take_staged(ActivationFormat format, int64_t rows, int64_t cols) {
    StagedActivations staged;
    if (format == ActivationFormat::kBf16) {
      staged.values = take<Bf16>(rows, cols);
      return staged;
    }
    staged.row_scales = take<float>(rows);
    staged.codes = take<uint8_t>(rows, format == ActivationFormat::kFp8 ? cols : cols / 2);
    if (is_nvfp4(format)) staged.scales = take<uint8_t>(rows, cols / 16);
    if (format == ActivationFormat::kNvfp4x2) {
      staged.residual_codes = take<uint8_t>(rows, cols / 2);
      staged.residual_scales = take<uint8_t>(rows, cols / 16);
    }
    return staged;
  }

  size_t used() const { return used_; }

 private:
  std::byte* base_ = nullptr;
  size_t bytes_ = 0;
  size_t used_ = 0;
};

}  // namespace fourfold
