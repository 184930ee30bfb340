// Routings of a benchmark: several different ones in turn, so that no call finds the weights of the call
// before in a cache.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "fourfold/routing.h"

namespace fourfold {

enum class RoutingKind : uint8_t {
  kUniform,    ///< each token to K different experts, all alike
  kZipf,       ///< the same with popularity 1/rank
  kOneExpert,  ///< every token to one expert, and to K - 1 others, all alike
  kSequences,  ///< experts of log-normal popularity, which is each sequence's own in part: as trained routers
               ///< do
  kFile,       ///< topk_ids (and topk_weights) of a safetensors file, a different part each time
};

struct RoutingSource {
  RoutingKind kind = RoutingKind::kUniform;
  std::filesystem::path file;

  std::string describe() const;
};

/// "uniform", "zipf", "one-expert", "sequences", or a path.
RoutingSource parse_routing(const std::string& text);

/// kSequences: standard deviations of the logarithm of an expert's popularity, in all of a call and in one
/// sequence beside that. Of 128 experts, 8 a token, the most popular gets 3.5 times the mean in a call of 32
/// sequences, and 7 times in one of them; made up, not fitted to a model.
inline constexpr double kPopularitySigma = 0.6, kSequenceSigma = 0.8;
/// A call has at least so many sequences, where it has as many tokens; a sequence has at most so many tokens.
inline constexpr int64_t kLeastSequences = 8, kMostSequenceTokens = 256;

/// One call's routing.
struct RoutingStep {
  std::vector<int32_t> topk_ids;        ///< [T, K]
  std::vector<float> topk_weights;      ///< [T, K], positive
  std::vector<int32_t> rows_of_expert;  ///< [E]

  int64_t experts_hit() const;
  int64_t rows() const;
};

struct RoutingRotation {
  int64_t tokens = 0, top_k = 0, experts = 0;
  std::vector<RoutingStep> steps;

  Routing view(size_t step) const;
};

/// At least so many calls take turns, where the source has as many; at most so many.
inline constexpr size_t kLeastSteps = 8;
inline constexpr size_t kMostSteps = 64;

/// Steps until the experts that they hit, counted step by step, are at least `hits`. Generated routings hand
/// experts out in turn: one is hit again only after all others were, so that what a call touches was last
/// touched as long ago as can be. Throws Error when the file does not fit E and K or has fewer than T tokens.
RoutingRotation make_rotation(const RoutingSource& source, int64_t tokens, int64_t experts, int64_t top_k,
                              int64_t hits, uint64_t seed);

}  // namespace fourfold
