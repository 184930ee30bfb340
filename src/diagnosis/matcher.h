// Which known fault explains what an engine computed: replays of the layer with each fault, alone and in
// pairs, ranked by how close they come to the candidate.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "diagnosis/faults.h"
#include "diagnosis/replay.h"
#include "diagnosis/subject.h"

namespace fourfold::diagnosis {

/// How far a replay is from the candidate: |candidate - replay| / |candidate| of a token, root mean square
/// over tokens; where the candidate has several stages, of the worst. 0 is the same.
struct Fit {
  double distance = 0.0;
  double shape_distance = 0.0;  ///< the same after the best factor for each token: blind to lost scalars
};
/// Of two runs; elements where the candidate is not finite do not count, a run that is not finite elsewhere
/// is infinitely far. `candidate` holds the replay's tokens alone, stages that it has not are empty.
Fit fit(const Stages& candidate, const Stages& run, int64_t tokens);

/// The candidate's stages of some tokens.
Stages sample(const Candidate& candidate, const Subject& subject, const std::vector<int64_t>& tokens);

/// A hypothesis and how it fits.
struct Explanation {
  std::vector<Fault> faults;  ///< none: the engine is sound
  Staging staging;
  double distance = 0.0;
  /// How far apart roundings of sound engines would be: measured between two replays that round differently.
  double noise = 0.0;
  double limit = 0.0;  ///< kNoiseMargin x noise: what counts as explained

  std::string id() const;  ///< "none", "a" or "a + b"
  std::string sentence() const;
};

enum class Verdict : uint8_t { kFine, kExplained, kUnexplained };

struct Diagnosis {
  Verdict verdict = Verdict::kFine;
  Explanation sound;                     ///< without a fault, in the staging that fits best
  std::optional<Explanation> best;       ///< of the faults
  std::optional<Explanation> runner_up;  ///< the best of those that differ from `best` on these data
  std::vector<Explanation> alike;        ///< those that do the same as `best` on these data
  std::vector<int64_t> tokens;           ///< that were replayed
  int64_t replays = 0;
  int64_t faults_tried = 0, pairs_tried = 0;
};

struct MatcherOptions {
  std::vector<Staging> stagings;  ///< that the engine may use; from plausible_stagings where it is not known
  bool pairs = true;
  /// Multiplications that all replays together may take.
  double work = 1.5e11;
  std::function<void(std::string_view)> progress = [](std::string_view) {};
};

/// A sound engine's distance is at most this times the noise.
inline constexpr double kNoiseMargin = 3.0;
/// An explanation has at most this part of the distance that is left without it.
inline constexpr double kClearlyBetter = 0.5;

/// How this layer's activations can be staged: bf16, NVFP4 by the policies that its input scales allow, FP8.
std::vector<Staging> plausible_stagings(const Subject& subject);
std::string describe(const Staging& staging);

Diagnosis diagnose(const Subject& subject, const Candidate& candidate, const MatcherOptions& options);

/// The engine's own routing beside the router's.
struct RoutingDiagnosis {
  Verdict verdict = Verdict::kFine;
  double distance = 0.0;              ///< of the dense [T, E] weights, median over tokens
  int64_t tokens_with_other_ids = 0;  ///< other experts than the router chooses
  std::optional<Fault> best;
  double best_distance = 0.0;
  std::optional<Fault> runner_up;
  double runner_up_distance = 0.0;
};
/// `subject` has a router and the engine's ids and weights.
RoutingDiagnosis diagnose_routing(const Subject& subject);

}  // namespace fourfold::diagnosis
