#include "tools/weight_comparison.h"

#include <omp.h>

#include <algorithm>
#include <array>
#include <exception>
#include <optional>
#include <utility>

#include "base/fail.h"
#include "base/thread_scratch.h"
#include "fourfold/quantize.h"
#include "tools/expert_matrices.h"

namespace fourfold {
namespace {

constexpr double kSlack = 1.1;  // of the loss that a sound converter has
constexpr double kRounding =
    1e-6;  // float32 dequantization: 2^-24 a value, and room for a global scale's last bit

struct Loss {
  ErrorSums sums;
  ExactBlocks blocks;
};

/// Sums over all values of two matrices of the same shape; blocks of 32 are counted where `count_blocks`.
Loss measure(const WeightView& original, const WeightView& quantized, bool count_blocks) {
  constexpr int64_t kBlock = 32;
  const int64_t rows = rows_of(original), cols = cols_of(original);
  std::vector<Loss> by_row(static_cast<size_t>(rows));  // summed in order: independent of threads
  ThreadScratch reference_scratch(cols), candidate_scratch(cols);
#pragma omp parallel
  {
    const std::span<float> reference = reference_scratch.mine(), candidate = candidate_scratch.mine();
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      dequantize_row(original, row, reference.data());
      dequantize_row(quantized, row, candidate.data());
      Loss& loss = by_row[static_cast<size_t>(row)];
      loss.sums.add(reference, candidate);
      if (!count_blocks) continue;
      loss.blocks.blocks = cols / kBlock;
      if (loss.sums.difference_squared == 0.0) continue;  // every value is the same
      for (int64_t begin = 0; begin + kBlock <= cols; begin += kBlock) {
        loss.blocks.inexact += !std::equal(reference.begin() + begin, reference.begin() + begin + kBlock,
                                           candidate.begin() + begin);
      }
    }
  }
  Loss total;
  for (const Loss& loss : by_row) {
    total.sums += loss.sums;
    total.blocks.blocks += loss.blocks.blocks;
    total.blocks.inexact += loss.blocks.inexact;
  }
  return total;
}

bool is_mxfp4(const WeightView& weight) {
  return is_stored_as(weight, QuantFormat::kMxfp4);
}

/// What this library makes of the original; errors name the matrix.
BlockScaledMatrix convert(const WeightView& original, const std::string& name) {
  try {
    return convert_to_nvfp4(original);
  } catch (const Error& error) {
    fail(ErrorCode::kBadFile, "{}: {}", name, error.what());
  }
}

/// Whether two matrices are stored in the same bits. Swizzled ones are not looked into.
bool is_same(const BlockScaledView& a, const BlockScaledView& b) {
  if (a.format != b.format || a.rows != b.rows || a.cols != b.cols || a.global != b.global) return false;
  if (a.scale_layout != ScaleLayout::kRowMajor || b.scale_layout != ScaleLayout::kRowMajor) return false;
  const int64_t blocks = a.blocks_per_row();
  for (int64_t row = 0; row < a.rows; ++row) {
    const uint8_t *codes = a.codes.row(row), *scales = a.scales + row * a.scale_stride;
    if (!std::equal(codes, codes + a.cols / 2, b.codes.row(row))) return false;
    if (!std::equal(scales, scales + blocks, b.scales + row * b.scale_stride)) return false;
  }
  return true;
}

/// What a sound converter loses on `before` where the result is stored like `after`, which loses `loss`.
ErrorSums sound_loss(const WeightView& before, const WeightView& after, const ErrorSums& loss,
                     const std::string& name) {
  if (is_stored_as(after, QuantFormat::kNvfp4)) {
    const BlockScaledMatrix sound = convert(before, name);
    if (is_same(sound.view(), std::get<BlockScaledView>(after))) return loss;
    return measure(before, sound.view(), false).sums;
  }
  return format_name(before) == format_name(after) ? measure(before, before, false).sums : loss;
}

bool has_same_values(const std::optional<DenseView>& a, const std::optional<DenseView>& b) {
  if (!a || !b) return a.has_value() == b.has_value();
  return a->cols == b->cols && measure(*a, *b, false).sums.difference_squared == 0.0;
}

/// What is not a matrix.
bool has_same_rest(const Expert& a, const Expert& b) {
  return has_same_values(a.gate_bias, b.gate_bias) && has_same_values(a.up_bias, b.up_bias) &&
         has_same_values(a.down_bias, b.down_bias);
}

/// Of layers with as many experts: all but the matrices of experts.
bool has_same_rest(const ExpertWeights& a, const ExpertWeights& b) {
  for (size_t e = 0; e < a.experts.size(); ++e) {
    if (!has_same_rest(a.experts[e], b.experts[e])) return false;
  }
  if (!a.shared || !b.shared) return a.shared.has_value() == b.shared.has_value();
  return has_same_rest(a.shared->expert, b.shared->expert) && has_same_values(a.shared->gate, b.shared->gate);
}

/// A matrix of one expert in both checkpoints.
struct MatrixPair {
  const Expert *before = nullptr, *after = nullptr;
  const ExpertMatrix* matrix = nullptr;
  int64_t expert = 0;  // or kSharedExpert

  const WeightView& original() const { return before->*matrix->member; }
  const WeightView& nvfp4() const { return after->*matrix->member; }
};

/// Throws Error where one expert has a gate and the other has none.
std::vector<MatrixPair> pairs_of(const ExpertWeights& original, const ExpertWeights& nvfp4) {
  std::vector<MatrixPair> pairs;
  const auto add = [&](const Expert& before, const Expert& after, int64_t expert) {
    if (before.has_gate() != after.has_gate()) {
      reject(fmt::format("original of {}", before.name),
             after.has_gate() ? "a gate, as in NVFP4" : "no gate, as in NVFP4",
             before.has_gate() ? "one" : "none");
    }
    for (const ExpertMatrix& matrix : kExpertMatrices) {
      if (rows_of(before.*matrix.member) == 0) continue;  // an expert without a gate
      pairs.push_back({&before, &after, &matrix, expert});
    }
  };
  for (int64_t e = 0; e < original.count(); ++e) {
    add(original.experts[static_cast<size_t>(e)], nvfp4.experts[static_cast<size_t>(e)], e);
  }
  if (original.shared && nvfp4.shared) add(original.shared->expert, nvfp4.shared->expert, kSharedExpert);
  return pairs;
}

/// Threads that take whole matrices: few enough that what conversions hold in float32 stays within bounds,
/// and that each has several. 1: the threads share the rows of one matrix after the other.
int threads_of(const std::vector<MatrixPair>& pairs) {
  constexpr int64_t kBytes = int64_t{2} << 30, kPairsEach = 4;
  int64_t largest = 1;  // values
  for (const MatrixPair& pair : pairs) {
    largest = std::max(largest, rows_of(pair.original()) * cols_of(pair.original()));
  }
  const int64_t most = std::max<int64_t>(kBytes / (largest * static_cast<int64_t>(sizeof(float))), 1);
  const int64_t threads = std::min<int64_t>(omp_get_max_threads(), most);
  return static_cast<int64_t>(pairs.size()) >= kPairsEach * threads ? static_cast<int>(threads) : 1;
}

struct ComparedMatrix {
  Loss loss;
  ErrorSums sound;
  std::exception_ptr error;
};

ComparedMatrix compare_matrix(const MatrixPair& pair) noexcept {
  try {
    const WeightView &before = pair.original(), &after = pair.nvfp4();
    const Loss loss = measure(before, after, is_mxfp4(before));
    const std::string name = fmt::format("original of {} {}", pair.before->name, pair.matrix->name);
    return {loss, sound_loss(before, after, loss.sums, name), nullptr};
  } catch (...) {
    return {{}, {}, std::current_exception()};
  }
}

}  // namespace

WeightComparison compare_weights(const ExpertWeights& original, const ExpertWeights& nvfp4) {
  if (original.count() != nvfp4.count() || original.hidden != nvfp4.hidden ||
      original.intermediate != nvfp4.intermediate) {
    reject("original and NVFP4 layer",
           fmt::format("the same shape: E {}, H {}, I {}", nvfp4.count(), nvfp4.hidden, nvfp4.intermediate),
           fmt::format("E {}, H {}, I {} in the original", original.count(), original.hidden,
                       original.intermediate));
  }
  const std::vector<MatrixPair> pairs = pairs_of(original, nvfp4);
  std::vector<ComparedMatrix> compared(pairs.size());
  const int threads = threads_of(pairs);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (size_t i = 0; i < pairs.size(); ++i) compared[i] = compare_matrix(pairs[i]);

  WeightComparison comparison;
  ErrorSums sound_total;
  for (size_t i = 0; i < pairs.size(); ++i) {
    const MatrixPair& pair = pairs[i];
    const auto& [loss, sound, error] = compared[i];
    if (error) std::rethrow_exception(error);
    comparison.matrices.push_back({fmt::format("{} {}", pair.after->name, pair.matrix->name), pair.expert,
                                   loss.sums, kSlack * sound.relative_l2() + kRounding, loss.blocks});
    comparison.total += loss.sums;
    sound_total += sound;
    comparison.blocks.blocks += loss.blocks.blocks;
    comparison.blocks.inexact += loss.blocks.inexact;
    comparison.has_blocks |= is_mxfp4(pair.original());
  }
  comparison.identical = comparison.total.difference_squared == 0.0 && has_same_rest(original, nvfp4);
  comparison.limit = kSlack * sound_total.relative_l2() + kRounding;
  return comparison;
}

ErrorSums compare_values(const ExpertWeights& reference, const ExpertWeights& candidate) {
  ErrorSums total;
  const auto add = [&](const Expert& before, const Expert& after) {
    for (const auto& [name, member] : kExpertMatrices) {
      total += measure(before.*member, after.*member, false).sums;
    }
  };
  for (size_t e = 0; e < reference.experts.size(); ++e) add(reference.experts[e], candidate.experts[e]);
  if (reference.shared && candidate.shared) add(reference.shared->expert, candidate.shared->expert);
  return total;
}

}  // namespace fourfold
