#include "tools/candidate_staging.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "base/fail.h"
#include "fourfold/number_formats.h"
#include "fourfold/quantize.h"
#include "fourfold/scale_layout.h"

namespace fourfold {
namespace {

/// |values - c * found| / |values| over all rows, with the best c for each of them: its global scale.
class Distance {
 public:
  void add(double value, double found) {
    norm_ += value * value;
    found_ += found * found;
    product_ += value * found;
  }
  void end_row() {
    if (!std::isfinite(found_)) is_finite_ = false;
    all_ += norm_;
    left_ += found_ == 0.0 ? norm_ : std::max(0.0, norm_ - product_ * product_ / found_);
    norm_ = found_ = product_ = 0.0;
  }
  double get() const {
    if (!is_finite_) return INFINITY;
    return left_ == 0.0 ? 0.0 : std::sqrt(left_ / all_);
  }

 private:
  double norm_ = 0.0, found_ = 0.0, product_ = 0.0;  // of the row
  double all_ = 0.0, left_ = 0.0;
  bool is_finite_ = true;
};

double decoded(uint8_t pair, int64_t k, uint8_t scale) {
  return double{decode_e2m1(k % 2 == 0 ? pair & 15 : pair >> 4)} * decode_e4m3(scale);
}

template <class Offset>
double distance_with(std::span<const float> values, int64_t width, const DumpedTensor& codes,
                     const DumpedTensor& scales, Offset offset) {
  Distance distance;
  for (int64_t i = 0; i < static_cast<int64_t>(values.size()); ++i) {
    const auto pair = static_cast<uint8_t>(codes.bytes[static_cast<size_t>(i / 2)]);
    const int64_t at = offset(i / width, i % width / 16);
    distance.add(double{values[static_cast<size_t>(i)]},
                 decoded(pair, i, static_cast<uint8_t>(scales.bytes[static_cast<size_t>(at)])));
    if ((i + 1) % width == 0) distance.end_row();
  }
  return distance.get();
}

/// What the specification's quantizer leaves, with a global scale for each row.
double due_distance(std::span<const float> values, int64_t width) {
  Distance distance;
  std::vector<uint8_t> codes(static_cast<size_t>(width / 2)), scales(static_cast<size_t>(width / 16));
  for (size_t first = 0; first < values.size(); first += static_cast<size_t>(width)) {
    const std::span row = values.subspan(first, static_cast<size_t>(width));
    float amax = 0.0f;
    for (const float value : row) amax = std::max(amax, std::abs(value));
    const float global = nvfp4_global_scale(amax);
    quantize_row_nvfp4(row, global, ScaleFloor::kNone, codes.data(), scales.data());
    for (int64_t k = 0; k < width; ++k) {
      distance.add(double{row[static_cast<size_t>(k)]},
                   double{global} *
                       decoded(codes[static_cast<size_t>(k / 2)], k, scales[static_cast<size_t>(k / 16)]));
    }
    distance.end_row();
  }
  return distance.get();
}

[[noreturn]] void bad_size(const DumpedTensor& tensor, const std::string& name, const std::string& expected) {
  fail(ErrorCode::kBadFile, "{}: tensor '{}': expected {}, found {}", tensor.file, name, expected,
       tensor.describe());
}

}  // namespace

StagedReport compare_staged(const std::string& what, std::span<const float> values, int64_t width,
                            const DumpedTensor& codes, const DumpedTensor& scales) {
  const int64_t rows = static_cast<int64_t>(values.size()) / width, blocks = width / 16;
  const auto scale_bytes = static_cast<int64_t>(scales.bytes.size());
  const std::string shape = fmt::format("U8 [{}, {}]", rows, width / 2);
  if (width % 16 != 0) bad_size(codes, what + "_codes", "rows in blocks of 16");
  if (static_cast<int64_t>(codes.bytes.size()) != rows * width / 2) bad_size(codes, what + "_codes", shape);
  std::vector<std::pair<double, std::string>> ranked;
  const auto try_layout = [&](const std::string& layout, auto offset) {
    ranked.emplace_back(distance_with(values, width, codes, scales, offset), layout);
  };
  if (scale_bytes == rows * blocks) {
    try_layout("row-major", [&](int64_t row, int64_t block) { return row * blocks + block; });
    try_layout("transposed", [&](int64_t row, int64_t block) { return block * rows + row; });
  }
  if (scale_bytes == swizzled_scale_bytes(rows, blocks)) {
    const int64_t across = round_up(blocks, kScaleTileCols);
    try_layout("swizzled 128x4",
               [&](int64_t row, int64_t block) { return swizzled_scale_offset(row, block, blocks); });
    try_layout("row-major, padded", [&](int64_t row, int64_t block) { return row * across + block; });
  }
  if (ranked.empty()) {
    bad_size(scales, what + "_scales",
             fmt::format("{} bytes, or {} in the 128x4 layout", rows * blocks,
                         swizzled_scale_bytes(rows, blocks)));
  }
  std::sort(ranked.begin(), ranked.end());
  return {what,
          ranked[0].second,
          ranked[0].first,
          ranked[1].second,
          ranked[1].first,
          due_distance(values, width)};
}

}  // namespace fourfold
