#include "diagnosis/replay_stages.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "base/thread_scratch.h"
#include "fourfold/quantize.h"

namespace fourfold::diagnosis {
namespace {

/// Below this many multiplications threads take longer to wake than the work takes.
constexpr int64_t kWorthThreads = 400'000;
constexpr int64_t kChunk = 16;  // rows of weights that a thread takes at a time

/// Rows of one expert.
struct Group {
  int64_t expert = 0;
  std::vector<size_t> rows;
};

std::vector<Group> groups_of(std::span<const int64_t> experts) {
  std::vector<Group> groups;
  for (size_t row = 0; row < experts.size(); ++row) {
    if (experts[row] < 0) continue;
    auto group = std::find_if(groups.begin(), groups.end(),
                              [&](const Group& other) { return other.expert == experts[row]; });
    if (group == groups.end()) group = groups.insert(groups.end(), {experts[row], {}});
    group->rows.push_back(row);
  }
  return groups;
}

template <class Sum>
float sum_of_products(const float* a, const float* b, int64_t first, int64_t last) {
  Sum sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = first; k < last; ++k) sum += static_cast<Sum>(a[k]) * static_cast<Sum>(b[k]);
  return static_cast<float>(sum);
}

float dot(Sums sums, const float* a, const float* b, int64_t first, int64_t last) {
  return sums == Sums::kFloat32 ? sum_of_products<float>(a, b, first, last)
                                : sum_of_products<double>(a, b, first, last);
}

double sigmoid(double x) {
  return 1.0 / (1.0 + std::exp(-x));
}

double clamp(double value, double low, double high) {
  return value < low ? low : value > high ? high : value;
}

double gelu(double x) {
  return 0.5 * x * std::erfc(-x / std::numbers::sqrt2);
}

double gelu_tanh(double x) {
  return x * sigmoid(2.0 * std::sqrt(2.0 / std::numbers::pi) * (x + 0.044715 * x * x * x));
}

/// Clamp of gate and of up, in the form that the engine has.
double clamped_gate(ClampForm form, double gate, double limit) {
  if (form == ClampForm::kUpAlone) return gate;
  return clamp(gate, form == ClampForm::kGateBothSides ? -limit : -INFINITY, limit);
}
double clamped_up(ClampForm form, double up, double limit) {
  if (form == ClampForm::kGateAlone) return up;
  return clamp(up, form == ClampForm::kUpFromAbove ? -INFINITY : -limit, limit);
}

double activate(const ActivationFunction& f, const ActivationChange& change, double gate, double up) {
  switch (f.kind) {
    case ActivationKind::kSwiglu: {
      const double g = clamped_gate(change.clamp, gate, f.limit), u = clamped_up(change.clamp, up, f.limit);
      return g * sigmoid(double{f.alpha} * g) * (u + double{f.beta});
    }
    case ActivationKind::kSwigluStep:
      return clamp(gate * sigmoid(gate), -INFINITY, f.limit) * clamped_up(change.clamp, up, f.limit);
    case ActivationKind::kGeglu:
      return gelu(gate) * up;
    case ActivationKind::kGegluTanh:
      return gelu_tanh(gate) * up;
    case ActivationKind::kReluSquared: {
      const double positive = std::max(up, 0.0);
      return change.relu_not_squared ? positive : positive * positive;
    }
    case ActivationKind::kSilu:
      return up * sigmoid(up);
    case ActivationKind::kGelu:
      return gelu(up);
  }
  return up;
}

}  // namespace

float round_bf16(float value) {
  return static_cast<float>(encode_bf16(value));
}

RowScales row_scales(ScalePolicy policy, InputScaleUse use, std::span<const float> row, float own,
                     float first, float largest) {
  float scale = policy == ScalePolicy::kMaxOverExperts ? largest : own;
  if (policy == ScalePolicy::kDynamicToken) {
    float amax = 0.0f;
    for (const float value : row) amax = std::max(amax, std::abs(value));
    scale = nvfp4_global_scale(amax);
  }
  switch (use) {
    case InputScaleUse::kRight:
      return {scale, scale};
    case InputScaleUse::kDroppedFromAlpha:
      return {scale, 1.0f};
    case InputScaleUse::kReciprocalInAlpha:
      return {scale, 1.0f / scale};
    case InputScaleUse::kReciprocalInStaging:
      return {1.0f / scale, scale};
    case InputScaleUse::kFirstExpert:
      return {first, first};
    case InputScaleUse::kFirstExpertInAlpha:
      return {scale, first};
    case InputScaleUse::kOne:
      return {1.0f, 1.0f};
  }
  return {scale, scale};
}

void decode_staged(StagedRow& row) {
  for (size_t k = 0; k < row.values.size(); ++k) {
    const uint8_t pair = row.codes[k / 2];
    row.values[k] = decode_e2m1(k % 2 == 0 ? pair & 15 : pair >> 4) * decode_e4m3(row.scales[k / 16]);
  }
}

StagedRow stage_row(ActivationFormat format, std::span<const float> values, const RowScales& scales,
                    float nudge) {
  std::vector<float> row(values.begin(), values.end());
  if (format != ActivationFormat::kBf16) {
    for (float& value : row) value *= nudge;
  }
  StagedRow staged;
  staged.values = row;
  if (format == ActivationFormat::kFp8) {
    std::vector<uint8_t> codes(row.size());
    staged.alpha = quantize_row_fp8(row, codes.data());
    std::transform(codes.begin(), codes.end(), staged.values.begin(),
                   [](uint8_t code) { return decode_e4m3(code); });
  } else if (is_nvfp4(format)) {
    staged.codes.resize(row.size() / 2);
    staged.scales.resize(row.size() / 16);
    quantize_row_nvfp4(row, scales.staging, ScaleFloor::kNone, staged.codes.data(), staged.scales.data());
    staged.alpha = scales.alpha;
    decode_staged(staged);
  }
  return staged;
}

void multiply(const WeightReader& weights, std::span<const StagedRow> rows, std::span<const int64_t> experts,
              int64_t first_k, int64_t last_k, std::span<const float> bias_factor, Sums sums, float* out) {
  const std::vector<Group> groups = groups_of(experts);
  const int64_t width = weights.rows(), chunks = (width + kChunk - 1) / kChunk;
  const auto count = static_cast<int64_t>(groups.size());
  const int64_t cols = weights.cols();
  int64_t beyond = 0;  // the same for every row that has an expert
  for (const StagedRow& row : rows) beyond = std::max(beyond, std::ssize(row.beyond));
  // A row of weights and, whole, those behind it that an engine reads of.
  const int64_t rows_behind = (beyond + cols - 1) / cols;
  ThreadScratch scratch((1 + rows_behind) * cols);
#pragma omp parallel if (count * width * cols > kWorthThreads)
  {
    float* const weight = scratch.mine().data();
    float* const behind = weight + cols;
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t g = 0; g < count; ++g) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const Group& group = groups[static_cast<size_t>(g)];
        for (int64_t n = chunk * kChunk; n < std::min(width, (chunk + 1) * kChunk); ++n) {
          weights.read_row(group.expert, n, weight);
          const int64_t present = std::min(rows_behind, width - n - 1);
          for (int64_t i = 0; i < present; ++i) weights.read_row(group.expert, n + 1 + i, behind + i * cols);
          const float global = weights.global(group.expert, n), bias = weights.bias(group.expert, n);
          for (const size_t r : group.rows) {
            float sum = dot(sums, rows[r].values.data(), weight, first_k, last_k);
            if (present > 0) {
              sum += dot(sums, rows[r].beyond.data(), behind, 0, std::min(beyond, present * cols));
            }
            const float factor = bias_factor.empty() ? 1.0f : bias_factor[r];
            out[static_cast<int64_t>(r) * width + n] = rows[r].alpha * global * sum + factor * bias;
          }
        }
      }
    }
  }
}

void activate_row(const ActivationFunction& function, const ActivationChange& change,
                  std::span<const float> h, std::span<float> out) {
  ActivationFunction f = function;
  f.kind = change.kind.value_or(f.kind);
  f.alpha = change.alpha.value_or(f.alpha);
  f.beta = change.beta.value_or(f.beta);
  f.limit = change.limit.value_or(f.limit);
  const size_t up = is_gated(f.kind) ? out.size() : 0;
  for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>(activate(f, change, h[i], h[up + i]));
}

}  // namespace fourfold::diagnosis
