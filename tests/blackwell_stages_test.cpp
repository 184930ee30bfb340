// The stages around the Blackwell GEMMs, on any GPU: group arrays, activations and weights in the layout that
// the tensor cores read, and what becomes of sums. All against the reference or against plain loops on the
// host.
#include "cuda_support.h"

#include "blackwell/block_weights.h"
#include "blackwell/finish_sums.h"
#include "blackwell/group_arrays.h"
#include "blackwell/group_types.cuh"
#include "cuda/stage.h"
#include "fourfold/quantize.h"
#include "fourfold/reference.h"
#include "fourfold/scale_layout.h"
#include "tools/layer_trace.h"

namespace fourfold {
namespace {

using blackwell::BlockShape;
using blackwell::GroupArrays;

const std::vector<int32_t> kOffsets[] = {
    {0, 1},
    {0, 0, 5, 5, 6, 139, 139},     // empty and one-row groups, and one of two tiles
    {0, 128, 256, 256, 257, 513},  // tiles that are full
    {0, 3, 3, 3, 3, 3, 3, 3, 3, 10, 11, 12},
};

int64_t rows_of(const std::vector<int32_t>& offsets) {
  return offsets.back();
}
int64_t experts_of(const std::vector<int32_t>& offsets) {
  return std::ssize(offsets) - 1;
}

/// Where rows and terms belong, by plain loops.
std::vector<cuda::RowPlace> places_of(const std::vector<int32_t>& offsets, int32_t terms) {
  std::vector<cuda::RowPlace> places;
  int32_t scale_row = 0;
  for (int32_t e = 0; e < experts_of(offsets); ++e) {
    const auto at = static_cast<size_t>(e);
    const int32_t rows = offsets[at + 1] - offsets[at];
    for (int32_t i = 0; i < rows; ++i) {
      cuda::RowPlace place;
      place.expert = e;
      for (int32_t term = 0; term < 2; ++term) {
        const int32_t in_group = i + (term < terms ? term : 0) * rows;
        place.stacked[term] = offsets[at] * terms + in_group;
        place.scale_row[term] = scale_row + in_group;
      }
      places.push_back(place);
    }
    scale_row += static_cast<int32_t>(round_up(rows * terms, kScaleTileRows));
  }
  return places;
}

/// Staged rows in the layout of the GEMMs.
struct Stacked {
  std::vector<uint8_t> codes, scales;
};

Stacked stack(const StagedBuffers& staged, const std::vector<int32_t>& offsets, int32_t terms,
              int64_t depth) {
  const int64_t blocks = depth / 16, row_bytes = round_up(depth, blackwell::kDepthMultiple) / 2;
  Stacked out;
  out.codes.resize(static_cast<size_t>(rows_of(offsets) * terms * row_bytes));
  std::vector<uint8_t> scales(static_cast<size_t>(rows_of(offsets) * terms * blocks));
  std::vector<int32_t> stacked_offsets = offsets;
  for (int32_t& offset : stacked_offsets) offset *= terms;
  const std::vector<cuda::RowPlace> places = places_of(offsets, terms);
  for (size_t row = 0; row < places.size(); ++row) {
    for (int32_t term = 0; term < terms; ++term) {
      const auto& codes = term == 0 ? staged.codes : staged.residual_codes;
      const auto& from = term == 0 ? staged.scales : staged.residual_scales;
      const int64_t to = places[row].stacked[term], first = static_cast<int64_t>(row);
      std::copy_n(codes.begin() + first * depth / 2, depth / 2, out.codes.begin() + to * row_bytes);
      std::copy_n(from.begin() + first * blocks, blocks, scales.begin() + to * blocks);
    }
  }
  out.scales = swizzle_scale_groups({scales.data(), rows_of(offsets) * terms, blocks}, stacked_offsets);
  return out;
}

/// Stacked rows on the device, poisoned but for the scales, whose padding is the caller's to clear.
struct DeviceStacked {
  DeviceStacked(const std::vector<int32_t>& offsets, int32_t term_count, int64_t depth)
      : codes(static_cast<size_t>(rows_of(offsets) * term_count * round_up(depth, blackwell::kDepthMultiple) /
                                  2)),
        scales(std::vector<uint8_t>(static_cast<size_t>(
            blackwell::most_scale_bytes(rows_of(offsets), term_count, experts_of(offsets), depth)))),
        places(places_of(offsets, term_count)),
        view{codes.data(), round_up(depth, blackwell::kDepthMultiple) / 2, scales.data(), depth / 16,
             places.data()} {}

  void expect(const Stacked& expected) const {
    EXPECT_EQ(codes.get(), expected.codes);
    std::vector<uint8_t> found = scales.get();
    ASSERT_GE(found.size(), expected.scales.size());
    EXPECT_TRUE(std::all_of(found.begin() + std::ssize(expected.scales), found.end(),
                            [](uint8_t b) { return b == 0; }));
    found.resize(expected.scales.size());
    EXPECT_EQ(found, expected.scales);
  }

  DeviceArray<uint8_t> codes, scales;
  DeviceArray<cuda::RowPlace> places;
  cuda::StackedRows view;
};

int32_t terms_of(ActivationFormat format) {
  return format == ActivationFormat::kNvfp4x2 ? 2 : 1;
}

template <class Check>
void for_each_case(const Check& check) {
  uint64_t salt = 0;
  for (const std::vector<int32_t>& offsets : kOffsets) {
    for (const int64_t depth : {16, 48, 64, 336, 2880}) {
      for (const ActivationFormat format : {ActivationFormat::kNvfp4, ActivationFormat::kNvfp4x2}) {
        SCOPED_TRACE(testing::Message()
                     << rows_of(offsets) << " rows, depth " << depth << ", " << to_string(format));
        check(offsets, depth, format, ++salt);
      }
    }
  }
}

StagedBuffers stage_by_reference(ActivationFormat format, const std::vector<Bf16>& x,
                                 const std::vector<int32_t>& offsets, int64_t depth) {
  const MatrixView<const Bf16> rows(x.data(), rows_of(offsets), depth);
  StagedBuffers staged(format, rows.rows, depth);
  reference::activation_scales(ScalePolicy::kDynamicToken, rows, offsets, {}, staged.views.row_scales);
  reference::stage(format, rows, staged.views);
  return staged;
}

TEST(BlackwellStages, StagingStacksWhatTheReferenceStages) {
  for_each_case(
      [](const std::vector<int32_t>& offsets, int64_t depth, ActivationFormat format, uint64_t salt) {
        Engine random = engine(salt);
        const std::vector<Bf16> x = random_rows(random, rows_of(offsets), depth, Values::kHostile);
        const StagedBuffers staged = stage_by_reference(format, x, offsets, depth);
        const DeviceArray<Bf16> device_x(x);
        const DeviceArray<int32_t> device_offsets(offsets);
        const DeviceArray<float> row_scales(x.size() / static_cast<size_t>(depth));
        const DeviceStacked out(offsets, terms_of(format), depth);
        cuda::StageArgs args;
        args.format = format;
        args.source.rows = device_x.matrix(rows_of(offsets), depth);
        args.group_offsets = device_offsets.span();
        args.max_rows = rows_of(offsets);
        args.decoded.row_scales = row_scales.data();
        args.stacked = out.view;
        cuda::stage(args, nullptr);
        out.expect(stack(staged, offsets, terms_of(format), depth));
        EXPECT_EQ(first_difference<float>(row_scales.get(), staged.row_scales), -1);
      });
}

TEST(BlackwellStages, WhatCallersStagedIsStackedWhateverItsLayout) {
  for_each_case([](const std::vector<int32_t>& offsets, int64_t depth, ActivationFormat format,
                   uint64_t salt) {
    Engine random = engine(100 + salt);
    const std::vector<Bf16> x = random_rows(random, rows_of(offsets), depth, Values::kOrdinary);
    StagedBuffers staged = stage_by_reference(format, x, offsets, depth);
    const int64_t blocks = depth / 16;
    const MatrixView<const uint8_t> first(staged.scales.data(), rows_of(offsets), blocks),
        second(staged.residual_scales.data(), rows_of(offsets), blocks);
    const Stacked expected = stack(staged, offsets, terms_of(format), depth);
    const DeviceArray<int32_t> device_offsets(offsets);
    const DeviceArray<float> row_scales(staged.row_scales), found_scales(staged.row_scales.size());
    const DeviceArray<uint8_t> codes(staged.codes), residual_codes(staged.residual_codes);
    for (const bool swizzled : {false, true}) {
      const bool two = terms_of(format) == 2;
      const DeviceArray<uint8_t> scales(swizzled ? swizzle_scale_groups(first, offsets) : staged.scales);
      const DeviceArray<uint8_t> residual_scales(swizzled && two ? swizzle_scale_groups(second, offsets)
                                                                 : staged.residual_scales);
      ActivationView a;
      a.format = format;
      a.rows = rows_of(offsets);
      a.cols = depth;
      a.codes = codes.matrix(a.rows, depth / 2);
      a.scales = scales.data();
      if (two) {
        a.residual_codes = residual_codes.matrix(a.rows, depth / 2);
        a.residual_scales = residual_scales.data();
      }
      a.scale_layout = swizzled ? ScaleLayout::kSwizzled128x4 : ScaleLayout::kRowMajor;
      a.row_scales = row_scales.span();
      const DeviceStacked out(offsets, terms_of(format), depth);
      blackwell::stack_staged(a, device_offsets.span(), 0, a.rows, out.view, found_scales.data(), nullptr);
      out.expect(expected);
      EXPECT_EQ(found_scales.get(), staged.row_scales);
    }
  });
}

/// An array of `count` entries of GroupArrays on the host.
template <class T>
std::vector<T> fetch(const void* array, int64_t count) {
  std::vector<T> entries(static_cast<size_t>(count));
  const Memory& memory = cuda::device_memory(cuda::current_device());
  memory.synchronize();
  memory.copy_to_host(entries.data(), array, entries.size() * sizeof(T));
  return entries;
}

void expect_groups(const std::vector<int32_t>& offsets, int32_t terms, const blackwell::StackedGemm& gemm,
                   const GroupArrays& arrays, const std::vector<float>& alphas) {
  const int64_t groups = arrays.groups;
  const auto shapes = fetch<blackwell::GroupShape>(arrays.shapes, groups);
  const auto a = fetch<const uint8_t*>(arrays.a, groups),
             a_scales = fetch<const uint8_t*>(arrays.a_scales, groups);
  const auto b = fetch<const uint8_t*>(arrays.b, groups),
             b_scales = fetch<const uint8_t*>(arrays.b_scales, groups);
  const auto d = fetch<const char*>(arrays.d, groups);
  const auto a_strides = fetch<blackwell::GroupStride>(arrays.a_strides, groups);
  const auto d_strides = fetch<blackwell::GroupStride>(arrays.d_strides, groups);
  const auto a_layouts = fetch<blackwell::GroupScaleLayout>(arrays.a_scale_layouts, groups);
  const auto b_layouts = fetch<blackwell::GroupScaleLayout>(arrays.b_scale_layouts, groups);
  const BlockShape matrix{gemm.n, gemm.k};
  int64_t scale_row = 0;
  for (int32_t group = 0; group < groups; ++group) {
    const auto at = static_cast<size_t>(group);
    const int32_t expert = group / gemm.halves, half = group % gemm.halves;
    const int32_t first = offsets[static_cast<size_t>(expert)] * terms;
    const int32_t rows = offsets[static_cast<size_t>(expert) + 1] * terms - first;
    EXPECT_EQ(cute::get<0>(shapes[at]), rows);
    EXPECT_EQ(cute::get<1>(shapes[at]), gemm.n);
    EXPECT_EQ(cute::get<2>(shapes[at]), gemm.k);
    EXPECT_EQ(a[at] - gemm.a_codes, first * gemm.k / 2);
    EXPECT_EQ(a_scales[at] - gemm.a_scales, scale_row * round_up(gemm.k / 16, 4));
    EXPECT_EQ(b[at] - gemm.b_codes, expert * gemm.b_expert_bytes + half * matrix.code_bytes());
    EXPECT_EQ(b_scales[at] - gemm.b_scales, expert * gemm.b_expert_bytes + half * matrix.scale_bytes());
    EXPECT_EQ(d[at] - static_cast<char*>(gemm.d),
              first * gemm.d_row_bytes + half * gemm.n * gemm.d_element_bytes);
    EXPECT_EQ(cute::get<0>(a_strides[at]), gemm.k);
    EXPECT_EQ(cute::get<0>(d_strides[at]) * gemm.d_element_bytes, gemm.d_row_bytes);
    for (int32_t row = 0; row < rows; row += 37) {
      EXPECT_EQ(a_layouts[at](row, gemm.k - 1, 0), swizzled_scale_offset(row, gemm.k / 16 - 1, gemm.k / 16));
    }
    EXPECT_EQ(b_layouts[at](gemm.n - 1, gemm.k - 1, 0),
              swizzled_scale_offset(gemm.n - 1, gemm.k / 16 - 1, gemm.k / 16));
    if (half == gemm.halves - 1) scale_row += round_up(rows, kScaleTileRows);
  }
  if (gemm.scales == nullptr) return;
  EXPECT_EQ(fetch<float>(arrays.alpha_values, groups), alphas);
  const auto addresses = fetch<const float*>(arrays.alphas, groups);
  for (int64_t group = 0; group < groups; ++group) {
    EXPECT_EQ(addresses[static_cast<size_t>(group)], static_cast<const float*>(arrays.alpha_values) + group);
  }
}

TEST(BlackwellStages, GroupArraysNameEveryGroupsOperands) {
  for (const std::vector<int32_t>& offsets : kOffsets) {
    for (const int32_t terms : {1, 2}) {
      SCOPED_TRACE(testing::Message() << rows_of(offsets) << " rows, " << terms << " terms");
      const int64_t experts = experts_of(offsets);
      Engine random = engine(200);
      std::vector<float> scales, globals, alphas;
      for (int64_t e = 0; e < experts; ++e) {
        scales.push_back(static_cast<float>(below(random, 1000)) / 777.0f);
        for (int half = 0; half < 2; ++half) {
          globals.push_back(static_cast<float>(below(random, 1000)) / 333.0f);
          alphas.push_back(scales.back() * globals.back());
        }
      }
      const DeviceArray<int32_t> device_offsets(offsets);
      const DeviceArray<float> device_scales(scales), device_globals(globals);
      const DeviceArray<uint8_t> operands(1);  // addresses are reckoned from here, nothing is read
      const DeviceArray<cuda::RowPlace> places(static_cast<size_t>(rows_of(offsets)));
      blackwell::BuildGroups args;
      args.group_offsets = device_offsets.span();
      args.max_rows = rows_of(offsets);
      args.terms = terms;
      const uint8_t* base = operands.data();
      args.gemms[0] = {2,
                       176,
                       64,
                       base,
                       base + 16,
                       base + 32,
                       base + 48,
                       99328,
                       operands.data(),
                       704,
                       2,
                       device_scales.data(),
                       device_globals.data()};
      args.gemms[1] = {1,   64, 192,     base,   base + 16, base + 32, base + 48, 16384, operands.data(),
                       256, 4,  nullptr, nullptr};
      std::vector<DeviceArray<std::byte>> memory;
      for (int which = 0; which < 2; ++which) {
        const int64_t groups = experts * args.gemms[which].halves;
        const auto& bytes = memory.emplace_back(blackwell::group_arrays_bytes(groups));
        args.arrays[which] = blackwell::carve_group_arrays(bytes.span(), groups);
      }
      args.places = places.data();
      blackwell::build_groups(args, nullptr);
      for (int which = 0; which < 2; ++which)
        expect_groups(offsets, terms, args.gemms[which], args.arrays[which], alphas);
      const std::vector<cuda::RowPlace> found = places.get(), expected = places_of(offsets, terms);
      for (size_t row = 0; row < expected.size(); ++row) {
        EXPECT_EQ(found[row].expert, expected[row].expert);
        for (int term = 0; term < 2; ++term) {
          EXPECT_EQ(found[row].stacked[term], expected[row].stacked[term]);
          EXPECT_EQ(found[row].scale_row[term], expected[row].scale_row[term]);
        }
      }
    }
  }
}

TEST(BlackwellStages, WeightsKeepEveryCodeAndScale) {
  for (const auto& [rows, depth] :
       {std::pair<int64_t, int64_t>{1, 16}, {130, 48}, {128, 64}, {257, 2880}, {40, 80}}) {
    Engine random = engine(300 + static_cast<uint64_t>(rows));
    const int64_t blocks = depth / 16;
    std::vector<uint8_t> codes(static_cast<size_t>(rows * depth / 2)),
        scales(static_cast<size_t>(rows * blocks));
    for (uint8_t& byte : codes) byte = static_cast<uint8_t>(random());
    for (uint8_t& byte : scales) byte = static_cast<uint8_t>(random());  // negative ones and NaN among them
    const BlockShape shape{rows, depth};
    std::vector<uint8_t> expected_codes(static_cast<size_t>(shape.code_bytes()));
    std::vector<uint8_t> padded_scales(static_cast<size_t>(shape.padded_rows() * shape.padded_depth() / 16));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t block = 0; block < blocks; ++block) {
        const uint8_t scale = scales[static_cast<size_t>(row * blocks + block)];
        padded_scales[static_cast<size_t>(row * shape.padded_depth() / 16 + block)] = scale & 0x7F;
        for (int64_t byte = 0; byte < 8; ++byte) {
          const uint8_t pair = codes[static_cast<size_t>(row * depth / 2 + block * 8 + byte)];
          expected_codes[static_cast<size_t>(row * shape.padded_depth() / 2 + block * 8 + byte)] =
              scale & 0x80 ? pair ^ 0x88 : pair;
        }
      }
    }
    const MatrixView<const uint8_t> stored(scales.data(), rows, blocks);
    const DeviceArray<uint8_t> device_codes(codes), row_major(scales), swizzled(swizzle_scales(stored));
    for (const bool is_swizzled : {false, true}) {
      BlockScaledView view;
      view.rows = rows;
      view.cols = depth;
      view.codes = device_codes.matrix(rows, depth / 2);
      view.scales = is_swizzled ? swizzled.data() : row_major.data();
      view.scale_stride = blocks;
      view.scale_layout = is_swizzled ? ScaleLayout::kSwizzled128x4 : ScaleLayout::kRowMajor;
      const DeviceArray<uint8_t> out_codes(expected_codes.size()),
          out_scales(static_cast<size_t>(shape.scale_bytes()));
      blackwell::launch_block_weights(view, shape, out_codes.data(), out_scales.data(), nullptr);
      EXPECT_EQ(out_codes.get(), expected_codes);
      EXPECT_EQ(out_scales.get(),
                swizzle_scales({padded_scales.data(), shape.padded_rows(), shape.padded_depth() / 16}));
    }
  }
}

/// Sums as a GEMM leaves them, and what has to become of them.
struct Sums {
  Sums(const std::vector<int32_t>& offsets, int32_t term_count, int32_t half_count, int64_t columns,
       uint64_t salt)
      : terms(term_count), halves(half_count), places(places_of(offsets, term_count)) {
    Engine random = engine(salt);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& to, int64_t count) {
      for (int64_t i = 0; i < count; ++i) to.push_back(normal(random));
    };
    fill(values, rows_of(offsets) * terms * halves * columns);
    fill(row_scales, rows_of(offsets));
    fill(globals, experts_of(offsets) * halves);
    fill(bias, experts_of(offsets) * halves * columns);
    for (size_t row = 0; row < places.size(); ++row) {
      const cuda::RowPlace& place = places[row];
      for (int64_t half = 0; half < halves; ++half) {
        const auto group = static_cast<size_t>(place.expert * halves + half);
        const float alpha = row_scales[row] * globals[group];
        for (int64_t column = 0; column < columns; ++column) {
          const auto sum_of = [&](int term) {
            return values[static_cast<size_t>((place.stacked[term] * halves + half) * columns + column)];
          };
          const float sum = terms == 2 ? sum_of(0) + sum_of(1) : sum_of(0);
          finished.push_back(alpha * sum +
                             bias[group * static_cast<size_t>(columns) + static_cast<size_t>(column)]);
        }
      }
    }
  }

  int32_t terms, halves;
  std::vector<cuda::RowPlace> places;
  std::vector<float> values, row_scales, globals, bias, finished;
};

/// Sums on the device. `bias` as well.
struct DeviceSums {
  DeviceSums(const Sums& sums, int64_t columns)
      : values(sums.values),
        row_scales(sums.row_scales),
        globals(sums.globals),
        bias(sums.bias),
        places(sums.places),
        view{values.data(), sums.halves * columns, true,           sums.terms, sums.halves, columns,
             places.data(), row_scales.data(),     globals.data(), bias.data()} {}

  DeviceArray<float> values, row_scales, globals, bias;
  DeviceArray<cuda::RowPlace> places;
  blackwell::GemmResult view;
};

TEST(BlackwellStages, SumsAreFinishedAtTheSpecifiedRoundings) {
  for (const std::vector<int32_t>& offsets : kOffsets) {
    for (const int32_t terms : {1, 2}) {
      constexpr int64_t kColumns = 88;
      const Sums sums(offsets, terms, 1, kColumns, 400);
      const DeviceSums device(sums, kColumns);
      const DeviceArray<int32_t> device_offsets(offsets);
      const int32_t* rows = device_offsets.data() + experts_of(offsets);
      const DeviceArray<float> wide(sums.finished.size());
      const DeviceArray<Bf16> narrow(sums.finished.size());
      blackwell::finish_rows(device.view, rows, rows_of(offsets), wide.matrix(rows_of(offsets), kColumns),
                             nullptr);
      blackwell::finish_rows(device.view, rows, rows_of(offsets), narrow.matrix(rows_of(offsets), kColumns),
                             nullptr);
      std::vector<Bf16> rounded;
      for (const float value : sums.finished) rounded.push_back(encode_bf16(value));
      EXPECT_EQ(wide.get(), sums.finished);
      EXPECT_EQ(narrow.get(), rounded);
    }
  }
}

/// Whether two bf16 are the same or neighbours; the activation is float32 here and float64 in the reference.
/// Where float32's exponential is infinite, from exp(88.7) on, the first is zero and the second almost.
bool are_neighbours(Bf16 a, Bf16 b) {
  const auto ordered = [](Bf16 v) { return v.bits & 0x8000 ? 0x8000 - v.bits : int{v.bits}; };
  return std::abs(ordered(a) - ordered(b)) <= 1 ||
         std::fabs(static_cast<float>(a) - static_cast<float>(b)) < 1e-36f;
}

void check_activation(const std::vector<int32_t>& offsets, ActivationFormat format, ScalePolicy policy,
                      const ActivationFunction& function, uint64_t salt) {
  constexpr int64_t kColumns = 176;
  const int64_t rows = rows_of(offsets);
  const int32_t terms = terms_of(format);
  const Sums sums(offsets, terms, is_gated(function.kind) ? 2 : 1, kColumns, salt);
  std::vector<Bf16> h, expected(static_cast<size_t>(rows * kColumns));
  for (const float value : sums.finished) h.push_back(encode_bf16(value));
  reference::activate(function, {h.data(), rows, sums.halves * kColumns}, {expected.data(), rows, kColumns});

  std::vector<float> expert_scales;
  for (int64_t e = 0; e < experts_of(offsets); ++e)
    expert_scales.push_back(0.001f * static_cast<float>(e + 1));
  const DeviceSums device(sums, kColumns);
  const DeviceArray<int32_t> device_offsets(offsets);
  const DeviceArray<float> scales(expert_scales), amax(std::vector<float>{0.0f}),
      row_scales(static_cast<size_t>(rows));
  const DeviceArray<Bf16> h_tap(h.size()), activation_tap(expected.size());
  const DeviceStacked out(offsets, terms, kColumns);
  blackwell::ActivateRows args;
  args.function = function;
  args.h = device.view;
  args.rows = device_offsets.data() + experts_of(offsets);
  args.max_rows = rows;
  args.format = format;
  args.policy = policy;
  args.expert_scales = scales.data();
  args.tensor_amax = amax.data();
  args.stacked = out.view;
  args.row_scales = row_scales.data();
  args.h_tap = h_tap.matrix(rows, sums.halves * kColumns);
  args.activation_tap = activation_tap.matrix(rows, kColumns);
  if (policy == ScalePolicy::kDynamicTensor) blackwell::find_activation_amax(args, nullptr);
  blackwell::activate_rows(args, nullptr);

  EXPECT_EQ(h_tap.get(), h);
  const std::vector<Bf16> found = activation_tap.get();
  EXPECT_TRUE(std::equal(found.begin(), found.end(), expected.begin(), are_neighbours));
  // Quantized from what the kernel itself activated: one flipped bit there would move codes here.
  StagedBuffers staged(format, rows, kColumns);
  reference::activation_scales(policy, {found.data(), rows, kColumns}, offsets, expert_scales,
                               staged.views.row_scales);
  reference::stage(format, {found.data(), rows, kColumns}, staged.views);
  EXPECT_EQ(row_scales.get(), staged.row_scales);
  out.expect(stack(staged, offsets, terms, kColumns));
}

TEST(BlackwellStages, ActivationIsQuantizedIntoTheSecondGemmsLayout) {
  uint64_t salt = 500;
  for (const std::vector<int32_t>& offsets : kOffsets) {
    for (const ActivationFormat format : {ActivationFormat::kNvfp4, ActivationFormat::kNvfp4x2}) {
      for (const ScalePolicy policy :
           {ScalePolicy::kStatic, ScalePolicy::kDynamicTensor, ScalePolicy::kDynamicToken}) {
        SCOPED_TRACE(testing::Message()
                     << rows_of(offsets) << " rows, " << to_string(format) << ", " << to_string(policy));
        check_activation(offsets, format, policy, {}, ++salt);
      }
    }
  }
}

TEST(BlackwellStages, ActivationHasEveryVariant) {
  uint64_t salt = 600;
  for (const ActivationFunction& function : {ActivationFunction{ActivationKind::kSwiglu, 1.702f, 1.0f, 3.0f},
                                             {ActivationKind::kSwigluStep, 1.0f, 0.0f, 1.5f},
                                             {ActivationKind::kGeglu},
                                             {ActivationKind::kGegluTanh},
                                             {ActivationKind::kReluSquared},
                                             {ActivationKind::kSilu},
                                             {ActivationKind::kGelu}}) {
    SCOPED_TRACE(describe(function));
    check_activation(kOffsets[1], ActivationFormat::kNvfp4, ScalePolicy::kStatic, function, ++salt);
  }
}

}  // namespace
}  // namespace fourfold
