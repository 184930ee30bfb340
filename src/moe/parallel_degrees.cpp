#include "fourfold/parallel_degrees.h"

#include <algorithm>
#include <iterator>

namespace fourfold {
namespace {

bool is_power_of_two(int64_t number) {
  return (number & (number - 1)) == 0;
}

CutDegrees degrees(int64_t extent, int64_t most, int64_t block) {
  CutDegrees cut;
  for (int64_t degree = 2; degree <= std::min(most, extent); ++degree) {
    if (extent % degree != 0) {
      if (is_power_of_two(degree)) cut.uneven.push_back(degree);
    } else if (extent / degree % block != 0) {
      cut.cuts_block.push_back(degree);
    } else {
      cut.clean.push_back(degree);
    }
  }
  return cut;
}

}  // namespace

CutDegrees tensor_parallel_degrees(int64_t intermediate, int64_t block) {
  constexpr int64_t kMost = 64;
  CutDegrees cut = degrees(intermediate, kMost, block);
  std::copy_if(cut.clean.begin(), cut.clean.end(), std::back_inserter(cut.padded),
               [&](int64_t degree) { return intermediate / degree % kPaddedPart != 0; });
  return cut;
}

CutDegrees expert_parallel_degrees(int64_t experts) {
  constexpr int64_t kMost = 512;
  return degrees(experts, kMost, 1);
}

}  // namespace fourfold
