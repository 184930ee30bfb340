// Tensor maps of 4-bit elements, which Hopper refuses, as maps of the same bytes: from here on CuTe makes
// loads of e2m1 matrices with UINT8 elements, of which there are half as many along K. Include before the
// collectives of CUTLASS.
#pragma once

#include "cute/tensor.hpp"  // has to come first

#include "cute/atom/copy_traits_sm90_tma.hpp"
#include "cutlass/numeric_types.h"

namespace fourfold::emulation {

template <class Engine>
inline constexpr bool kHoldsE2m1 = cute::is_same_v<typename Engine::value_type, cutlass::float_e2m1_t>;

}  // namespace fourfold::emulation

namespace cute {

/// Loads of e2m1 matrices, as bytes: CuTe halves extents, boxes and coordinates along K.
template <class TmaInternalType = void, class CopyOp, class GEngine, class GLayout, class SLayout,
          class CTA_Tiler, class Cluster_Size>
requires(is_void_v<TmaInternalType>&& is_same_v<CopyOp, SM90_TMA_LOAD>&&
             fourfold::emulation::kHoldsE2m1<GEngine>)  //
    CUTE_HOST_RTC
    auto make_tma_copy(const CopyOp& copy_op, const Tensor<GEngine, GLayout>& gtensor, const SLayout& slayout,
                       const CTA_Tiler& cta_tiler, const Cluster_Size& cluster_size) {
  return make_tma_copy<uint8_t>(copy_op, gtensor, slayout, cta_tiler, cluster_size);
}

namespace detail {

/// The extents that the kernel writes into such a tensor map for each group. The caller turns strides of
/// elements into bytes, which they stay; the extent along K is in elements of the map.
template <class GEngine, class GLayout, class Op, class Bits, class Aux, class ShapeT, size_t TmaRank>
requires(fourfold::emulation::kHoldsE2m1<GEngine>)  //
    CUTE_HOST_DEVICE
    constexpr void fill_tma_gmem_shape_stride(const Copy_Traits<Op, Bits, Aux>&,
                                              const Tensor<GEngine, GLayout>& gtensor,
                                              cute::array<ShapeT, TmaRank>& gmem_prob_shape,
                                              cute::array<uint64_t, TmaRank>& gmem_prob_stride) {
  fill_tma_gmem_shape_stride(gtensor, stride(typename Aux::TmaGmemBasis{}), gmem_prob_shape,
                             gmem_prob_stride);
  gmem_prob_shape[0] = (gmem_prob_shape[0] + 1) / 2;
}

}  // namespace detail
}  // namespace cute
