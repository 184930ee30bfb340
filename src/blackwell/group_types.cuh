// The types of the arrays in which CUTLASS's grouped kernels look up their groups.
#pragma once

#include <cstdint>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/detail/sm100_blockscaled_layout.hpp"
#include "cutlass/detail/sm103_blockscaled_layout.hpp"
#include "cutlass/gemm/group_array_problem_shape.hpp"
#include "cutlass/numeric_types.h"

namespace fourfold::blackwell {

inline constexpr int kScaleBlock = 16;

using GroupShape = cute::Shape<int32_t, int32_t, int32_t>;                 // M, N, K
using GroupStride = cute::Stride<int64_t, cute::Int<1>, cute::Int<0>>;     // of a, b and d: rows, contiguous
using ScaleConfig = cutlass::detail::Sm1xxBlockScaledConfig<kScaleBlock>;  // the 128x4 layout
using GroupScaleLayout = decltype(ScaleConfig::deduce_layoutSFA());

/// sm_103 has a type of its own for the same function and the same members: its rows count 8 x 4 x 4, not 32
/// x 4. tests/blackwell_layout_test.cpp holds the bytes of one against those of the other.
using Sm103ScaleLayout = decltype(cutlass::detail::Sm103BlockScaledConfig<kScaleBlock>::deduce_layoutSFA());
static_assert(sizeof(Sm103ScaleLayout) == sizeof(GroupScaleLayout));

template <class Layout>
inline constexpr bool kIsGroupScaleLayout =
    cute::is_same_v<Layout, GroupScaleLayout> || cute::is_same_v<Layout, Sm103ScaleLayout>;

}  // namespace fourfold::blackwell
