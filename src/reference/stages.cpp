// The stages of fourfold/reference.h.
#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <vector>

#include "base/fail.h"
#include "base/thread_scratch.h"
#include "fourfold/quantize.h"
#include "fourfold/reference.h"
#include "reference/grouped_multiply.h"

namespace fourfold::reference {
namespace {

using ExpertHalf = WeightView Expert::*;
using ExpertBias = std::optional<DenseView> Expert::*;

void multiply_experts(const ActivationView& a, std::span<const int32_t> group_offsets,
                      const ExpertWeights& weights, const LayerOptions& options, ExpertHalf half,
                      ExpertBias bias, MatrixView<Bf16> d) {
  std::vector<GroupWeight> groups;
  for (const Expert& expert : weights.experts) {
    groups.push_back({&(expert.*half), (expert.*bias) ? &*(expert.*bias) : nullptr});
  }
  multiply({a, group_offsets, groups, d, options.accumulation, options.dequantize_weights});
}

void widen_row(MatrixView<const Bf16> rows, int64_t row, std::span<float> out) {
  for (int64_t col = 0; col < rows.cols; ++col)
    out[static_cast<size_t>(col)] = static_cast<float>(rows(row, col));
}

void stage_row(ActivationFormat format, ScaleRule rule, std::span<const float> x, int64_t row,
               const StagedActivations& out) {
  const auto index = static_cast<size_t>(row);
  switch (format) {
    case ActivationFormat::kNvfp4:
      return quantize_row_nvfp4(x, out.row_scales[index], ScaleFloor::kNone, rule, out.codes.row(row),
                                out.scales.row(row));
    case ActivationFormat::kNvfp4x2:
      return quantize_row_nvfp4x2(x, out.row_scales[index], out.codes.row(row), out.scales.row(row),
                                  out.residual_codes.row(row), out.residual_scales.row(row));
    case ActivationFormat::kFp8:
      out.row_scales[index] = quantize_row_fp8(x, out.codes.row(row));
      return;
    case ActivationFormat::kBf16:
      for (size_t col = 0; col < x.size(); ++col)
        out.values(row, static_cast<int64_t>(col)) = encode_bf16(x[col]);
      return;
  }
}

double sigmoid(double x) {
  return 1.0 / (1.0 + std::exp(-x));
}
double silu(double x) {
  return x / (1.0 + std::exp(-x));
}
// 1 + erf and 1 + tanh cancel for negative x; these forms do not.
double gelu(double x) {
  return 0.5 * x * std::erfc(-x / std::numbers::sqrt2);
}
double gelu_tanh(double x) {
  return x * sigmoid(2.0 * std::sqrt(2.0 / std::numbers::pi) * (x + 0.044715 * x * x * x));
}

/// min and max of C++ and of most kernels would hide a NaN on one side; here it goes through.
double clamp_keeping_nan(double value, double low, double high) {
  return value < low ? low : value > high ? high : value;
}

/// The activation of one element; `gate` is unused where there is none.
double apply(const ActivationFunction& function, double gate, double up) {
  const double limit = function.limit;
  switch (function.kind) {
    case ActivationKind::kSwiglu: {
      const double g = clamp_keeping_nan(gate, -INFINITY, limit), u = clamp_keeping_nan(up, -limit, limit);
      const double gated = function.alpha == 1.0f ? silu(g) : g * sigmoid(double{function.alpha} * g);
      return gated * (function.beta == 0.0f ? u : u + double{function.beta});  // -0 + 0 would lose a sign
    }
    case ActivationKind::kSwigluStep:
      return clamp_keeping_nan(silu(gate), -INFINITY, limit) * clamp_keeping_nan(up, -limit, limit);
    case ActivationKind::kGeglu:
      return gelu(gate) * up;
    case ActivationKind::kGegluTanh:
      return gelu_tanh(gate) * up;
    case ActivationKind::kReluSquared: {
      const double positive = up < 0.0 ? 0.0 : up;
      return positive * positive;
    }
    case ActivationKind::kSilu:
      return silu(up);
    case ActivationKind::kGelu:
      return gelu(up);
  }
  return up;
}

}  // namespace

void gemm(const GemmArgs& args) {
  validate(args);
  const std::array<int32_t, 2> one_group = {0, static_cast<int32_t>(args.a.rows)};
  const std::array<GroupWeight, 1> weight = {GroupWeight{&args.b, nullptr}};
  multiply({args.a, one_group, weight, args.d, args.accumulation, false});
}

void grouped_gemm(const GroupedGemmArgs& args) {
  validate(args);
  std::vector<GroupWeight> groups;
  for (const WeightView& weight : args.b) groups.push_back({&weight, nullptr});
  multiply({args.a, args.group_offsets, groups, args.d, args.accumulation, false});
}

void activation_scales(ScalePolicy policy, MatrixView<const Bf16> rows,
                       std::span<const int32_t> group_offsets, std::span<const float> expert_scales,
                       std::span<float> global) {
  switch (policy) {
    case ScalePolicy::kStatic:
      for (size_t e = 0; e < expert_scales.size(); ++e) {
        std::fill(global.begin() + group_offsets[e], global.begin() + group_offsets[e + 1], expert_scales[e]);
      }
      return;
    case ScalePolicy::kMaxOverExperts:
      if (!global.empty() && !expert_scales.empty()) {
        std::fill(global.begin(), global.end(),
                  *std::max_element(expert_scales.begin(), expert_scales.end()));
      }
      return;
    case ScalePolicy::kDynamicTensor:
      std::fill(global.begin(), global.end(), nvfp4_global_scale(absolute_maximum(rows)));
      return;
    case ScalePolicy::kDynamicToken:
      for (int64_t row = 0; row < rows.rows; ++row) {
        global[static_cast<size_t>(row)] = nvfp4_global_scale(absolute_maximum(rows.rows_from(row, 1)));
      }
      return;
  }
}

void stage(ActivationFormat format, MatrixView<const Bf16> rows, const StagedActivations& out,
           ScaleRule rule) {
  if (is_nvfp4(format) && rows.cols % 16 != 0)
    reject("stage: columns for nvfp4", "a multiple of 16", rows.cols);
  ThreadScratch scratch(rows.cols);
#pragma omp parallel
  {
    const std::span<float> x = scratch.mine();
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows.rows; ++row) {
      widen_row(rows, row, x);
      stage_row(format, rule, x, row, out);
    }
  }
}

void permute_rows(MatrixView<const Bf16> x, std::span<const int32_t> slot_of_row,
                  MatrixView<const float> topk_weights, const LayerConfig& config, MatrixView<Bf16> rows) {
  if (config.weight_on_input) {
    gather_weighted_rows(x, slot_of_row, topk_weights, rows);
  } else {
    gather_rows(x, slot_of_row, topk_weights.cols, rows);
  }
}

void gate_up(const ActivationView& a, std::span<const int32_t> group_offsets, const ExpertWeights& weights,
             const LayerOptions& options, MatrixView<Bf16> h) {
  const int64_t half = weights.intermediate;
  const bool gated = h.cols == 2 * half;
  if (gated) {
    multiply_experts(a, group_offsets, weights, options, &Expert::gate, &Expert::gate_bias,
                     h.cols_from(0, half));
  }
  multiply_experts(a, group_offsets, weights, options, &Expert::up, &Expert::up_bias,
                   h.cols_from(gated ? half : 0, half));
}

void activate(const ActivationFunction& function, MatrixView<const Bf16> h, MatrixView<Bf16> activation) {
  const int64_t up = is_gated(function.kind) ? activation.cols : 0;  // first column of up
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < h.rows; ++row) {
    for (int64_t col = 0; col < activation.cols; ++col) {
      const double value =
          apply(function, static_cast<float>(h(row, col)), static_cast<float>(h(row, up + col)));
      activation(row, col) = encode_bf16(static_cast<float>(value));
    }
  }
}

void down(const ActivationView& a, std::span<const int32_t> group_offsets, const ExpertWeights& weights,
          const LayerOptions& options, MatrixView<Bf16> z) {
  multiply_experts(a, group_offsets, weights, options, &Expert::down, &Expert::down_bias, z);
}

void weigh_shared(MatrixView<const Bf16> x, const SharedExpert& shared, std::span<float> weights) {
  if (!shared.gate) {
    std::fill(weights.begin(), weights.end(), 1.0f);
    return;
  }
  std::vector<float> gate(static_cast<size_t>(x.cols));
  decode_row(*shared.gate, 0, gate.data());
  for (int64_t token = 0; token < x.rows; ++token) {
    float logit = 0.0f;
    for (int64_t h = 0; h < x.cols; ++h) {
      logit += static_cast<float>(x(token, h)) * gate[static_cast<size_t>(h)];
    }
    weights[static_cast<size_t>(token)] = static_cast<float>(sigmoid(logit));
  }
}

void combine(MatrixView<const Bf16> z, std::span<const int32_t> row_of_slot,
             MatrixView<const float> topk_weights, const LayerConfig& config, const SharedOutput& shared,
             const OutputView& y) {
  const int64_t top_k = topk_weights.cols;
#pragma omp parallel for schedule(static)
  for (int64_t token = 0; token < topk_weights.rows; ++token) {
    for (int64_t col = 0; col < z.cols; ++col) {
      float sum = 0.0f;
      for (int64_t k = 0; k < top_k; ++k) {
        const int32_t row = row_of_slot[static_cast<size_t>(token * top_k + k)];
        const float weight = config.weight_on_input ? 1.0f : topk_weights(token, k);
        if (row >= 0) sum += weight * static_cast<float>(z(row, col));
      }
      if (!shared.z.empty()) {
        sum += shared.z_weight[static_cast<size_t>(token)] * static_cast<float>(shared.z(token, col));
      }
      if (const auto* bf16 = std::get_if<MatrixView<Bf16>>(&y)) {
        (*bf16)(token, col) = encode_bf16(sum);
      } else {
        std::get<MatrixView<float>>(y)(token, col) = sum;
      }
    }
  }
}

}  // namespace fourfold::reference
