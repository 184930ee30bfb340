// Grouped GEMM of one layer's experts on Hopper: NVFP4 weights, packed once, times bf16 token rows.
//
//   d[m, c] = epilogue(alpha(m, c) * sum over terms and k of tokens[term][m, k] * w[e][c, k]),  e = group of
//   m, alpha(m, c) = row_scales[m] * weight_globals[e, half of c], rounded to float32.
//
// Every pointer is a device pointer, every call only enqueues: no allocation, no synchronisation, no host
// read of device data, so that calls can be captured in a CUDA graph. Results do not depend on timing: two
// runs give the same bits. The order of a sum depends on whether kFew is the kernel that describe_kernel()
// names, and so on max_rows; it never depends on the routing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <tuple>

#include "fourfold/block_scaled.h"
#include "fourfold/gemm.h"
#include "fourfold/moe_layer.h"
#include "sm90/gemm_choice.h"
#include "sm90/packed_layout.h"

namespace fourfold::sm90 {

/// One expert's weights on their way from the checkpoint's form into the packed one.
struct PackWeights {
  PackedShape shape;
  /// kPlain: the matrix [channels, depth]. kGateUpPaired: gate. NVFP4 in device memory, codes and scales at
  /// any address and stride, scales row-major or swizzled. The global scale is not looked at: it goes into
  /// ExpertGemm::weight_globals.
  BlockScaledView matrix;
  BlockScaledView up;           ///< kGateUpPaired alone; the shape of `matrix`
  std::byte* packed = nullptr;  ///< shape.bytes(), 128-byte aligned; every byte is written, padding with zero
};

/// Enqueues the packing of one matrix, or of one gate/up pair. The sources may be reused when the stream has
/// passed the call. Throws Error when shapes, formats or alignment do not fit, or CUDA refuses the launch.
void launch_pack_weights(const PackWeights& args, void* stream);

/// Staging of SwiGLU's output in the epilogue, as cuda::stage does it for nvfp4 (and nvfp4x2) with scales
/// that are known before: the same bits.
struct Requantize {
  const float* expert_scales = nullptr;  ///< [E] global scales; null: no staging
  MatrixView<Bf16> residual;             ///< the second term's rows, for nvfp4x2, laid out as d; else empty
  float* row_scales = nullptr;           ///< [max_rows], receives each row's global scale
};

/// Words of ExpertGemm::tickets: one for every launch of a plan.
inline constexpr int64_t kGemmTickets = std::tuple_size_v<decltype(GemmPlan::parts)>;

/// Arguments of one grouped GEMM.
struct ExpertGemm {
  // Token rows, sorted by expert.
  int64_t experts = 0;   ///< E
  int64_t max_rows = 0;  ///< upper bound of M = group_offsets[E]; rows of every matrix here. 0: nothing to do
  /// [max_rows, K] each, 16-byte aligned, stride a multiple of 8 elements. The second is empty unless the
  /// activations are two terms (nvfp4x2). Rows from M on may hold anything.
  MatrixView<const Bf16> tokens[2];
  /// [max_rows], read below M: row m is row slot_of_row[m] / top_k of tokens[0], which then may have any
  /// number of rows. Null: row m is row m. Needs can_gather(); gives the same bits as sorted rows.
  const int32_t* slot_of_row = nullptr;
  int64_t top_k = 1;
  const float* row_scales = nullptr;  ///< [max_rows], with slot_of_row of the rows of tokens[0]; null: 1
  const int32_t* group_offsets =
      nullptr;  ///< [E+1], ascending from 0 to at most max_rows; read on the device
  /// kGemmTickets words that an earlier kernel of the stream has set to zero, complete when group_offsets is.
  /// Tiles are then taken as SMs get free, instead of dealt out in turn: experts with few and with many rows
  /// take differently long. Null: in turn. Changes no bit of the result.
  int32_t* tickets = nullptr;
  std::optional<GemmKernel> kernel;  ///< for tests and measurements; none: plan_gemm's plan

  // Weights.
  PackedShape weights;                    ///< of one expert; depth = K, a multiple of 16, as channels is
  const std::byte* packed = nullptr;      ///< E times weights.bytes(), expert after expert; 128-byte aligned
  const float* weight_globals = nullptr;  ///< [E, halves]: gate then up when paired
  const float* bias = nullptr;            ///< [E, halves * channels], gate's first; null: none

  // What becomes of the sums.
  /// Without an activation: [max_rows, channels], kPlain only, bf16 (rounded once) or float32. With one:
  /// [max_rows, channels] bf16, the activation in float32 of h, h = bf16(alpha * acc + bias); gated kinds
  /// need kGateUpPaired, others kPlain. 16-byte aligned, stride a multiple of 16 bytes. Rows from M on and
  /// columns from `channels` on are not written.
  OutputView d;
  std::optional<ActivationFunction> activation;
  /// Optional, with an activation: h [max_rows, halves * channels], gate columns first. Aligned as d. Does
  /// not change d by a bit.
  MatrixView<Bf16> h;
  /// With expert_scales, d receives what the codes hold, without the global scale. Needs
  /// activates_in_epilogue().
  Requantize requantize;

  /// workspace_bytes() bytes, aligned to kWorkspaceAlignment. Calls that may overlap need separate ones.
  std::span<std::byte> workspace;
  /// Programmatic dependent launch: the kernel may start before the previous kernel of the stream ends, and
  /// prefetches weights until that one does; everything else is read after griddepcontrol.wait (but by the
  /// second of launch_expert_gemms). A kernel that gathers its rows waits first. Others need:
  /// group_offsets and the weights are complete when the previous kernel calls
  /// griddepcontrol.launch_dependents (or ends, where it has no such call). That holds when the previous
  /// kernel did not write them and itself waits before that call (staging beside the permutation does not),
  /// or was started by one that had waited when they were complete, as the kernels launched here do: a plan's
  /// second launch, and those of launch_expert_gemms' second, read and write at once what they may, and wait
  /// at their end, so that what comes after one comes after all.
  bool overlap_previous = false;
};

/// Bytes that launch_expert_gemm needs in `workspace`, by shapes, bounds and activation alone (pointers may
/// be null): activations that the epilogue does not compute go through h in memory, where no tap holds it.
/// Never decreases as max_rows grows.
size_t workspace_bytes(const ExpertGemm& args);

/// Whether the epilogue computes this activation, and so can quantize what it gives: kSwiglu with a limit
/// that bf16 holds, or none.
bool activates_in_epilogue(const ExpertGemm& args);

/// Whether the kernel for these shapes and bounds can gather token rows by slot_of_row.
bool can_gather(const ExpertGemm& args);

/// Enqueues the GEMM. Throws Error when arguments do not fit (naming which), or CUDA refuses the launch.
void launch_expert_gemm(const ExpertGemm& args, void* stream);

/// Enqueues both GEMMs of an expert layer: `second` multiplies what `first` writes, its tokens are first's d
/// (and residual and row_scales, where it quantizes). A tile of the second needs its own expert's rows alone,
/// so that the first of them run on SMs that `first` has left. The same bits as by launch_expert_gemm.
///
/// `progress`: [E] words, zero before as tickets are. Needs activates_in_epilogue(first), and no activation
/// of `second`. What `second` writes must not be read by `first`, but row m of second's d may be where row m
/// of first's sorted tokens is: it is written when all of its expert's are read. (Boxes of tokens may run
/// over into the next expert's; those sums are not stored.) second.overlap_previous is taken for true. Throws
/// Error as launch_expert_gemm, and when `second` does not fit `first`.
void launch_expert_gemms(const ExpertGemm& first, const ExpertGemm& second, int32_t* progress, void* stream);

/// Which kernel launch_expert_gemm runs, for reports.
std::string describe_kernel(const ExpertGemm& args);

}  // namespace fourfold::sm90
