// The grouped NVFP4 GEMMs of this room, one set a GPU architecture, as plain functions.
//
//   d[g] = alpha[g] * a[g] . b[g]^T,   a[g] [M_g, K], b[g] [N, K], both NVFP4;  d[g] [M_g, N]
//
// The kernels are CUTLASS collectives (src/blackwell/cutlass_gemm.cuh), an architecture a translation unit.
// They find groups in arrays that lie on the device (src/blackwell/group_arrays.h), so that nothing is read
// back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace fourfold::blackwell {

/// Operands lie in rows of a multiple of this many values: the tensor memory accelerator wants 16 bytes.
inline constexpr int64_t kDepthMultiple = 32;
/// N is a multiple of this: rows of bf16 in 16 bytes.
inline constexpr int64_t kColumnMultiple = 8;

/// Arrays on the device, one entry a group, of the types of src/blackwell/group_entries.h.
struct GroupArrays {
  int32_t groups = 0;
  void *shapes = nullptr, *a = nullptr, *a_strides = nullptr, *a_scales = nullptr, *a_scale_layouts = nullptr;
  void *b = nullptr, *b_strides = nullptr, *b_scales = nullptr, *b_scale_layouts = nullptr;
  void *d = nullptr, *d_strides = nullptr;
  void* alphas = nullptr;  ///< addresses of one float32 a group; not read by kernels with float32 output
  void* alpha_values = nullptr;  ///< where they point to
};

/// One compiled kernel.
struct GemmKernel {
  int tile_m = 0, tile_n = 0, tile_k = 0;  ///< rows of a, of b, and values of K that a CTA takes at a time
  int stages = 0, threads = 0, shared_bytes = 0;
  /// CUTLASS's own check of one group's shape.
  bool (*can_multiply)(int64_t m, int64_t n, int64_t k) = nullptr;
  /// Workspace on the device: tensor maps of every multiprocessor.
  size_t (*workspace_bytes)(int32_t groups, int multiprocessors) = nullptr;
  /// Enqueues alone. Throws Error when CUTLASS or CUDA refuses.
  void (*launch)(const GroupArrays& groups, int multiprocessors, std::span<std::byte> workspace,
                 void* stream) = nullptr;
};

/// One for each output.
struct OutputKernels {
  GemmKernel to_bf16;     ///< d = bf16(alpha * sum)
  GemmKernel to_float32;  ///< d = sum
};

/// The kernels of one architecture.
struct GemmKernels : OutputKernels {
  std::string_view architecture;  ///< as nvcc calls it, e.g. "sm_100a"
  /// The compute capability that the code runs on: this one alone ("sm_100a"), or those of later minor
  /// numbers too ("sm_120f", a family).
  int major = 0, minor = 0;
  std::string_view instruction;  ///< the multiply in its PTX

  bool is_family() const { return architecture.ends_with('f'); }
  bool runs_on(int gpu_major, int gpu_minor) const {
    return gpu_major == major && (is_family() ? gpu_minor >= minor : gpu_minor == minor);
  }
  /// The compute capabilities in words: "10.0", or "12.0 and later of 12".
  std::string capability() const;
};

/// All that are compiled in, by compute capability.
std::span<const GemmKernels> compiled_kernels();
/// Those of a GPU; null where none are compiled in.
const GemmKernels* kernels_of(int major, int minor);

}  // namespace fourfold::blackwell
