#include "checkpoint/finding_text.h"

#include <array>
#include <string_view>
#include <utility>

#include "base/fail.h"

namespace fourfold {
namespace {

constexpr std::array<std::pair<FindingKind, std::string_view>, 19> kKindNames = {{
    {FindingKind::kDamagedFile, "damaged-file"},
    {FindingKind::kMissingTensor, "missing-tensor"},
    {FindingKind::kBadTensor, "bad-tensor"},
    {FindingKind::kUnknownTensor, "unknown-tensor"},
    {FindingKind::kNanScale, "nan-scale"},
    {FindingKind::kNegativeScale, "negative-scale"},
    {FindingKind::kZeroWeights, "zero-weights"},
    {FindingKind::kSaturatedScales, "saturated-scales"},
    {FindingKind::kSubnormalScales, "subnormal-scales"},
    {FindingKind::kNonFiniteWeights, "non-finite-weights"},
    {FindingKind::kBadScale, "bad-scale"},
    {FindingKind::kReciprocalGlobal, "reciprocal-global-scale"},
    {FindingKind::kMissingInputScale, "missing-input-scale"},
    {FindingKind::kBadInputScale, "bad-input-scale"},
    {FindingKind::kReciprocalInputScale, "reciprocal-input-scale"},
    {FindingKind::kMissingRouter, "missing-router"},
    {FindingKind::kMissingSharedExpert, "missing-shared-expert"},
    {FindingKind::kConfigDisagrees, "config-disagrees"},
    {FindingKind::kRefused, "refused"},
}};

}  // namespace

std::string_view to_string(FindingKind kind) {
  for (const auto& [entry, name] : kKindNames) {
    if (entry == kind) return name;
  }
  return "?";
}

std::string nan_scales_text(int64_t count, int64_t total, int64_t row, int64_t block) {
  return fmt::format("{} NaN scale{} of {}, the first at row {}, block {}", count, count == 1 ? "" : "s",
                     total, row, block);
}

Finding finding_of(const Error& error, const Checkpoint& checkpoint, int64_t layer, FindingKind kind) {
  Finding finding{kind, layer, "", "", error.what(), kConvertAgain};
  const std::string message = error.what(), quote = "tensor '";
  const size_t begin = message.find(quote);
  if (begin == std::string::npos) return finding;
  const size_t end = message.find('\'', begin + quote.size());
  if (end == std::string::npos) return finding;
  const Tensor* tensor = checkpoint.find(message.substr(begin + quote.size(), end - begin - quote.size()));
  if (tensor == nullptr) return finding;
  finding.tensor = tensor->name;
  finding.file = tensor->file;
  const size_t rest = message.find_first_not_of(":, ", end + 1);
  if (rest != std::string::npos) finding.found = message.substr(rest);
  return finding;
}

}  // namespace fourfold
