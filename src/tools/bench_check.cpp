#include "tools/bench_check.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <optional>

#include "base/fail.h"
#include "fourfold/comparison.h"
#include "fourfold/quantize.h"
#include "fourfold/reference.h"
#include "tools/layer_trace.h"
#include "tools/random.h"
#include "tools/staged_rows.h"

namespace fourfold {
namespace {

// Limits on relative L2 against float64 before the rounding to bf16. That rounding alone makes half an ulp at
// most, 2^-8 of an element, and 1.7e-3 in the mean over mantissas: sqrt(mean(ulp^2 / 12)) with ulp = 2^-7 /
// m, m log-uniform in [1, 2). Sums in float32 add 1e-5 or so. 3e-3 leaves a sound kernel almost twice its
// error and catches a second rounding of every element to fewer bits. One row has few elements, and may
// cancel: 2^-7.
constexpr double kStageLimit = 3e-3;
constexpr double kWorstRowLimit = 0x1p-7;
// From end to end the roundings of h, the activation, z and y add up, sqrt(4) x 1.7e-3, and where two orders
// of summation round to different bf16, a code of the second staging may flip: measured below 4e-3. Rounding
// at other points than the specified ones moves the output by 2.5e-2 (docs/formats.md, section 7).
constexpr double kEndToEndLimit = 8e-3;
constexpr double kWorstTokenLimit = 0x1p-5;

constexpr int64_t kLeastRows = 256;
constexpr int64_t kTokens = 64;

/// Rows of a matrix in some memory, brought to the host: [rows, cols]. Runs of rows travel together.
template <class T>
std::vector<T> download_rows(const Memory& memory, const MatrixView<T>& matrix,
                             std::span<const int32_t> rows) {
  std::vector<T> values(rows.size() * static_cast<size_t>(matrix.cols));
  for (size_t first = 0; first < rows.size();) {
    size_t last = first + 1;
    while (last < rows.size() && rows[last] == rows[last - 1] + 1 && matrix.stride == matrix.cols) ++last;
    const auto width = static_cast<size_t>(matrix.cols);
    memory.copy_to_host(values.data() + first * width, matrix.row(rows[first]),
                        (last - first) * width * sizeof(T));
    first = last;
  }
  return values;
}

/// Staged activations with room for all rows, in a testbed's memory.
struct DeviceStaged {
  TestbedArray<Bf16> values;
  TestbedArray<uint8_t> codes, scales, residual_codes, residual_scales;
  TestbedArray<float> row_scales;
  StagedActivations views;

  DeviceStaged(const Memory& memory, ActivationFormat format, int64_t rows, int64_t cols) {
    const auto bytes = [&](TestbedArray<uint8_t>& array, int64_t width) {
      array = TestbedArray<uint8_t>(memory, rows * width);
      array.poison();
      return array.matrix(rows, width);
    };
    if (format == ActivationFormat::kBf16) {
      values = TestbedArray<Bf16>(memory, rows * cols);
      values.poison();
      views.values = values.matrix(rows, cols);
      return;
    }
    row_scales = TestbedArray<float>(memory, rows);
    row_scales.poison();
    views.row_scales = row_scales.span();
    views.codes = bytes(codes, format == ActivationFormat::kFp8 ? cols : cols / 2);
    if (is_nvfp4(format)) views.scales = bytes(scales, cols / 16);
    if (format == ActivationFormat::kNvfp4x2) {
      views.residual_codes = bytes(residual_codes, cols / 2);
      views.residual_scales = bytes(residual_scales, cols / 16);
    }
  }

  StagedBuffers download(const Memory& memory, ActivationFormat format, std::span<const int32_t> rows,
                         int64_t cols) const {
    StagedBuffers host(format, static_cast<int64_t>(rows.size()), cols);
    const auto fetch = [&](auto& to, const auto& from) {
      if (from.empty()) return;
      const auto part = download_rows(memory, from, rows);
      std::copy(part.begin(), part.end(), to.begin());
    };
    fetch(host.values, views.values);
    fetch(host.codes, views.codes);
    fetch(host.scales, views.scales);
    fetch(host.residual_codes, views.residual_codes);
    fetch(host.residual_scales, views.residual_scales);
    if (row_scales.size() > 0) fetch(host.row_scales, row_scales.matrix(row_scales.size(), 1));
    return host;
  }
};

/// Which rows of the permuted order are looked at, ascending, and whose they are.
struct SampledRows {
  std::vector<int32_t> rows, expert_of;
  int64_t whole_experts = 0;
  std::vector<int32_t> group_offsets;  // [E+1], of the sample

  int64_t count() const { return static_cast<int64_t>(rows.size()); }
};

SampledRows with_experts(std::vector<int32_t> rows, std::span<const int32_t> group_offsets) {
  SampledRows sample;
  std::sort(rows.begin(), rows.end());
  rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
  sample.group_offsets.assign(group_offsets.size(), 0);
  for (const int32_t row : rows) {
    const auto group = std::upper_bound(group_offsets.begin(), group_offsets.end(), row);
    const auto expert = static_cast<int32_t>(group - group_offsets.begin() - 1);
    sample.expert_of.push_back(expert);
    ++sample.group_offsets[static_cast<size_t>(expert) + 1];
  }
  std::partial_sum(sample.group_offsets.begin(), sample.group_offsets.end(), sample.group_offsets.begin());
  sample.rows = std::move(rows);
  return sample;
}

/// All rows of the largest, the smallest and a middle group (as far as the oracle can afford), and others at
/// even distances, at least kLeastRows in all where there are as many.
SampledRows sample_rows(std::span<const int32_t> group_offsets, int64_t most_rows_of_expert) {
  const auto size_of = [&](size_t e) { return group_offsets[e + 1] - group_offsets[e]; };
  std::vector<size_t> by_size;
  for (size_t e = 0; e + 1 < group_offsets.size(); ++e) {
    if (size_of(e) > 0) by_size.push_back(e);
  }
  std::stable_sort(by_size.begin(), by_size.end(),
                   [&](size_t a, size_t b) { return size_of(a) < size_of(b); });
  std::vector<int32_t> rows;
  int64_t whole = 0;
  if (!by_size.empty()) {
    for (const size_t e : {by_size.back(), by_size.front(), by_size[by_size.size() / 2]}) {
      const auto count = static_cast<int32_t>(std::min<int64_t>(size_of(e), most_rows_of_expert));
      whole += count == size_of(e);
      for (int32_t i = 0; i < count; ++i) {
        // Both ends of a group too large to be taken whole.
        rows.push_back(i < (count + 1) / 2 ? group_offsets[e] + i : group_offsets[e + 1] - count + i);
      }
    }
  }
  const int64_t total = group_offsets.back(), spread = std::min(total, kLeastRows);
  for (int64_t i = 0; i < spread; ++i) rows.push_back(static_cast<int32_t>(i * total / spread));
  SampledRows sample = with_experts(std::move(rows), group_offsets);
  sample.whole_experts = std::min<int64_t>(whole, static_cast<int64_t>(by_size.size()));
  return sample;
}

/// Evenly spaced tokens, the first and the last among them.
std::vector<int32_t> sample_tokens(int64_t tokens, int64_t most) {
  std::vector<int32_t> sample;
  const int64_t count = std::min(tokens, most);
  for (int64_t i = 0; i < count; ++i) {
    sample.push_back(static_cast<int32_t>(count == 1 ? 0 : i * (tokens - 1) / (count - 1)));
  }
  return sample;
}

/// Up to `most` of `total` columns, ascending; all where they are no more.
std::vector<int64_t> sample_columns(int64_t total, int64_t most, uint64_t seed) {
  std::vector<int64_t> columns(static_cast<size_t>(total));
  std::iota(columns.begin(), columns.end(), 0);
  if (total <= most) return columns;
  Random random(seed, Random::Purpose::kChannel, static_cast<uint64_t>(total));
  for (int64_t i = 0; i < most; ++i) {
    std::swap(columns[static_cast<size_t>(i)], columns[static_cast<size_t>(i + random.below(total - i))]);
  }
  columns.resize(static_cast<size_t>(most));
  std::sort(columns.begin(), columns.end());
  return columns;
}

class LayerCheck {
 public:
  LayerCheck(const CheckSubject& subject, CheckDepth depth)
      : subject_(subject),
        memory_(subject.testbed->memory()),
        config_(subject.layer->config()),
        options_(subject.layer->options()),
        permutation_(permute_by_expert(subject.routing, config_.experts)),
        y_(std::get<MatrixView<Bf16>>(subject.args.y)) {
    report_.depth = depth;
    tokens_ = sample_tokens(
        subject.x.rows, depth == CheckDepth::kEndToEnd ? subject.testbed->most_checked_tokens() : kTokens);
    report_.tokens = static_cast<int64_t>(tokens_.size());
  }

  CheckReport run() {
    const std::vector<Bf16> y = run_layer(subject_.args);
    if (report_.depth == CheckDepth::kEndToEnd) {
      compare_end_to_end(y);
    } else {
      compare_stages(y);
    }
    return std::move(report_);
  }

 private:
  void add_finding(const std::string& text) { report_.findings.push_back(text); }

  /// Runs the layer; -> y of the sampled tokens.
  std::vector<Bf16> run_layer(const ForwardArgs& args) const {
    memory_.fill(y_.data, 0xFF, static_cast<size_t>(y_.rows * y_.stride) * sizeof(Bf16));
    memory_.synchronize();
    subject_.layer->forward(*subject_.plan, args);
    memory_.synchronize();
    return download_rows(memory_, y_, tokens_);
  }

  void compare_stages(const std::vector<Bf16>& y_untapped) {
    const int64_t slots = subject_.routing.tokens() * config_.top_k;
    const ActivationFormat format = options_.activations;
    const TestbedArray<int32_t> offsets(memory_, config_.experts + 1), slot_of_row(memory_, slots),
        row_of_slot(memory_, slots);
    const DeviceStaged staged_x(memory_, format, slots, config_.hidden),
        staged_intermediate(memory_, format, slots, config_.intermediate);
    const TestbedArray<Bf16> h(memory_, slots * config_.h_columns()),
        activation(memory_, slots * config_.intermediate), z(memory_, slots * config_.hidden);
    for (const auto* array : {&offsets, &slot_of_row, &row_of_slot}) array->poison();
    for (const auto* array : {&h, &activation, &z}) array->poison();
    const MatrixView<Bf16> h_rows = h.matrix(slots, config_.h_columns()),
                           activation_rows = activation.matrix(slots, config_.intermediate),
                           z_rows = z.matrix(slots, config_.hidden);
    ForwardArgs args = subject_.args;
    args.taps = {offsets.span(),
                 slot_of_row.span(),
                 row_of_slot.span(),
                 &staged_x.views,
                 h_rows,
                 activation_rows,
                 &staged_intermediate.views,
                 z_rows,
                 {}};
    const std::vector<Bf16> y = run_layer(args);
    if (y != y_untapped) add_finding("a run with taps gives another y than one without");
    if (!same_permutation(offsets.download(), slot_of_row.download(), row_of_slot.download())) return;

    const SampledRows sample =
        sample_rows(permutation_.group_offsets, subject_.testbed->most_checked_rows_of_expert());
    report_.rows = sample.count();
    report_.whole_experts = sample.whole_experts;
    if (sample.count() == 0) return;
    compare_gemm("gemm1", ExpertGemm::kGateUp, sample, gather_x(sample.rows), options_.x_scale,
                 x_input_scales(*subject_.weights), staged_x, h_rows);
    const std::vector<Bf16> activated = compare_activation(sample, h_rows, activation_rows);
    compare_gemm("gemm2", ExpertGemm::kDown, sample, activated, options_.intermediate_scale,
                 intermediate_input_scales(*subject_.weights), staged_intermediate, z_rows);
    const auto z_of_row = [&](int32_t row) {
      const std::array<int32_t, 1> one = {row};
      return download_rows(memory_, z_rows, one);
    };
    judge("combine", combine(z_of_row), y_untapped, config_.hidden, kStageLimit, kWorstRowLimit);
  }

  bool same_permutation(const std::vector<int32_t>& group_offsets, std::vector<int32_t> slot_of_row,
                        const std::vector<int32_t>& row_of_slot) {
    slot_of_row.resize(permutation_.slot_of_row.size());
    const bool same = group_offsets == permutation_.group_offsets &&
                      slot_of_row == permutation_.slot_of_row && row_of_slot == permutation_.row_of_slot;
    if (!same) add_finding("permutation: group offsets or the order of rows differ from the specification");
    return same;
  }

  /// x in permuted order, of some rows.
  std::vector<Bf16> gather_x(std::span<const int32_t> rows) const {
    std::vector<int32_t> slots;
    for (const int32_t row : rows) slots.push_back(permutation_.slot_of_row[static_cast<size_t>(row)]);
    std::vector<Bf16> x(rows.size() * static_cast<size_t>(config_.hidden));
    reference::permute_rows(subject_.x, slots, subject_.routing.topk_weights, config_,
                            {x.data(), static_cast<int64_t>(rows.size()), config_.hidden});
    return x;
  }

  /// Staging bit for bit, then the GEMM fed with what the backend staged.
  void compare_gemm(const std::string& stage, ExpertGemm gemm, const SampledRows& sample,
                    const std::vector<Bf16>& source, ScalePolicy policy,
                    const std::vector<float>& expert_scales, const DeviceStaged& staged,
                    const MatrixView<Bf16>& output) {
    const ActivationFormat format = options_.activations;
    const int64_t cols = gemm == ExpertGemm::kGateUp ? config_.hidden : config_.intermediate;
    const StagedBuffers found = staged.download(memory_, format, sample.rows, cols);
    const std::optional<float> tensor_scale = policy == ScalePolicy::kDynamicTensor && is_nvfp4(format)
                                                  ? std::optional(tensor_scale_of(gemm, found.row_scales))
                                                  : std::nullopt;
    const StagedBuffers expected = stage_rows(source, cols, sample, policy, expert_scales, tensor_scale);
    compare_staging(gemm, expected, found);
    const std::vector<int64_t> columns =
        sample_columns(output.cols, subject_.testbed->most_checked_columns(), subject_.seed);
    const std::vector<float> exact = subject_.testbed->multiply(
        *subject_.weights, gemm, decode_rows(found, format, sample.expert_of, cols), columns);
    const std::vector<Bf16> rows = download_rows(memory_, output, sample.rows);
    std::vector<Bf16> candidate;
    candidate.reserve(exact.size());
    for (size_t row = 0; row < sample.rows.size(); ++row) {
      for (const int64_t column : columns) {
        candidate.push_back(rows[row * static_cast<size_t>(output.cols) + static_cast<size_t>(column)]);
      }
    }
    judge(stage, exact, candidate, static_cast<int64_t>(columns.size()), kStageLimit, kWorstRowLimit);
  }

  /// dynamic-tensor: the scale of x follows from x; that of the intermediate needs all its rows, of which
  /// only some are here, so it is taken from the backend, and must be the same everywhere and large enough.
  float tensor_scale_of(ExpertGemm gemm, std::span<const float> row_scales) {
    if (std::adjacent_find(row_scales.begin(), row_scales.end(), std::not_equal_to<>()) != row_scales.end()) {
      add_finding("staging: dynamic-tensor scales differ from row to row");
    }
    if (gemm == ExpertGemm::kDown) return row_scales.front();
    float amax = 0.0f;
    for (int64_t token = 0; token < subject_.x.rows; ++token) {
      const auto first = permutation_.row_of_slot.begin() + token * config_.top_k;
      const bool has_row = std::any_of(first, first + config_.top_k, [](int32_t row) { return row >= 0; });
      if (has_row) amax = std::max(amax, absolute_maximum(subject_.x.rows_from(token, 1)));
    }
    return nvfp4_global_scale(amax);
  }

  /// The specification's staging of sampled rows.
  StagedBuffers stage_rows(const std::vector<Bf16>& source, int64_t cols, const SampledRows& sample,
                           ScalePolicy policy, const std::vector<float>& expert_scales,
                           std::optional<float> tensor_scale) const {
    const ActivationFormat format = options_.activations;
    const MatrixView<const Bf16> rows(source.data(), sample.count(), cols);
    StagedBuffers staged(format, sample.count(), cols);
    if (tensor_scale) {
      std::fill(staged.row_scales.begin(), staged.row_scales.end(), *tensor_scale);
    } else if (is_nvfp4(format)) {
      reference::activation_scales(policy, rows, sample.group_offsets, expert_scales,
                                   staged.views.row_scales);
    }
    reference::stage(format, rows, staged.views, options_.activation_rule);
    return staged;
  }

  void compare_staging(ExpertGemm gemm, const StagedBuffers& expected, const StagedBuffers& found) {
    int64_t values = 0, different = 0;
    const auto count = [&](const auto& a, const auto& b) {
      values += static_cast<int64_t>(a.size());
      for (size_t i = 0; i < a.size(); ++i) different += std::memcmp(&a[i], &b[i], sizeof(a[i])) != 0;
    };
    count(expected.values, found.values);
    count(expected.codes, found.codes);
    count(expected.scales, found.scales);
    count(expected.residual_codes, found.residual_codes);
    count(expected.residual_scales, found.residual_scales);
    count(expected.row_scales, found.row_scales);
    report_.staged_values += values;
    if (different > 0) {
      add_finding(fmt::format("staging of {}: {} of {} codes and scales differ from the specification",
                              gemm == ExpertGemm::kGateUp ? "x" : "the intermediate", different, values));
    }
  }

  /// -> the backend's activation of the sampled rows.
  std::vector<Bf16> compare_activation(const SampledRows& sample, const MatrixView<Bf16>& h_rows,
                                       const MatrixView<Bf16>& activation_rows) {
    const std::vector<Bf16> h = download_rows(memory_, h_rows, sample.rows);
    std::vector<Bf16> found = download_rows(memory_, activation_rows, sample.rows);
    const std::vector<Bf16> expected = activate(h, sample.count());
    std::vector<float> exact(expected.size());
    std::transform(expected.begin(), expected.end(), exact.begin(),
                   [](Bf16 v) { return static_cast<float>(v); });
    judge("activate", exact, found, config_.intermediate, kStageLimit, kWorstRowLimit);
    return found;
  }

  std::vector<Bf16> activate(const std::vector<Bf16>& h, int64_t rows) const {
    std::vector<Bf16> activated(static_cast<size_t>(rows * config_.intermediate));
    reference::activate(config_.activation, {h.data(), rows, config_.h_columns()},
                        {activated.data(), rows, config_.intermediate});
    return activated;
  }

  /// y of the sampled tokens, before rounding, from rows of z.
  template <class ZOfRow>
  std::vector<float> combine(const ZOfRow& z_of_row) const {
    std::vector<float> y;
    std::vector<double> sums(static_cast<size_t>(config_.hidden));
    for (const int32_t token : tokens_) {
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t k = 0; k < config_.top_k; ++k) {
        const int32_t row = permutation_.row_of_slot[static_cast<size_t>(token * config_.top_k + k)];
        if (row < 0) continue;
        const std::vector<Bf16> z = z_of_row(row);
        const double weight = config_.weight_on_input ? 1.0 : subject_.routing.topk_weights(token, k);
        for (size_t col = 0; col < sums.size(); ++col) sums[col] += weight * static_cast<float>(z[col]);
      }
      for (const double sum : sums) y.push_back(static_cast<float>(sum));
    }
    return y;
  }

  void compare_end_to_end(const std::vector<Bf16>& y) {
    const auto needs_all_rows = [](ScalePolicy policy) { return policy == ScalePolicy::kDynamicTensor; };
    if (is_nvfp4(options_.activations) &&
        (needs_all_rows(options_.x_scale) || needs_all_rows(options_.intermediate_scale))) {
      fail(
          ErrorCode::kUnsupported,
          "the taps of all stages do not fit the memory, and dynamic-tensor scales can't be checked without");
    }
    std::vector<int32_t> rows;
    for (const int32_t token : tokens_) {
      for (int64_t k = 0; k < config_.top_k; ++k) {
        const int32_t row = permutation_.row_of_slot[static_cast<size_t>(token * config_.top_k + k)];
        if (row >= 0) rows.push_back(row);
      }
    }
    const SampledRows sample = with_experts(std::move(rows), permutation_.group_offsets);
    report_.rows = sample.count();
    const std::vector<Bf16> h =
        multiply_again(ExpertGemm::kGateUp, sample, gather_x(sample.rows), config_.hidden, options_.x_scale,
                       x_input_scales(*subject_.weights));
    const std::vector<Bf16> z =
        multiply_again(ExpertGemm::kDown, sample, activate(h, sample.count()), config_.intermediate,
                       options_.intermediate_scale, intermediate_input_scales(*subject_.weights));
    const auto z_of_row = [&](int32_t row) {
      const auto at = std::lower_bound(sample.rows.begin(), sample.rows.end(), row) - sample.rows.begin();
      const auto first = z.begin() + at * config_.hidden;
      return std::vector<Bf16>(first, first + config_.hidden);
    };
    judge("end to end", combine(z_of_row), y, config_.hidden, kEndToEndLimit, kWorstTokenLimit);
  }

  /// Stages and multiplies sampled rows by the specification, all columns, rounded to bf16.
  std::vector<Bf16> multiply_again(ExpertGemm gemm, const SampledRows& sample,
                                   const std::vector<Bf16>& source, int64_t cols, ScalePolicy policy,
                                   const std::vector<float>& expert_scales) const {
    if (sample.count() == 0) return {};
    const StagedBuffers staged = stage_rows(source, cols, sample, policy, expert_scales, std::nullopt);
    const std::vector<int64_t> columns = sample_columns(
        gemm == ExpertGemm::kGateUp ? config_.h_columns() : config_.hidden, INT64_MAX, subject_.seed);
    const std::vector<float> exact = subject_.testbed->multiply(
        *subject_.weights, gemm, decode_rows(staged, options_.activations, sample.expert_of, cols), columns);
    std::vector<Bf16> rounded(exact.size());
    std::transform(exact.begin(), exact.end(), rounded.begin(), encode_bf16);
    return rounded;
  }

  void judge(const std::string& stage, const std::vector<float>& exact, const std::vector<Bf16>& found,
             int64_t cols, double limit, double worst_row_limit) {
    ErrorSums total;
    WorstPart worst;
    const auto width = static_cast<size_t>(cols);
    for (size_t first = 0; first < exact.size(); first += width) {
      ErrorSums row;
      for (size_t i = first; i < first + width; ++i) row.add(exact[i], static_cast<float>(found[i]));
      worst.offer(static_cast<int64_t>(first / width), row.relative_l2());
      total += row;
    }
    report_.stages.push_back({stage, total.relative_l2(), worst.rel_l2, limit, worst_row_limit});
    if (!(total.relative_l2() <= limit)) {
      add_finding(fmt::format("{}: relative L2 {:.3g} above {:.3g} (norm ratio {:.4g})", stage,
                              total.relative_l2(), limit, total.norm_ratio()));
    } else if (!(worst.rel_l2 <= worst_row_limit)) {
      add_finding(fmt::format("{}: one row alone has relative L2 {:.3g}, above {:.3g}", stage, worst.rel_l2,
                              worst_row_limit));
    }
  }

  const CheckSubject& subject_;
  const Memory& memory_;
  const LayerConfig& config_;
  const LayerOptions& options_;
  Permutation permutation_;
  MatrixView<Bf16> y_;
  std::vector<int32_t> tokens_;
  CheckReport report_;
};

}  // namespace

double CheckReport::worst() const {
  double worst = 0.0;
  for (const StageCheck& stage : stages) worst = std::max(worst, stage.rel_l2);
  return worst;
}

int64_t tap_bytes(const LayerConfig& config, ActivationFormat format, int64_t tokens) {
  // Staged: bf16 2 bytes a value, fp8 1, nvfp4 9/16, nvfp4x2 9/8: at most 2, and a float a row.
  const int64_t staged = format == ActivationFormat::kNvfp4 || format == ActivationFormat::kFp8 ? 1 : 2;
  const int64_t a_row = staged * (config.hidden + config.intermediate) + 8 + 8 +
                        2 * (config.h_columns() + config.intermediate + config.hidden);
  return tokens * config.top_k * a_row;
}

CheckReport check_layer(const CheckSubject& subject, CheckDepth depth) {
  return LayerCheck(subject, depth).run();
}

}  // namespace fourfold
