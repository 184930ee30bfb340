// The types as which CUTLASS's grouped kernels read the arrays of their groups, held against those as which
// they are written (src/blackwell/group_entries.h).
#pragma once

#include <bit>
#include <cstdint>

#include "blackwell/group_entries.h"
#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/detail/sm100_blockscaled_layout.hpp"
#include "cutlass/detail/sm103_blockscaled_layout.hpp"
#include "cutlass/gemm/group_array_problem_shape.hpp"
#include "cutlass/numeric_types.h"

namespace fourfold::blackwell {

using GroupShape = cute::Shape<int32_t, int32_t, int32_t>;                 // M, N, K
using GroupStride = cute::Stride<int64_t, cute::Int<1>, cute::Int<0>>;     // of a, b and d: rows, contiguous
using ScaleConfig = cutlass::detail::Sm1xxBlockScaledConfig<kScaleBlock>;  // the 128x4 layout
using GroupScaleLayout = decltype(ScaleConfig::deduce_layoutSFA());

/// sm_103 has a type of its own for the same function and the same members: its rows count 8 x 4 x 4, not 32
/// x 4.
using Sm103ScaleConfig = cutlass::detail::Sm103BlockScaledConfig<kScaleBlock>;
using Sm103ScaleLayout = decltype(Sm103ScaleConfig::deduce_layoutSFA());

template <class Layout>
inline constexpr bool kIsGroupScaleLayout =
    cute::is_same_v<Layout, GroupScaleLayout> || cute::is_same_v<Layout, Sm103ScaleLayout>;

/// Whether CuTe's value and ours are the same bytes at the same alignment.
template <class Entry, class Value>
constexpr bool is_entry(const Value& value, const Entry& entry) {
  return alignof(Value) == alignof(Entry) && std::bit_cast<Entry>(value) == entry;
}
static_assert(is_entry(GroupShape{3, 5, 7}, ShapeEntry{3, 5, 7}));
static_assert(is_entry(GroupStride{1 << 20, {}, {}}, StrideEntry{1 << 20}));
// A pair of shapes; tests/blackwell_layout_test.cpp has those of every kind.
static_assert(is_entry(ScaleConfig::tile_atom_to_shape_SFA(cute::make_shape(300, 136, 1056, 1)),
                       scale_layout_of(300, 1056)));
static_assert(is_entry(Sm103ScaleConfig::tile_atom_to_shape_SFB(cute::make_shape(300, 136, 1056, 1)),
                       scale_layout_of(136, 1056)));

}  // namespace fourfold::blackwell
