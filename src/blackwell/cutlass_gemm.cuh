// One grouped NVFP4 GEMM out of CUTLASS's block-scaled collectives.
// shapes:   a[g] [M_g, K], b[g] [N, K] e2m1 codes, rows contiguous; scales e4m3 in the 128x4 layout;
//           d[g] [M_g, N] bf16 or float32
// needs:    K % 32 == 0, N % 8 == 0, 16-byte pointers; groups may be empty or ragged
// numerics: float32 accumulation in the tensor cores' order and internal precision; alpha in the epilogue
// oracle:   src/reference/grouped_multiply.cpp   test: tests/blackwell_emulated_test.cpp; docs/blackwell.md
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "blackwell/group_types.cuh"
#include "blackwell/grouped_gemm.h"
#include "cuda/check.cuh"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

namespace fourfold::blackwell {

/// What differs between architectures. `Element`: how their builders want NVFP4 to be called.
struct Sm100 {
  using Arch = cutlass::arch::Sm100;
  using Element = cutlass::nv_float4_t<cutlass::float_e2m1_t>;
  using Tile = cute::Shape<cute::_128, cute::_128, cute::_256>;
  using Mainloop = cutlass::gemm::KernelPtrArrayTmaWarpSpecialized1SmNvf4Sm100;
  using Epilogue = cutlass::epilogue::PtrArrayTmaWarpSpecialized1Sm;
};

struct Sm103 {
  using Arch = cutlass::arch::Sm103;
  using Element = cute::tuple<cutlass::float_e2m1_t, cutlass::float_ue4m3_t>;
  using Tile = cute::Shape<cute::_128, cute::_128, cute::Int<768>>;
  using Mainloop = cutlass::gemm::KernelPtrArrayTmaWarpSpecialized1SmBlockScaledMxNvf4UltraVs16Sm103;
  using Epilogue = cutlass::epilogue::PtrArrayNoSmemWarpSpecialized1Sm;
};

struct Sm120 {
  using Arch = cutlass::arch::Sm120;
  using Element = cutlass::nv_float4_t<cutlass::float_e2m1_t>;
  using Tile = cute::Shape<cute::_128, cute::_128, cute::_128>;
  using Mainloop = cutlass::gemm::collective::KernelScheduleAuto;
  using Epilogue = cutlass::epilogue::collective::EpilogueScheduleAuto;
};

/// A type of its own for each target: else kernels of two targets with the same collectives were one symbol,
/// and the runtime would know one of them alone.
template <class Target>
struct GroupProblem : cutlass::gemm::GroupProblemShape<GroupShape> {};

template <class Target, class Output>
struct CutlassGemm {
  static constexpr int kOperandAlignment = static_cast<int>(kDepthMultiple);
  static constexpr int kOutputAlignment = 16 / static_cast<int>(sizeof(Output));
  using Operation = cutlass::arch::OpClassBlockScaledTensorOp;
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
  using RowMajor = cutlass::layout::RowMajor;
  using ColumnMajor = cutlass::layout::ColumnMajor;
  using Tile = typename Target::Tile;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      typename Target::Arch, Operation, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float,
      float, void, RowMajor*, kOutputAlignment, Output, RowMajor*, kOutputAlignment,
      typename Target::Epilogue>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      typename Target::Arch, Operation, typename Target::Element, RowMajor*, kOperandAlignment,
      typename Target::Element, ColumnMajor*, kOperandAlignment, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
      typename Target::Mainloop>::CollectiveOp;
  using Universal = cutlass::gemm::kernel::GemmUniversal<GroupProblem<Target>, Mainloop, Epilogue>;
  /// Classes, not aliases: they name the kernel's symbol. By the collectives' types the symbol would have two
  /// names, since what nvcc's front end takes for Int<16> within those of sm_120 is Int<16u> to g++ 12: the
  /// host would ask the runtime for a kernel that was registered under the other one.
  struct Kernel : Universal {
    struct Params : Universal::Params {};
    static Params to_underlying_arguments(const typename Universal::Arguments& args, void* workspace) {
      return {Universal::to_underlying_arguments(args, workspace)};
    }
  };
  using Adapter = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using Arguments = typename Adapter::Arguments;

  // What src/blackwell/group_arrays.cu writes is what the kernel reads.
  static_assert(cute::is_same_v<typename Kernel::InternalStrideA, GroupStride>);
  static_assert(cute::is_same_v<typename Kernel::InternalStrideB, GroupStride>);
  static_assert(cute::is_same_v<typename Kernel::InternalStrideD, GroupStride>);
  static_assert(kIsGroupScaleLayout<typename Mainloop::InternalLayoutSFA>);
  static_assert(kIsGroupScaleLayout<typename Mainloop::InternalLayoutSFB>);

  static Arguments arguments(const GroupArrays& groups, int multiprocessors) {
    Arguments args{};
    args.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    args.problem_shape = {groups.groups, static_cast<GroupShape*>(groups.shapes), nullptr};
    const auto set = [](auto& member, void* array) {
      member = static_cast<cute::remove_cvref_t<decltype(member)>>(array);
    };
    set(args.mainloop.ptr_A, groups.a);
    set(args.mainloop.dA, groups.a_strides);
    set(args.mainloop.ptr_SFA, groups.a_scales);
    set(args.mainloop.layout_SFA, groups.a_scale_layouts);
    set(args.mainloop.ptr_B, groups.b);
    set(args.mainloop.dB, groups.b_strides);
    set(args.mainloop.ptr_SFB, groups.b_scales);
    set(args.mainloop.layout_SFB, groups.b_scale_layouts);
    set(args.epilogue.ptr_D, groups.d);
    set(args.epilogue.dD, groups.d_strides);
    args.epilogue.thread.beta = 0.0f;
    if constexpr (cute::is_same_v<Output, float>) {
      args.epilogue.thread.alpha = 1.0f;
    } else {
      set(args.epilogue.thread.alpha_ptr_array, groups.alphas);
      args.epilogue.thread.dAlpha = {cute::_0{}, cute::_0{}, 1};
    }
    // Shapes can be checked without a GPU.
    if (cudaGetDevice(&args.hw_info.device_id) != cudaSuccess) cudaGetLastError();
    args.hw_info.sm_count = multiprocessors;
    return args;
  }

  static void require(cutlass::Status status, const char* step) {
    if (status == cutlass::Status::kSuccess) return;
    cuda::check(cudaGetLastError(), step);
    throw Error(ErrorCode::kDevice,
                std::string(step) + ": CUTLASS refused: " + cutlassGetStatusString(status));
  }

  static bool can_multiply(int64_t m, int64_t n, int64_t k) {
    GroupShape shape{static_cast<int32_t>(m), static_cast<int32_t>(n), static_cast<int32_t>(k)};
    GroupArrays one;
    one.groups = 1;
    one.shapes = &shape;
    Arguments args = arguments(one, 1);
    args.problem_shape.host_problem_shapes = &shape;
    return Adapter::can_implement(args) == cutlass::Status::kSuccess;
  }

  static size_t workspace_bytes(int32_t groups, int multiprocessors) {
    GroupArrays arrays;
    arrays.groups = groups;
    return Adapter::get_workspace_size(arguments(arrays, multiprocessors));
  }

  static void launch(const GroupArrays& groups, int multiprocessors, std::span<std::byte> workspace,
                     void* stream) {
    const Arguments args = arguments(groups, multiprocessors);
    Adapter gemm;
    require(gemm.initialize(args, workspace.data(), cuda::as_stream(stream)), "blackwell: initialize GEMM");
    require(gemm.run(cuda::as_stream(stream)), "blackwell: launch GEMM");
  }

  static GemmKernel describe() {
    return {cute::size<0>(Tile{}),
            cute::size<1>(Tile{}),
            cute::size<2>(Tile{}),
            Mainloop::DispatchPolicy::Stages,
            static_cast<int>(Kernel::MaxThreadsPerBlock),
            static_cast<int>(Kernel::SharedStorageSize),
            can_multiply,
            workspace_bytes,
            launch};
  }
};

template <class Target>
OutputKernels describe_kernels() {
  return {CutlassGemm<Target, cutlass::bfloat16_t>::describe(), CutlassGemm<Target, float>::describe()};
}

}  // namespace fourfold::blackwell
