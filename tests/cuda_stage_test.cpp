// Staging on the GPU gives the reference's bits, but for the signs of zeros where no codes are written; what
// a caller staged is decoded whatever its layout.
#include <cmath>
#include <optional>

#include "cuda/stage.h"
#include "cuda_support.h"
#include "fourfold/reference.h"
#include "fourfold/scale_layout.h"
#include "tools/layer_trace.h"

namespace fourfold {
namespace {

struct StageCase {
  int64_t tokens, cols;
  bool gathered = true, weighted = false;
  Values values = Values::kOrdinary;
  int64_t misaligned = 0;  ///< elements by which the source's rows start and stride too late
  bool ungrouped = false;  ///< all rows, whose number is not read on the device; not gathered
};

struct Format {
  ActivationFormat format;
  ScalePolicy policy = ScalePolicy::kDynamicToken;
};

constexpr Format kFormats[] = {
    {ActivationFormat::kNvfp4, ScalePolicy::kStatic},
    {ActivationFormat::kNvfp4, ScalePolicy::kMaxOverExperts},
    {ActivationFormat::kNvfp4, ScalePolicy::kDynamicTensor},
    {ActivationFormat::kNvfp4, ScalePolicy::kDynamicToken},
    {ActivationFormat::kNvfp4x2, ScalePolicy::kStatic},
    {ActivationFormat::kNvfp4x2, ScalePolicy::kMaxOverExperts},
    {ActivationFormat::kNvfp4x2, ScalePolicy::kDynamicTensor},
    {ActivationFormat::kNvfp4x2, ScalePolicy::kDynamicToken},
    {ActivationFormat::kFp8},
    {ActivationFormat::kBf16},
};

/// Staged rows and what a GEMM reads of them, by the reference.
struct Expected {
  StagedBuffers staged;
  std::vector<Bf16> first, second;
};

std::vector<Bf16> decode(ActivationFormat format, const StagedBuffers& staged, bool residual, int64_t rows,
                         int64_t cols) {
  std::vector<Bf16> decoded;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) {
      const auto at = static_cast<size_t>(row * cols + col);
      if (format == ActivationFormat::kBf16) {
        decoded.push_back(staged.values[at]);
      } else if (format == ActivationFormat::kFp8) {
        decoded.push_back(encode_bf16(decode_e4m3(staged.codes[at])));
      } else {
        const auto& codes = residual ? staged.residual_codes : staged.codes;
        const auto& scales = residual ? staged.residual_scales : staged.scales;
        const auto code = static_cast<uint8_t>(codes[at / 2] >> (4 * (at % 2)));
        decoded.push_back(encode_bf16(decode_e2m1(code) * decode_e4m3(scales[at / 16])));
      }
    }
  }
  return decoded;
}

/// As they are staged where no codes are asked for: zeros of NVFP4 have no sign.
std::vector<Bf16> without_signs_of_zeros(ActivationFormat format, std::vector<Bf16> values) {
  for (Bf16& value : values) {
    if (is_nvfp4(format) && value.bits == 0x8000) value.bits = 0;
  }
  return values;
}

class StageRun {
 public:
  StageRun(const StageCase& c, const Format& format, uint64_t salt)
      : case_(c), format_(format), random_(engine(salt)) {
    x_ = random_rows(random_, c.tokens, c.cols, c.values);
    route();
    stage_on_host();
  }

  void check() {
    const int64_t stride = case_.cols + case_.misaligned;
    std::vector<Bf16> padded(static_cast<size_t>(case_.tokens * stride + case_.misaligned));
    for (int64_t t = 0; t < case_.tokens; ++t) {
      std::copy_n(x_.begin() + t * case_.cols, case_.cols, padded.begin() + t * stride + case_.misaligned);
    }
    const DeviceArray<Bf16> x(padded);
    const DeviceArray<int32_t> offsets(offsets_), slots(slot_of_row_), rows(row_of_slot_);
    const DeviceArray<float> weights(weights_), scales(scales_);
    const auto room = static_cast<size_t>(room_);
    cuda::StageArgs args;
    args.format = format_.format;
    args.policy = format_.policy;
    args.source.rows = {x.data() + case_.misaligned, case_.tokens, case_.cols, stride};
    if (case_.gathered) {
      args.source.slot_of_row = slots.data();
      args.source.top_k = kTopK;
      if (case_.weighted) args.source.weights = weights.matrix(case_.tokens, kTopK);
    }
    if (!case_.ungrouped) args.group_offsets = offsets.span();
    args.max_rows = room_;
    args.expert_scales = scales.data();
    const DeviceArray<float> amax(std::vector<float>{0.0f});
    args.tensor_amax = amax.data();

    for (int repeat = 0; repeat < (case_.cols < 1000 ? 20 : 3); ++repeat) {
      Outputs out(format_.format, room, static_cast<size_t>(case_.cols));
      args.decoded = {out.first.matrix(room_, case_.cols), out.second.matrix(room_, case_.cols),
                      out.row_scales.data()};
      args.staged = repeat == 1 ? StagedActivations{} : out.staged();
      if (format_.policy == ScalePolicy::kDynamicTensor) {
        cuda::find_amax(args.source, offsets.span(), args.max_rows, amax.data(), nullptr);
      }
      args.source.row_of_slot = case_.gathered && repeat % 3 == 0 ? rows.data() : nullptr;
      cuda::stage(args, nullptr);
      compare(out, repeat != 1);
    }
    const bool scaled_by_expert =
        format_.policy == ScalePolicy::kStatic || format_.policy == ScalePolicy::kMaxOverExperts;
    if (case_.gathered && !case_.weighted && scaled_by_expert) check_slots(args);
  }

 private:
  static constexpr int64_t kTopK = 3, kExperts = 5;

  /// Taps of every kind; a byte more a row than they need, so that strides are odd.
  struct Outputs {
    Outputs(ActivationFormat f, size_t rooms, size_t columns)
        : format(f),
          rows(rooms),
          cols(columns),
          first(rows * cols),
          second(rows * cols),
          row_scales(rows),
          values(rows * (cols + 1)),
          codes(rows * (code_bytes() + 1)),
          scales(rows * (cols / 16 + 1)),
          residual_codes(rows * (code_bytes() + 1)),
          residual_scales(rows * (cols / 16 + 1)),
          tapped_row_scales(rows) {}

    size_t code_bytes() const { return format == ActivationFormat::kFp8 ? cols : cols / 2; }
    StagedActivations staged() const {
      const auto odd = [&](const auto& array, size_t width) {
        return array.matrix(static_cast<int64_t>(rows), static_cast<int64_t>(width),
                            static_cast<int64_t>(width) + 1);
      };
      return {odd(values, cols),
              odd(codes, code_bytes()),
              odd(scales, cols / 16),
              odd(residual_codes, code_bytes()),
              odd(residual_scales, cols / 16),
              tapped_row_scales.span()};
    }

    ActivationFormat format;
    size_t rows, cols;
    DeviceArray<Bf16> first, second;
    DeviceArray<float> row_scales;
    DeviceArray<Bf16> values;
    DeviceArray<uint8_t> codes, scales, residual_codes, residual_scales;
    DeviceArray<float> tapped_row_scales;
  };

  /// Rows that are slots: those of the permutation, wherever they lie.
  void check_slots(cuda::StageArgs args) const {
    const DeviceArray<int32_t> ids(ids_);
    const DeviceArray<float> weights(weights_);
    Routing routing;
    routing.topk_ids = MatrixView<const int32_t>(ids.matrix(case_.tokens, kTopK));
    routing.topk_weights = weights.matrix(case_.tokens, kTopK);
    const cuda::RowSource source = {args.source.rows, nullptr, kTopK};
    args.source = source;
    args.source.routing = &routing;
    args.by_slot_of_experts = kExperts;
    args.beside_previous = true;
    args.group_offsets = {};
    args.staged = {};
    const Outputs out(format_.format, static_cast<size_t>(room_), static_cast<size_t>(case_.cols));
    args.decoded = {out.first.matrix(room_, case_.cols), out.second.matrix(room_, case_.cols),
                    out.row_scales.data()};
    const DeviceArray<int32_t> counters(300);
    args.cleared = counters.span();
    cuda::stage(args, nullptr);
    if (case_.tokens > 0) {
      EXPECT_EQ(counters.get(), std::vector<int32_t>(300));
    }
    const auto expected = [&](const std::vector<Bf16>& values) {
      return without_signs_of_zeros(format_.format, values);
    };
    expect_slots("decoded slots", expected(expected_.first), out.first, case_.cols);
    if (!expected_.second.empty())
      expect_slots("second term of slots", expected(expected_.second), out.second, case_.cols);
    expect_slots("scales of slots", expected_.staged.row_scales, out.row_scales, 1);
  }

  template <class T>
  void expect_slots(const char* what, const std::vector<T>& expected, const DeviceArray<T>& found,
                    int64_t width) const {
    const std::vector<T> all = found.get();
    std::vector<T> sorted;
    for (const int32_t slot : std::span(slot_of_row_).first(static_cast<size_t>(rows_))) {
      sorted.insert(sorted.end(), all.begin() + slot * width, all.begin() + (slot + 1) * width);
    }
    expect_written(what, expected, expected.size(), sorted);
    for (size_t slot = 0; slot < row_of_slot_.size(); ++slot) {
      if (row_of_slot_[slot] >= 0) continue;
      const auto row = std::span(all).subspan(slot * static_cast<size_t>(width), static_cast<size_t>(width));
      EXPECT_TRUE(std::all_of(row.begin(), row.end(), [](const T& value) { return is_poison(value); }))
          << what;
    }
  }

  /// M of the slots have a row: some are absent, an expert is empty.
  void route() {
    if (!case_.gathered) {
      room_ = case_.tokens;
      const auto rows = static_cast<int32_t>(case_.tokens - (case_.ungrouped ? 0 : case_.tokens / 3));
      offsets_ = {0, rows / 4, rows / 4, rows / 2, rows, rows};
      if (case_.ungrouped) offsets_ = {0, rows, rows, rows, rows, rows};
    } else {
      room_ = case_.tokens * kTopK;
      ids_.resize(static_cast<size_t>(room_));
      for (int32_t& id : ids_) id = static_cast<int32_t>(below(random_, kExperts)) - 1;  // the last is empty
      weights_.resize(ids_.size());
      for (float& weight : weights_) weight = static_cast<float>(below(random_, 1000)) / 700.0f;
      Routing routing;
      routing.topk_ids = MatrixView<const int32_t>(ids_.data(), case_.tokens, kTopK);
      routing.topk_weights = {weights_.data(), case_.tokens, kTopK};
      const Permutation permutation = permute_by_expert(routing, kExperts);
      offsets_ = permutation.group_offsets;
      slot_of_row_ = permutation.slot_of_row;
      row_of_slot_ = permutation.row_of_slot;
    }
    for (int64_t e = 0; e < kExperts; ++e) {
      scales_.push_back(std::exp2(static_cast<float>(below(random_, 8)) - 10.0f) * 1.3f);
    }
    if (format_.policy == ScalePolicy::kMaxOverExperts) scales_.assign(kExperts, scales_[0]);
    rows_ = offsets_.back();
  }

  void stage_on_host() {
    std::vector<Bf16> rows(static_cast<size_t>(rows_ * case_.cols));
    const MatrixView<Bf16> view(rows.data(), rows_, case_.cols);
    const MatrixView<const Bf16> x(x_.data(), case_.tokens, case_.cols);
    if (case_.gathered) {
      LayerConfig config;
      config.weight_on_input = case_.weighted;
      reference::permute_rows(x, slot_of_row_, {weights_.data(), case_.tokens, kTopK}, config, view);
    } else {
      std::copy_n(x_.begin(), rows.size(), rows.begin());
    }
    expected_.staged = StagedBuffers(format_.format, rows_, case_.cols);
    if (is_nvfp4(format_.format)) {
      reference::activation_scales(format_.policy, view, offsets_, scales_,
                                   expected_.staged.views.row_scales);
    }
    reference::stage(format_.format, view, expected_.staged.views);
    expected_.first = decode(format_.format, expected_.staged, false, rows_, case_.cols);
    if (format_.format == ActivationFormat::kNvfp4x2) {
      expected_.second = decode(format_.format, expected_.staged, true, rows_, case_.cols);
    }
  }

  /// `found` rows of width + 1, the last element of each untouched.
  template <class T>
  void expect_tap(const char* what, const std::vector<T>& expected, const DeviceArray<T>& found,
                  int64_t width) const {
    if (expected.empty()) return;
    const std::vector<T> all = found.get();
    std::vector<T> dense;
    for (int64_t row = 0; row < room_; ++row) {
      dense.insert(dense.end(), all.begin() + row * (width + 1), all.begin() + row * (width + 1) + width);
      EXPECT_TRUE(is_poison(all[static_cast<size_t>(row * (width + 1) + width)])) << what;
    }
    expect_written(what, expected, expected.size(), dense);
  }

  void compare(const Outputs& out, bool tapped) const {
    const bool bf16 = format_.format == ActivationFormat::kBf16;
    const auto decoded = [&](const std::vector<Bf16>& values) {
      return tapped ? values : without_signs_of_zeros(format_.format, values);
    };
    expect_written("decoded", decoded(expected_.first), expected_.first.size(), out.first.get());
    expect_written("second term", decoded(expected_.second), expected_.second.size(), out.second.get());
    if (!bf16) {
      expect_written("row scales", expected_.staged.row_scales, expected_.staged.row_scales.size(),
                     out.row_scales.get());
    }
    if (!tapped) return;
    const StagedBuffers& staged = expected_.staged;
    const auto codes = static_cast<int64_t>(out.code_bytes());
    expect_tap("values", staged.values, out.values, case_.cols);
    expect_tap("codes", staged.codes, out.codes, codes);
    expect_tap("scales", staged.scales, out.scales, case_.cols / 16);
    expect_tap("residual codes", staged.residual_codes, out.residual_codes, codes);
    expect_tap("residual scales", staged.residual_scales, out.residual_scales, case_.cols / 16);
    if (!bf16) {
      expect_written("tapped row scales", staged.row_scales, staged.row_scales.size(),
                     out.tapped_row_scales.get());
    }
  }

  StageCase case_;
  Format format_;
  Engine random_;
  int64_t rows_ = 0, room_ = 0;
  std::vector<Bf16> x_;
  std::vector<int32_t> ids_, offsets_, slot_of_row_, row_of_slot_;
  std::vector<float> weights_, scales_;
  Expected expected_;
};

TEST(Stage, EqualsTheReferenceInEveryFormatAndPolicy) {
  const StageCase cases[] = {
      {1, 16},
      {7, 48, false},
      {33, 272, true, true},
      {19, 2880},
      {40, 768, false, false, Values::kHostile},
      {64, 512, true, false, Values::kHostile},
      {64, 528, true, true, Values::kHostile},
      {9, 7168, true, true},
      {12, 7168, false},
      {11, 336, true, false, Values::kHostile, 3},  // rows that no vector load may touch
      {3000, 64},
      {0, 64},
      {70, 2064, false, false, Values::kHostile, 0, true},
      {5, 7168, false, false, Values::kOrdinary, 3, true},
  };
  uint64_t salt = 1000;
  for (const StageCase& c : cases) {
    for (const Format& format : kFormats) {
      SCOPED_TRACE(testing::Message() << c.tokens << " x " << c.cols << (c.gathered ? ", gathered" : "")
                                      << (c.weighted ? ", weighted" : "") << ", " << to_string(format.format)
                                      << ", " << to_string(format.policy));
      StageRun(c, format, ++salt).check();
    }
  }
}

// ---- activations that a caller brings ----

/// Staged by the reference, then handed over with every layout that ActivationView has.
struct BroughtCase {
  ActivationFormat format;
  ScaleLayout layout = ScaleLayout::kRowMajor;
  enum Global { kNone, kByRow, kByGroup } global = kByRow;
  int64_t extra_stride = 0;
  bool grouped = true;
};

class BroughtActivations {
 public:
  static constexpr int64_t kRows = 301, kCols = 336, kSf = kCols / 16;

  explicit BroughtActivations(const BroughtCase& c, uint64_t salt) : case_(c) {
    Engine random = engine(salt);
    const std::vector<Bf16> x = random_rows(random, kRows, kCols, Values::kHostile);
    staged_ = StagedBuffers(c.format, kRows, kCols);
    for (size_t i = 0; i < staged_.row_scales.size(); ++i)
      staged_.row_scales[i] = 0.01f + 0.001f * static_cast<float>(i);
    reference::stage(c.format, {x.data(), kRows, kCols}, staged_.views);
    offsets_ = c.grouped ? std::vector<int32_t>{0, 130, 130, 131, 200, 301}
                         : std::vector<int32_t>{0, static_cast<int32_t>(kRows)};
  }

  void check() {
    const ActivationFormat format = case_.format;
    const int64_t width = format == ActivationFormat::kFp8 ? kCols : kCols / 2;
    const DeviceArray<int32_t> offsets(offsets_);
    const DeviceArray<Bf16> values(strided(staged_.values, kCols));
    const DeviceArray<uint8_t> codes(strided(staged_.codes, width)), scales(laid_out(staged_.scales)),
        residual_codes(strided(staged_.residual_codes, width)),
        residual_scales(laid_out(staged_.residual_scales));
    const std::vector<float> group_scales = {0.5f, 0.25f, 3.0f, 0.1f, 7.0f};
    const DeviceArray<float> row_globals(staged_.row_scales), group_globals(group_scales);

    ActivationView a;
    a.format = format;
    a.rows = kRows;
    a.cols = kCols;
    a.values = values.matrix(kRows, kCols, kCols + case_.extra_stride);
    a.codes = codes.matrix(kRows, width, width + case_.extra_stride);
    a.residual_codes = residual_codes.matrix(kRows, width, width + case_.extra_stride);
    a.scales = scales.data();
    a.residual_scales = residual_scales.data();
    a.scale_layout = case_.layout;
    a.scale_stride = case_.extra_stride == 0 ? 0 : kSf + case_.extra_stride;
    if (case_.global == BroughtCase::kByRow) a.row_scales = row_globals.span();
    if (case_.global == BroughtCase::kByGroup) a.group_scales = group_globals.span();

    const DeviceArray<Bf16> first(kRows * kCols), second(kRows * kCols);
    const DeviceArray<float> found_scales(kRows);
    const std::span<const int32_t> groups =
        case_.grouped ? std::span<const int32_t>(offsets.span()) : std::span<const int32_t>();
    constexpr int64_t kCut = 77;  // in two parts
    for (const auto& [first_row, rows] : {std::pair<int64_t, int64_t>(0, kCut), {kCut, kRows - kCut}}) {
      cuda::decode_staged(
          a, groups, first_row, rows,
          {first.matrix(kRows, kCols).rows_from(first_row, rows),
           second.matrix(kRows, kCols).rows_from(first_row, rows), found_scales.data() + first_row},
          nullptr);
    }
    expect_written("decoded", decode(format, staged_, false, kRows, kCols), kRows * kCols, first.get());
    const bool two = format == ActivationFormat::kNvfp4x2;
    expect_written("second term", two ? decode(format, staged_, true, kRows, kCols) : std::vector<Bf16>(),
                   two ? kRows * kCols : 0, second.get());
    expect_written("row scales", global_of_rows(group_scales), kRows, found_scales.get());
  }

 private:
  template <class T>
  std::vector<T> strided(const std::vector<T>& dense, int64_t width) const {
    std::vector<T> result;
    for (size_t row = 0; row * static_cast<size_t>(width) < dense.size(); ++row) {
      const auto begin = dense.begin() + static_cast<int64_t>(row) * width;
      result.insert(result.end(), begin, begin + width);
      result.resize(result.size() + static_cast<size_t>(case_.extra_stride));
    }
    return result;
  }

  /// Padding of the swizzled layout is NaN: it must not be read as data.
  std::vector<uint8_t> laid_out(const std::vector<uint8_t>& dense) const {
    if (case_.layout == ScaleLayout::kRowMajor || dense.empty()) return strided(dense, kSf);
    const std::vector<uint8_t> ones(dense.size(), 1);
    std::vector<uint8_t> swizzled = swizzle_scale_groups({dense.data(), kRows, kSf}, offsets_);
    const std::vector<uint8_t> used = swizzle_scale_groups({ones.data(), kRows, kSf}, offsets_);
    for (size_t i = 0; i < used.size(); ++i) {
      if (used[i] == 0) swizzled[i] = kE4m3NanCode;
    }
    return swizzled;
  }

  std::vector<float> global_of_rows(const std::vector<float>& group_scales) const {
    if (case_.global == BroughtCase::kByRow) return staged_.row_scales;
    std::vector<float> globals(kRows, 1.0f);
    if (case_.global == BroughtCase::kNone) return globals;
    for (size_t group = 0; group + 1 < offsets_.size(); ++group) {
      std::fill(globals.begin() + offsets_[group], globals.begin() + offsets_[group + 1],
                group_scales[group]);
    }
    return globals;
  }

  BroughtCase case_;
  StagedBuffers staged_;
  std::vector<int32_t> offsets_;
};

TEST(DecodeStaged, ReadsEveryLayout) {
  using enum ActivationFormat;
  using Brought = BroughtCase;
  const BroughtCase cases[] = {
      {kNvfp4},
      {kNvfp4, ScaleLayout::kRowMajor, Brought::kByGroup, 5},
      {kNvfp4, ScaleLayout::kSwizzled128x4},
      {kNvfp4, ScaleLayout::kSwizzled128x4, Brought::kNone, 0, false},
      {kNvfp4x2, ScaleLayout::kRowMajor, Brought::kNone, 3},
      {kNvfp4x2, ScaleLayout::kSwizzled128x4, Brought::kByGroup},
      {kFp8},
      {kFp8, ScaleLayout::kRowMajor, Brought::kByGroup, 1},
  };
  uint64_t salt = 2000;
  for (const BroughtCase& c : cases) {
    SCOPED_TRACE(testing::Message() << to_string(c.format) << ", layout " << static_cast<int>(c.layout)
                                    << ", global " << c.global << ", extra stride " << c.extra_stride);
    BroughtActivations(c, ++salt).check();
  }
}

}  // namespace
}  // namespace fourfold
