#include "tools/gemmtest.h"

#include <algorithm>
#include <cmath>

#include "base/fail.h"
#include "base/files.h"
#include "fourfold/quantize.h"
#include "fourfold/reference.h"
#include "fourfold/scale_layout.h"
#include "tools/layer_trace.h"
#include "tools/mirror.h"
#include "tools/random.h"

namespace fourfold {
namespace {

// Against the emulation only the order of float32 sums differs before rounding to bf16: one bf16 ulp an
// element at most, 2.8e-3 in the mean.
constexpr double kEmulationLimit = 3e-3;
// Against the unquantized product the errors of both operands add up like independent noise; a fifth for
// luck.
constexpr double kQuantizationSlack = 1.2;

/// Random bf16 values as float32 [rows, cols].
std::vector<float> random_bf16(int64_t rows, int64_t cols, uint64_t seed, uint64_t stream) {
  std::vector<float> values(static_cast<size_t>(rows * cols));
  for (int64_t row = 0; row < rows; ++row) {
    Random random(seed, Random::Purpose::kOperand, (stream << 40) + static_cast<uint64_t>(row));
    for (int64_t col = 0; col < cols; ++col) {
      values[static_cast<size_t>(row * cols + col)] =
          static_cast<float>(encode_bf16(static_cast<float>(random.normal())));
    }
  }
  return values;
}

/// Ragged groups, among them an empty one and one of a single row where there is room.
std::vector<int32_t> ragged_offsets(int64_t groups, int64_t rows, uint64_t seed) {
  Random random(seed, Random::Purpose::kGroups, 0);
  std::vector<int32_t> offsets = {0, static_cast<int32_t>(rows)};
  for (int64_t cut = 1; cut < groups; ++cut) {
    const int64_t at = cut == 1 ? std::min<int64_t>(1, rows) : cut == 2 ? offsets[1] : random.below(rows + 1);
    offsets.insert(std::upper_bound(offsets.begin() + 1, offsets.end() - 1, static_cast<int32_t>(at)),
                   static_cast<int32_t>(at));
  }
  return offsets;
}

/// Writes NaN wherever the layout has padding: `swizzle` is applied to ones to find out where that is.
template <class Swizzle>
std::vector<uint8_t> swizzle_and_poison(MatrixView<const uint8_t> scales, Swizzle swizzle) {
  const std::vector<uint8_t> ones(static_cast<size_t>(scales.rows * scales.cols), 1);
  std::vector<uint8_t> swizzled = swizzle(scales);
  const std::vector<uint8_t> used = swizzle(MatrixView<const uint8_t>(ones.data(), scales.rows, scales.cols));
  for (size_t i = 0; i < swizzled.size(); ++i) {
    if (used[i] == 0) swizzled[i] = kE4m3NanCode;
  }
  return swizzled;
}

std::vector<float> widen(const std::vector<Bf16>& values) {
  std::vector<float> widened(values.size());
  std::transform(values.begin(), values.end(), widened.begin(),
                 [](Bf16 value) { return static_cast<float>(value); });
  return widened;
}

double relative_l2(const std::vector<float>& reference, const std::vector<float>& candidate) {
  ErrorSums sums;
  for (size_t i = 0; i < reference.size(); ++i) sums.add(reference[i], candidate[i]);
  return sums.relative_l2();
}

class Gemmtest {
 public:
  explicit Gemmtest(const GemmtestRequest& request) : request_(request) {}

  GemmtestReport run() {
    if (request_.depth % 16 != 0) reject("gemmtest: K", "a multiple of 16", request_.depth);
    const int64_t stacked = request_.groups * request_.columns;
    require_memory(
        4 * (2 * (request_.rows + stacked) * request_.depth + 8 * request_.rows * request_.columns),
        "gemmtest: operands and results");
    make_operands();
    run_operation("dense", {0, static_cast<int32_t>(request_.rows)});
    run_operation("grouped", report_.group_offsets);
    return std::move(report_);
  }

 private:
  void make_operands() {
    const int64_t rows = request_.rows, stacked = request_.groups * request_.columns, depth = request_.depth;
    report_.group_offsets = ragged_offsets(request_.groups, rows, request_.seed);
    a_values_ = random_bf16(rows, depth, request_.seed, 2);
    b_values_ = random_bf16(stacked, depth, request_.seed, 3);
    const MatrixView<const float> a(a_values_.data(), rows, depth), b(b_values_.data(), stacked, depth);
    a_ = quantize_nvfp4(a, nvfp4_global_scale(absolute_maximum(a)), ScaleFloor::kNone);
    b_ = quantize_nvfp4(b, nvfp4_global_scale(absolute_maximum(b)));
    report_.quantization_error_a = relative_l2(a_values_, dequantize(a_.view()));
    report_.quantization_error_b = relative_l2(b_values_, dequantize(b_.view()));
  }

  /// One operation with both layouts against both oracles. The dense one takes all rows and the first weight.
  void run_operation(const std::string& operation, const std::vector<int32_t>& offsets) {
    const std::vector<float> emulation = emulate(offsets), matmul = multiply_unquantized(offsets);
    const std::vector<float> row_major = run_backend(operation, offsets, ScaleLayout::kRowMajor);
    const std::vector<float> swizzled = run_backend(operation, offsets, ScaleLayout::kSwizzled128x4);
    const double noise = std::hypot(report_.quantization_error_a, report_.quantization_error_b);
    for (const auto& [scales, d] : {std::pair("row-major", &row_major), std::pair("swizzled", &swizzled)}) {
      add_row(operation, scales, "emulation", emulation, *d, kEmulationLimit);
      add_row(operation, scales, "bf16 matmul", matmul, *d, kQuantizationSlack * noise + kEmulationLimit);
    }
    for (size_t i = 0; i < row_major.size(); ++i) {
      report_.different_elements += float_bits(row_major[i]) != float_bits(swizzled[i]);
    }
    report_.elements += static_cast<int64_t>(row_major.size());
  }

  void add_row(const std::string& operation, const std::string& scales, const std::string& against,
               const std::vector<float>& expected, const std::vector<float>& found, double limit) {
    const MatrixView<const float> a(expected.data(), request_.rows, request_.columns);
    const MatrixView<const float> b(found.data(), request_.rows, request_.columns);
    report_.rows.push_back({operation, scales, against, compare(a, b), limit});
  }

  ActivationView quantized_a(const uint8_t* scales, ScaleLayout layout) const {
    ActivationView a;
    a.format = ActivationFormat::kNvfp4;
    a.rows = request_.rows;
    a.cols = request_.depth;
    a.codes = {a_.codes.data(), a.rows, a.cols / 2};
    a.scales = scales;
    a.scale_layout = layout;
    return a;
  }

  std::vector<WeightView> quantized_b(const uint8_t* codes, const uint8_t* scales, ScaleLayout layout,
                                      int64_t groups) const {
    // The global scale of a is folded into b's: gemm's a may have one a group, and dense has no groups.
    const std::vector<float> globals(static_cast<size_t>(groups), a_.global.value * b_.global.value);
    return stacked_nvfp4_weights(codes, scales, layout, globals, request_.columns, request_.depth);
  }

  /// float64 sums, rounded to bf16 like a backend's.
  std::vector<float> emulate(const std::vector<int32_t>& offsets) const {
    std::vector<Bf16> d(static_cast<size_t>(request_.rows * request_.columns));
    const auto b = quantized_b(b_.codes.data(), b_.scales.data(), ScaleLayout::kRowMajor,
                               static_cast<int64_t>(offsets.size()) - 1);
    reference::grouped_gemm({quantized_a(a_.scales.data(), ScaleLayout::kRowMajor), b, offsets,
                             MatrixView<Bf16>(d.data(), request_.rows, request_.columns),
                             Accumulation::kFloat64});
    return widen(d);
  }

  std::vector<float> multiply_unquantized(const std::vector<int32_t>& offsets) const {
    std::vector<Bf16> rows(a_values_.size());
    std::transform(a_values_.begin(), a_values_.end(), rows.begin(), encode_bf16);
    ActivationView a;
    a.rows = request_.rows;
    a.cols = request_.depth;
    a.values = {rows.data(), a.rows, a.cols};
    std::vector<WeightView> b;
    const int64_t row_bytes = request_.depth * static_cast<int64_t>(sizeof(float));
    for (size_t e = 0; e + 1 < offsets.size(); ++e) {
      b.emplace_back(DenseView{ElementType::kF32,
                               reinterpret_cast<const std::byte*>(b_values_.data()) +
                                   static_cast<int64_t>(e) * request_.columns * row_bytes,
                               request_.columns,
                               request_.depth,
                               row_bytes,
                               {}});
    }
    std::vector<float> d(static_cast<size_t>(request_.rows * request_.columns));
    reference::grouped_gemm({a, b, offsets, MatrixView<float>(d.data(), request_.rows, request_.columns),
                             Accumulation::kFloat64});
    return d;
  }

  std::vector<float> run_backend(const std::string& operation, const std::vector<int32_t>& offsets,
                                 ScaleLayout layout) const {
    const auto groups = static_cast<int64_t>(offsets.size()) - 1;
    const int64_t k_sf = request_.depth / 16;
    std::vector<uint8_t> a_scales = a_.scales;
    std::vector<uint8_t> b_scales(b_.scales.begin(), b_.scales.begin() + groups * request_.columns * k_sf);
    if (layout == ScaleLayout::kSwizzled128x4) {
      a_scales = swizzle_and_poison({a_.scales.data(), request_.rows, k_sf},
                                    [&](auto scales) { return swizzle_scale_groups(scales, offsets); });
      b_scales = swizzle_and_poison({b_.scales.data(), groups * request_.columns, k_sf},
                                    [&](auto scales) { return swizzle_expert_scales(scales, groups); });
    }
    std::vector<Bf16> d(static_cast<size_t>(request_.rows * request_.columns));
    const MatrixView<Bf16> out(d.data(), request_.rows, request_.columns);
    const Memory& memory = request_.backend->memory();
    Mirror mirror(memory);
    ActivationView a = quantized_a(mirror.bring(std::span(std::as_const(a_scales))).data(), layout);
    a.codes = mirror.bring(a.codes);
    const auto b = quantized_b(mirror.bring(std::span(b_.codes)).data(),
                               mirror.bring(std::span(std::as_const(b_scales))).data(), layout, groups);
    GroupedGemmArgs args{a, b, mirror.bring(std::span(offsets)), mirror.bring(out)};
    const AlignedWorkspace workspace(request_.backend->gemm_workspace_bytes(args), memory);
    args.workspace = workspace.span();
    if (operation == "dense") {
      request_.backend->gemm({args.a, b.front(), args.d, args.accumulation, args.workspace});
    } else {
      request_.backend->grouped_gemm(args);
    }
    mirror.fetch();
    return widen(d);
  }

  const GemmtestRequest& request_;
  GemmtestReport report_;
  std::vector<float> a_values_, b_values_;
  BlockScaledMatrix a_, b_;
};

}  // namespace

bool GemmtestReport::has_finding() const {
  return different_elements > 0 ||
         std::any_of(rows.begin(), rows.end(), [](const GemmtestRow& row) { return row.exceeds(); });
}

GemmtestReport run_gemmtest(const GemmtestRequest& request) {
  return Gemmtest(request).run();
}

}  // namespace fourfold
