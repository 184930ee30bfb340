// Grouped multiplication, written to be read.
//
// Rows of a group are taken a tile at a time, decoded to float32 and transposed; then every output column
// decodes its weight row once and walks along k, a few columns beside each other where the tile is narrow.
// The innermost loops run over columns and the rows of the tile, these in vectors: each sum has an
// accumulator of its own, so that additions need not wait for each other and the order of a single sum stays.
#include "reference/grouped_multiply.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "base/avx2.h"
#include "base/thread_scratch.h"
#include "fourfold/scale_layout.h"

namespace fourfold::reference {
namespace {

constexpr int kWideTile = 32;   // rows; eight SSE registers of float accumulators
constexpr int kNarrowTile = 4;  // for groups of a few rows

/// Output columns whose sums are walked together: as many as a wide tile of floats has accumulators for.
template <class Sum, int kRows>
constexpr int columns_together() {
  return std::max(kWideTile * static_cast<int>(sizeof(float)) / (kRows * static_cast<int>(sizeof(Sum))), 1);
}

/// Work below this many multiplications stays on one thread: waking the others would take longer.
constexpr int64_t kWorthThreads = 100'000;

/// Up to kRows rows of activations in float32: values[(k * terms + term) * kRows + row]. Missing rows are
/// zero.
struct ActivationTile {
  int64_t first_row = 0;
  int64_t rows = 0;
  int terms = 1;
  std::vector<float> values;
};

/// Where a group's rows and scales start.
struct ScaleRows {
  int64_t group_first_row = 0;    // in `a`
  int64_t group_first_scale = 0;  // in bytes from `a.scales`
};

int64_t row_major_stride(const ActivationView& a) {
  return a.scale_stride ? a.scale_stride : a.cols / 16;
}

/// One NVFP4 term of `a` as a matrix of the rows of one group, which is what the swizzled layout is defined
/// on.
BlockScaledView term_of_group(const ActivationView& a, MatrixView<const uint8_t> codes, const uint8_t* scales,
                              const ScaleRows& group, int64_t rows) {
  return {QuantFormat::kNvfp4,
          rows,
          a.cols,
          codes.rows_from(group.group_first_row, rows),
          scales + group.group_first_scale,
          row_major_stride(a),
          a.scale_layout,
          {}};
}

void decode_activation_row(const ActivationView& a, const ScaleRows& group, int64_t row, int term,
                           float* out) {
  switch (a.format) {
    case ActivationFormat::kBf16:
      for (int64_t k = 0; k < a.cols; ++k) out[k] = static_cast<float>(a.values(row, k));
      return;
    case ActivationFormat::kFp8:
      for (int64_t k = 0; k < a.cols; ++k) out[k] = decode_e4m3(a.codes(row, k));
      return;
    case ActivationFormat::kNvfp4:
    case ActivationFormat::kNvfp4x2: {
      const int64_t row_in_group = row - group.group_first_row;
      const auto& codes = term == 0 ? a.codes : a.residual_codes;
      const uint8_t* scales = term == 0 ? a.scales : a.residual_scales;
      decode_row(term_of_group(a, codes, scales, group, row_in_group + 1), row_in_group, out);
      return;
    }
  }
}

template <int kRows>
void load_tile(const ActivationView& a, const ScaleRows& group, ActivationTile& tile) {
  tile.values.assign(static_cast<size_t>(a.cols * tile.terms * kRows), 0.0f);
  ThreadScratch scratch(a.cols);
#pragma omp parallel if (tile.rows * a.cols > kWorthThreads)
  {
    const std::span<float> row = scratch.mine();
#pragma omp for schedule(static)
    for (int64_t r = 0; r < tile.rows; ++r) {
      for (int term = 0; term < tile.terms; ++term) {
        decode_activation_row(a, group, tile.first_row + r, term, row.data());
        for (int64_t k = 0; k < a.cols; ++k) {
          tile.values[static_cast<size_t>((k * tile.terms + term) * kRows + r)] = row[static_cast<size_t>(k)];
        }
      }
    }
  }
}

// Sanitizers leave these loops alone, in which their tests would spend half of their time: the caller checks
// what is read as a whole.
#define FOURFOLD_NOT_SANITIZED __attribute__((no_sanitize("address", "undefined")))

/// sums[c][r] = sum over k and terms of weights[c * depth + k] * values[(k * kTerms + term) * kRows + r], in
/// that order. A vector holds kBytes of rows' sums.
template <int kTerms, int kBytes, class Sum, int kColumns, int kRows>
FOURFOLD_INLINE FOURFOLD_NOT_SANITIZED void walk_along_k(const float* weights, const float* values,
                                                         int64_t depth, Sum (&sums)[kColumns][kRows]) {
  constexpr int kLanes = std::min(kBytes / static_cast<int>(sizeof(Sum)), kRows), kVectors = kRows / kLanes;
  using Values [[gnu::vector_size(kLanes * sizeof(float))]] = float;
  using Vector [[gnu::vector_size(kLanes * sizeof(Sum))]] = Sum;
  Vector accumulators[kColumns][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    for (int term = 0; term < kTerms; ++term, values += kRows) {
      Vector rows[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        Values of_rows;
        std::memcpy(&of_rows, values + v * kLanes, sizeof(of_rows));
        rows[v] = __builtin_convertvector(of_rows, Vector);
      }
      for (int c = 0; c < kColumns; ++c) {
        const Sum factor = weights[c * depth + k];
        for (int v = 0; v < kVectors; ++v) accumulators[c][v] += factor * rows[v];
      }
    }
  }
  std::memcpy(sums, accumulators, sizeof(sums));
}

#if FOURFOLD_HAS_AVX2_LOOPS
template <int kTerms, class Sum, int kColumns, int kRows>
FOURFOLD_AVX2_LOOP FOURFOLD_NOT_SANITIZED void walk_along_k_avx2(const float* weights, const float* values,
                                                                 int64_t depth,
                                                                 Sum (&sums)[kColumns][kRows]) {
  walk_along_k<kTerms, 32>(weights, values, depth, sums);
}
#endif

template <int kTerms, class Sum, int kColumns, int kRows>
FOURFOLD_NOT_SANITIZED void dot_rows(const float* weights, const ActivationTile& tile, int64_t depth,
                                     Sum (&sums)[kColumns][kRows]) {
#if FOURFOLD_HAS_AVX2_LOOPS
  if (has_avx2()) return walk_along_k_avx2<kTerms>(weights, tile.values.data(), depth, sums);
#endif
  walk_along_k<kTerms, 16>(weights, tile.values.data(), depth, sums);
}

float activation_scale(const ActivationView& a, int64_t row, size_t group) {
  if (!a.row_scales.empty()) return a.row_scales[static_cast<size_t>(row)];
  return a.group_scales.empty() ? 1.0f : a.group_scales[group];
}

void store(const OutputView& d, int64_t row, int64_t col, float value) {
  if (const auto* bf16 = std::get_if<MatrixView<Bf16>>(&d)) {
    (*bf16)(row, col) = encode_bf16(value);
  } else {
    std::get<MatrixView<float>>(d)(row, col) = value;
  }
}

template <class Sum, int kRows>
void multiply_tile(const GroupedMultiply& args, size_t group, const ActivationTile& tile) {
  const GroupWeight& b = args.weights[group];
  const int64_t depth = args.a.cols, columns = rows_of(*b.weight);
  if (tile.values.size() != static_cast<size_t>(depth * tile.terms * kRows)) {
    throw std::logic_error("multiply_tile: the tile has another size than these rows");
  }
  const float weight_global = args.dequantize_weights ? 1.0f : global_multiplier(*b.weight);
  std::vector<float> bias;
  if (b.bias) {
    bias.resize(static_cast<size_t>(columns));
    decode_row(*b.bias, 0, bias.data());
  }
  constexpr int kTogether = columns_together<Sum, kRows>();
  ThreadScratch scratch(kTogether * depth);
#pragma omp parallel if (tile.rows * columns * depth > kWorthThreads)
  {
    const std::span<float> weights = scratch.mine();
    Sum sums[kTogether][kRows];
#pragma omp for schedule(static)
    for (int64_t first = 0; first < columns; first += kTogether) {
      const int64_t together = std::min<int64_t>(columns - first, kTogether);
      for (int64_t c = 0; c < together; ++c) {
        float* const weight = weights.data() + c * depth;
        if (args.dequantize_weights) {
          dequantize_row(*b.weight, first + c, weight);
        } else {
          decode_row(*b.weight, first + c, weight);
        }
      }
      if (tile.terms == 1) {
        dot_rows<1>(weights.data(), tile, depth, sums);
      } else {
        dot_rows<2>(weights.data(), tile, depth, sums);
      }
      for (int64_t r = 0; r < tile.rows; ++r) {
        const int64_t row = tile.first_row + r;
        const float alpha = activation_scale(args.a, row, group) * weight_global;
        for (int64_t c = 0; c < together; ++c) {
          const int64_t n = first + c;
          const float value = alpha * static_cast<float>(sums[c][r]);
          store(args.d, row, n, bias.empty() ? value : value + bias[static_cast<size_t>(n)]);
        }
      }
    }
  }
}

template <class Sum, int kRows>
void multiply_next_rows(const GroupedMultiply& args, size_t group, const ScaleRows& scale_rows,
                        ActivationTile& tile) {
  load_tile<kRows>(args.a, scale_rows, tile);
  multiply_tile<Sum, kRows>(args, group, tile);
}

template <class Sum>
void multiply_groups(const GroupedMultiply& args) {
  const std::vector<int64_t> padded_rows = padded_group_rows(args.group_offsets);
  const int64_t k_sf = args.a.cols / 16;
  ActivationTile tile;
  tile.terms = args.a.format == ActivationFormat::kNvfp4x2 ? 2 : 1;
  for (size_t group = 0; group < args.weights.size(); ++group) {
    const int64_t begin = args.group_offsets[group], end = args.group_offsets[group + 1];
    const ScaleRows scale_rows{begin, args.a.scale_layout == ScaleLayout::kRowMajor
                                          ? begin * row_major_stride(args.a)
                                          : padded_rows[group] * round_up(k_sf, kScaleTileCols)};
    for (tile.first_row = begin; tile.first_row < end; tile.first_row += tile.rows) {
      tile.rows = std::min<int64_t>(end - tile.first_row, kWideTile);
      if (tile.rows > kNarrowTile) {
        multiply_next_rows<Sum, kWideTile>(args, group, scale_rows, tile);
      } else {
        multiply_next_rows<Sum, kNarrowTile>(args, group, scale_rows, tile);
      }
    }
  }
}

}  // namespace

void multiply(const GroupedMultiply& args) {
  if (args.accumulation == Accumulation::kFloat32) {
    multiply_groups<float>(args);
  } else {
    multiply_groups<double>(args);
  }
}

}  // namespace fourfold::reference
