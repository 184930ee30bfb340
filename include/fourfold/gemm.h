// The GEMM operations that every backend offers: dense, and grouped in the 2Dx3D form.
//
// Pointers lie where the backend computes: in host memory for CPUs; in device memory for GPUs, where `stream`
// is a cudaStream_t and a call only enqueues. Shapes are read on the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <variant>
#include <vector>

#include "fourfold/activations.h"
#include "fourfold/block_scaled.h"
#include "fourfold/export.h"

namespace FOURFOLD_EXPORT fourfold {

enum class Accumulation : uint8_t { kFloat32, kFloat64 };

/// bf16 or float32, row-major.
using OutputView = std::variant<MatrixView<Bf16>, MatrixView<float>>;

/// d[m,n] = alpha(m) * sum_k a[m,k] * b[n,k], alpha(m) = (global scale of a's row m) x (global scale of b).
/// Shapes: a [M,K], b [N,K], d [M,N].
struct GemmArgs {
  ActivationView a;
  WeightView b;
  OutputView d;
  Accumulation accumulation = Accumulation::kFloat32;
  std::span<std::byte> workspace = {};  ///< Backend::gemm_workspace_bytes()
  void* stream = nullptr;
};

/// d[m,n] = alpha(m) * sum_k a[m,k] * b[e][n,k], where row m lies in group e.
/// Shapes: a [M,K], b E times [N,K], group_offsets [E+1] from 0 to M, d [M,N]. Groups may be empty.
struct GroupedGemmArgs {
  ActivationView a;
  std::span<const WeightView> b;
  std::span<const int32_t> group_offsets;  ///< where the backend computes: GPUs do not read it back
  OutputView d;
  Accumulation accumulation = Accumulation::kFloat32;
  std::span<std::byte> workspace = {};  ///< Backend::gemm_workspace_bytes()
  void* stream = nullptr;
};

/// A stacked weight tensor (E, N, K) as one view an expert. NVFP4: codes (E, N, K/2); scales (E, N, K/16)
/// row-major, or swizzled (E, swizzled_scale_bytes(N, K/16)); global scales [E].
std::vector<WeightView> stacked_nvfp4_weights(const uint8_t* codes, const uint8_t* scales, ScaleLayout layout,
                                              std::span<const float> globals, int64_t rows, int64_t cols);

/// Throws Error when staged activations lack what their format needs. `groups`: how many group scales to
/// expect.
void validate(const ActivationView& a, size_t groups);

/// Throws Error when shapes, strides and formats do not fit each other; backends call it first.
void validate(const GemmArgs& args);
/// The same, and group offsets: it reads them, so it is for backends that compute on the host.
void validate(const GroupedGemmArgs& args);
/// The same without a look at the offsets, which GPUs have in their own memory.
void validate_shapes(const GroupedGemmArgs& args);

}  // namespace fourfold
