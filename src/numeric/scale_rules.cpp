// Rules that choose block scales.
#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "fourfold/quantize.h"
#include "numeric/block_quantizer.h"

namespace fourfold {
namespace {

constexpr std::array<std::pair<ScaleRule, std::string_view>, 3> kRules = {{
    {ScaleRule::kAmax, "amax"},
    {ScaleRule::kFourOverSix, "four-over-six"},
    {ScaleRule::kMse, "mse"},
}};

/// Codes of e4m3 to an octave: the mse rule looks that far to either side.
constexpr int kOctave = 8;

/// One block with a scale that was chosen for it.
struct Candidate {
  uint8_t scale;
  double error = 0.0;
  std::array<uint8_t, kNvfp4Block / 2> codes = {};
};

Candidate quantize_with(const float* x, float global, uint8_t scale) {
  Candidate candidate{.scale = scale};
  const float decoded = decode_e4m3(scale), reciprocal = nvfp4_reciprocal(scale, global);
  for (size_t i = 0; i < kNvfp4Block; ++i) {
    const uint8_t code = encode_e2m1(x[i] * reciprocal);
    candidate.codes[i / 2] = static_cast<uint8_t>(candidate.codes[i / 2] | (code << (4 * (i % 2))));
    const double difference = double{x[i]} - double{(decode_e2m1(code) * decoded) * global};
    candidate.error += difference * difference;
  }
  return candidate;
}

/// Whether a search has anything to choose from: a block of zeros or of NaN has one scale.
bool is_searchable(float amax) {
  return amax > 0.0f && is_finite(amax);
}

Candidate best_of_block(const float* x, float amax, float global, bool modelopt_floor, ScaleRule rule) {
  const uint8_t first = nvfp4_block_scale(amax, global, modelopt_floor);
  Candidate best = quantize_with(x, global, first);
  const auto consider = [&](uint8_t scale) {
    const Candidate other = quantize_with(x, global, scale);
    if (other.error < best.error) best = other;
  };
  if (rule == ScaleRule::kFourOverSix) {
    consider(std::max(encode_e4m3(amax / 4.0f / global), kE4m3SmallestCode));
    return best;
  }
  const int lowest = std::max<int>(first - kOctave, kE4m3SmallestCode);
  const int highest = std::min<int>(first + kOctave, encode_e4m3(kE4m3Max));
  for (int scale = lowest; scale <= highest; ++scale) consider(static_cast<uint8_t>(scale));
  return best;
}

}  // namespace

std::string_view to_string(ScaleRule rule) {
  for (const auto& [entry, name] : kRules) {
    if (entry == rule) return name;
  }
  return "?";
}

std::optional<ScaleRule> parse_scale_rule(std::string_view name) {
  for (const auto& [rule, entry] : kRules) {
    if (entry == name) return rule;
  }
  return std::nullopt;
}

void quantize_weight_row_nvfp4(std::span<const float> x, float global, ScaleRule rule, uint8_t* codes,
                               uint8_t* scales) {
  quantize_row_nvfp4(x, global, ScaleFloor::kModelOpt, rule, codes, scales);
}

void quantize_row_nvfp4(std::span<const float> x, float global, ScaleFloor floor, ScaleRule rule,
                        uint8_t* codes, uint8_t* scales) {
  if (rule == ScaleRule::kAmax) return quantize_row_nvfp4(x, global, floor, codes, scales);
  const bool modelopt_floor = floor == ScaleFloor::kModelOpt;
  for (size_t block = 0; block < x.size() / kNvfp4Block; ++block) {
    const float* values = x.data() + block * kNvfp4Block;
    uint8_t* block_codes = codes + block * kNvfp4Block / 2;
    float amax = 0.0f;
    for (int i = 0; i < kNvfp4Block; ++i) amax = max_magnitude(amax, values[i]);
    if (!is_searchable(amax)) {
      scales[block] = quantize_nvfp4_block(values, global, modelopt_floor, block_codes);
      continue;
    }
    const Candidate best = best_of_block(values, amax, global, modelopt_floor, rule);
    scales[block] = best.scale;
    std::memcpy(block_codes, best.codes.data(), best.codes.size());
  }
}

}  // namespace fourfold
