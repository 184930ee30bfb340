// The sm_120 kernels, made to run on Hopper.
#include "blackwell_emulation.cuh"  // has to come before CUTLASS

#include "blackwell/cutlass_gemm.cuh"

namespace fourfold::blackwell {

struct EmulatedSm120 : Sm120 {};

namespace {

using Mainloop = CutlassGemm<EmulatedSm120, float>::Mainloop;

/// The load of A that the kernel would have without the emulation.
using PlainLoad = decltype(cute::make_tma_copy<cutlass::float_e2m1_t>(
    Mainloop::GmemTiledCopyA{},
    cute::make_tensor(cute::recast_ptr<cutlass::float_e2m1_t>(nullptr),
                      cute::repeat_like(Mainloop::InternalStrideA{}, int32_t(0)),
                      Mainloop::InternalStrideA{}),
    Mainloop::SmemLayoutA{}(cute::_, cute::_, cute::Int<0>{}),
    cute::make_shape(cute::shape<0>(Mainloop::TileShape{}), cute::shape<2>(Mainloop::TileShape{})),
    cute::_1{}));
static_assert(!cute::is_same_v<Mainloop::Params::TMA_A, PlainLoad>,
              "CUTLASS was included before the emulation");

}  // namespace

OutputKernels emulated_sm_120() {
  return describe_kernels<EmulatedSm120>();
}

}  // namespace fourfold::blackwell
