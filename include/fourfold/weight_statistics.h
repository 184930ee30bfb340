// What stored weights look like, counted byte by byte: how often each block scale and each code occurs,
// blocks of zeros, numbers that are none. Counting alone; fourfold/inspection.h judges.
//
// Nothing here allocates or throws, so that it may run in a parallel region.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <utility>

#include "fourfold/block_scaled.h"
#include "fourfold/export.h"

namespace FOURFOLD_EXPORT fourfold {

/// Block scales, counted by their byte.
struct ScaleCounts {
  ScaleType type = ScaleType::kE4m3;
  std::array<int64_t, 256> by_byte = {};

  void add(const ScaleCounts& other);

  int64_t total() const;
  int64_t nan() const;
  int64_t negative() const;   ///< sign bit set, -0 among them, NaN not; e8m0 has no sign
  int64_t zero() const;       ///< +0; e8m0 has no zero
  int64_t subnormal() const;  ///< e4m3 below 2^-6, zero not among them; e8m0: 2^-127
  int64_t saturated() const;  ///< e4m3's 448; e8m0 has no largest that quantizers clamp to: none
  /// The smallest value that at least `part` of the scales from +0 do not exceed: 0 is their smallest, 0.5
  /// their median, 1 their largest. nullopt where there are none.
  std::optional<float> quantile(double part) const;
};

/// 4-bit codes of the rows that were read, counted by code, and their blocks.
struct CodeCounts {
  std::array<int64_t, 16> by_code = {};
  int64_t blocks = 0;
  int64_t zero_blocks = 0;  ///< of those, all of whose codes are +0 or -0
  int64_t lost_blocks = 0;  ///< of those, whose scale is zero and some code is not: underflow took them

  void add(const CodeCounts& other);
  int64_t total() const;
};

/// Values of a matrix that has no blocks of 4-bit codes: dense, or FP8, of which codes alone are looked at.
struct ValueCounts {
  int64_t values = 0;
  int64_t zeros = 0;
  int64_t non_finite = 0;  ///< NaN or infinity
  float largest = 0.0f;    ///< finite magnitude; of FP8, of a code without its scale

  void add(const ValueCounts& other);
};

/// Counts every byte of `scales`, in whatever layout they lie.
ScaleCounts count_scales(ScaleType type, MatrixView<const uint8_t> scales);
/// The scales of a matrix's blocks, without the padding of a swizzled layout. `matrix` must lie on the host.
ScaleCounts count_scales(const BlockScaledView& matrix);

bool is_nan_scale(ScaleType type, uint8_t byte);
/// -0 included: no writer means it.
bool is_negative_scale(ScaleType type, uint8_t byte);
/// Row and column of the first byte of `scales` that `is` holds for.
std::optional<std::pair<int64_t, int64_t>> find_scale(ScaleType type, MatrixView<const uint8_t> scales,
                                                      bool (*is)(ScaleType, uint8_t));

/// A part of a large matrix: runs of neighbouring rows, long enough to be worth a disk's while, of every
/// `one_in` of which the first is read. 1: all rows.
struct RowSample {
  int64_t one_in = 1;

  /// Rows in a run of rows of `row_bytes`.
  static int64_t run_of(int64_t row_bytes);
};

/// `matrix` must lie on the host; its scales row-major.
CodeCounts count_codes(const BlockScaledView& matrix, RowSample sample = {});

/// The same of NVFP4 stored transposed, as fused exports are: `codes` [K/2, out], two k a byte, and `scales`
/// [K/16, out]. Whole rows of blocks are sampled.
CodeCounts count_transposed_codes(MatrixView<const uint8_t> codes, MatrixView<const uint8_t> scales,
                                  RowSample sample = {});

ValueCounts count_values(const DenseView& matrix, RowSample sample = {});
ValueCounts count_values(const Fp8View& matrix, RowSample sample = {});

}  // namespace fourfold
