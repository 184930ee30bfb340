#include "tools/weight_comparison.h"

#include <algorithm>
#include <utility>

#include "base/fail.h"
#include "base/thread_scratch.h"
#include "fourfold/quantize.h"

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
      for (int64_t begin = 0; count_blocks && begin < cols; begin += kBlock) {
        ++loss.blocks.blocks;
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

/// What a sound converter loses on `before` where the result is stored like `after`.
ErrorSums sound_loss(const WeightView& before, const WeightView& after, const std::string& name) {
  if (is_stored_as(after, QuantFormat::kNvfp4))
    return measure(before, convert(before, name).view(), false).sums;
  const ErrorSums loss = measure(before, after, false).sums;
  return format_name(before) == format_name(after) ? measure(before, before, false).sums : loss;
}

void compare_expert(const Expert& before, const Expert& after, int64_t index, WeightComparison& comparison,
                    ErrorSums& sound_total) {
  const std::array<std::pair<const char*, WeightView Expert::*>, 3> matrices = {
      {{"gate", &Expert::gate}, {"up", &Expert::up}, {"down", &Expert::down}}};
  for (const auto& [which, member] : matrices) {
    if (rows_of(before.*member) == 0) continue;  // an expert without a gate
    const bool count_blocks = is_mxfp4(before.*member);
    const Loss loss = measure(before.*member, after.*member, count_blocks);
    const ErrorSums sound =
        sound_loss(before.*member, after.*member, fmt::format("original of {} {}", before.name, which));
    comparison.matrices.push_back({fmt::format("{} {}", after.name, which), index, loss.sums,
                                   kSlack * sound.relative_l2() + kRounding, loss.blocks});
    comparison.total += loss.sums;
    sound_total += sound;
    comparison.blocks.blocks += loss.blocks.blocks;
    comparison.blocks.inexact += loss.blocks.inexact;
    comparison.has_blocks |= count_blocks;
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
  WeightComparison comparison;
  ErrorSums sound_total;
  for (int64_t e = 0; e < original.count(); ++e) {
    compare_expert(original.experts[static_cast<size_t>(e)], nvfp4.experts[static_cast<size_t>(e)], e,
                   comparison, sound_total);
  }
  if (original.shared && nvfp4.shared) {
    compare_expert(original.shared->expert, nvfp4.shared->expert, kSharedExpert, comparison, sound_total);
  }
  comparison.limit = kSlack * sound_total.relative_l2() + kRounding;
  return comparison;
}

ErrorSums compare_values(const ExpertWeights& reference, const ExpertWeights& candidate) {
  ErrorSums total;
  const auto add = [&](const Expert& before, const Expert& after) {
    for (const auto member : {&Expert::gate, &Expert::up, &Expert::down}) {
      total += measure(before.*member, after.*member, false).sums;
    }
  };
  for (size_t e = 0; e < reference.experts.size(); ++e) add(reference.experts[e], candidate.experts[e]);
  if (reference.shared && candidate.shared) add(reference.shared->expert, candidate.shared->expert);
  return total;
}

}  // namespace fourfold
