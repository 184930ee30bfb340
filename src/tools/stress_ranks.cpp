#include "tools/stress_ranks.h"

#include <fmt/format.h>

namespace fourfold {
namespace {

int64_t element_bytes(ElementType type) {
  return type == ElementType::kF32 ? 4 : 2;
}

BlockScaledView rows_of_matrix(BlockScaledView matrix, int64_t first, int64_t count) {
  matrix.codes = matrix.codes.rows_from(first, count);
  matrix.scales += first * matrix.scale_stride;
  matrix.rows = count;
  return matrix;
}

BlockScaledView cols_of_matrix(BlockScaledView matrix, int64_t first, int64_t count) {
  matrix.codes = matrix.codes.cols_from(first / 2, count / 2);
  matrix.scales += first / traits_of(matrix.format).block_size;
  matrix.cols = count;
  return matrix;
}

void cut_bias(std::optional<DenseView>& bias, int64_t first, int64_t count) {
  if (!bias) return;
  bias->data += first * element_bytes(bias->type);
  bias->cols = count;
}

void drop_shared(StressSubject& rank) {
  rank.weights.shared.reset();
  rank.config.shared_intermediate = 0;
}

}  // namespace

std::string why_not_tensor_parallel(const StressSubject& whole, int64_t degree) {
  if (whole.config.intermediate % (16 * degree) != 0) {
    return fmt::format("I {} is not {} parts of whole blocks of 16", whole.config.intermediate, degree);
  }
  for (const Expert& expert : whole.weights.experts) {
    for (const WeightView* weight : {&expert.gate, &expert.up, &expert.down}) {
      if (rows_of(*weight) == 0) continue;  // no gate
      const auto* matrix = std::get_if<BlockScaledView>(weight);
      if (matrix == nullptr || matrix->format != QuantFormat::kNvfp4) return "not all matrices are NVFP4";
      if (matrix->scale_layout != ScaleLayout::kRowMajor) return "swizzled scales can't be cut in place";
    }
  }
  return "";
}

StressSubject tensor_parallel_rank(const StressSubject& whole, int64_t rank, int64_t degree) {
  StressSubject part = whole;
  const int64_t count = whole.config.intermediate / degree, first = rank * count;
  part.name = fmt::format("rank {} of {}", rank, degree);
  part.config.intermediate = part.weights.intermediate = count;
  for (Expert& expert : part.weights.experts) {
    for (WeightView* weight : {&expert.gate, &expert.up}) {
      if (rows_of(*weight) > 0) *weight = rows_of_matrix(std::get<BlockScaledView>(*weight), first, count);
    }
    expert.down = cols_of_matrix(std::get<BlockScaledView>(expert.down), first, count);
    cut_bias(expert.gate_bias, first, count);
    cut_bias(expert.up_bias, first, count);
    if (rank > 0) expert.down_bias.reset();
  }
  if (rank > 0) drop_shared(part);
  return part;
}

StressSubject expert_parallel_rank(const StressSubject& whole, int64_t first, int64_t count) {
  StressSubject part = whole;
  part.name = fmt::format("experts {} to {}", first, first + count - 1);
  part.config.experts = count;
  const auto begin = whole.weights.experts.begin() + first;
  part.weights.experts.assign(begin, begin + count);
  if (first > 0) drop_shared(part);
  return part;
}

}  // namespace fourfold
