// Permutation by expert: a stable counting sort of slots.
#include "fourfold/routing.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "base/fail.h"

namespace fourfold {
namespace {

/// Checks shapes before anything is sized by them.
void validate(const Routing& routing, int64_t experts) {
  const int64_t tokens = routing.tokens(), top_k = routing.top_k();
  if (experts < 0 || experts >= std::numeric_limits<int32_t>::max()) {
    reject("routing: experts", "a number from 0 below 2^31 - 1", experts);
  }
  std::visit(
      [&](const auto& ids) {
        if (ids.rows != tokens || ids.cols != top_k) {
          reject("topk_ids", shape_text(tokens, top_k) + " like topk_weights",
                 shape_text(ids.rows, ids.cols));
        }
      },
      routing.topk_ids);
  int64_t slots = 0;
  if (tokens < 0 || top_k < 0 || __builtin_mul_overflow(tokens, top_k, &slots) ||
      slots > std::numeric_limits<int32_t>::max()) {
    reject("routing", "at most 2^31 - 1 slots", fmt::format("{} tokens x {}", tokens, top_k));
  }
}

/// This rank's number of slot's expert; kAbsentExpert, or something that is no expert, where it has none.
int64_t local_expert(const Routing& routing, int64_t slot) {
  constexpr int64_t kNoExpert = -2;
  const int64_t expert = routing.expert(slot / routing.top_k(), slot % routing.top_k());
  if (routing.local_experts.empty() || expert == kAbsentExpert) return expert;
  const auto known = static_cast<int64_t>(routing.local_experts.size());
  return expert >= 0 && expert < known ? routing.local_experts[static_cast<size_t>(expert)] : kNoExpert;
}

}  // namespace

std::vector<int32_t> local_expert_range(int64_t first, int64_t count, int64_t experts) {
  if (first < 0 || count < 0 || first > experts || count > experts - first) {
    reject("expert range", fmt::format("a part of the {} experts", experts),
           fmt::format("{} from {}", count, first));
  }
  std::vector<int32_t> local(static_cast<size_t>(experts), int32_t{kAbsentExpert});
  std::iota(local.begin() + first, local.begin() + first + count, 0);
  return local;
}

int64_t Routing::expert(int64_t token, int64_t k) const {
  return std::visit([&](const auto& ids) { return static_cast<int64_t>(ids(token, k)); }, topk_ids);
}

int32_t permute_by_expert(const Routing& routing, const PermutationView& out) {
  const int64_t tokens = routing.tokens(), top_k = routing.top_k();
  const int64_t experts = static_cast<int64_t>(out.group_offsets.size()) - 1;
  validate(routing, experts);
  const auto slots = static_cast<size_t>(tokens * top_k);
  if (out.slot_of_row.size() < slots || out.row_of_slot.size() < slots) {
    reject("permutation", fmt::format("room for {} slots", slots),
           fmt::format("{} and {}", out.slot_of_row.size(), out.row_of_slot.size()));
  }
  int32_t status = kStatusOk;
  const auto present = [&](int64_t expert) { return expert >= 0 && expert < experts; };

  std::fill(out.group_offsets.begin(), out.group_offsets.end(), 0);
  for (int64_t slot = 0; slot < tokens * top_k; ++slot) {
    const int64_t expert = local_expert(routing, slot);
    if (present(expert)) {
      ++out.group_offsets[static_cast<size_t>(expert + 1)];
    } else if (expert != kAbsentExpert) {
      status |= kStatusExpertOutOfRange;
    }
  }
  for (size_t e = 1; e < out.group_offsets.size(); ++e) out.group_offsets[e] += out.group_offsets[e - 1];

  // Each group's start walks forward as its rows are placed, so that it ends where the next group starts.
  for (int64_t slot = 0; slot < tokens * top_k; ++slot) {
    const int64_t expert = local_expert(routing, slot);
    const int32_t row = present(expert) ? out.group_offsets[static_cast<size_t>(expert)]++ : -1;
    out.row_of_slot[static_cast<size_t>(slot)] = row;
    if (row >= 0) out.slot_of_row[static_cast<size_t>(row)] = static_cast<int32_t>(slot);
  }
  std::copy_backward(out.group_offsets.begin(), out.group_offsets.end() - 1, out.group_offsets.end());
  out.group_offsets.front() = 0;
  return status;
}

Permutation permute_by_expert(const Routing& routing, int64_t experts) {
  validate(routing, experts);
  const auto slots = static_cast<size_t>(routing.tokens() * routing.top_k());
  Permutation permutation;
  permutation.group_offsets.resize(static_cast<size_t>(experts + 1));
  permutation.slot_of_row.resize(slots);
  permutation.row_of_slot.resize(slots);
  permutation.status = permute_by_expert(
      routing, {permutation.group_offsets, permutation.slot_of_row, permutation.row_of_slot});
  permutation.slot_of_row.resize(static_cast<size_t>(permutation.rows()));
  return permutation;
}

void gather_rows(MatrixView<const Bf16> x, std::span<const int32_t> slot_of_row, int64_t top_k,
                 MatrixView<Bf16> rows) {
  for (size_t row = 0; row < slot_of_row.size(); ++row) {
    std::copy_n(x.row(slot_of_row[row] / top_k), x.cols, rows.row(static_cast<int64_t>(row)));
  }
}

void gather_weighted_rows(MatrixView<const Bf16> x, std::span<const int32_t> slot_of_row,
                          MatrixView<const float> topk_weights, MatrixView<Bf16> rows) {
  for (size_t row = 0; row < slot_of_row.size(); ++row) {
    const int64_t token = slot_of_row[row] / topk_weights.cols, k = slot_of_row[row] % topk_weights.cols;
    for (int64_t col = 0; col < x.cols; ++col) {
      const float weighted = topk_weights(token, k) * static_cast<float>(x(token, col));
      rows(static_cast<int64_t>(row), col) = encode_bf16(weighted);
    }
  }
}

}  // namespace fourfold
