// Runs a layer on some of its tokens as an engine with given faults would: the reference's stages, with
// deviations. An independent engine that computes the same comes as close as its rounding lets it.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <optional>
#include <vector>

#include "diagnosis/deviation.h"
#include "diagnosis/routing_replay.h"
#include "diagnosis/subject.h"

namespace fourfold::diagnosis {

/// Where a run rounds. What lies between the two is what sound engines may differ by.
enum class Rounding : uint8_t {
  kSpecified,  ///< docs/formats.md, section 7
  kFused,      ///< nothing between the GEMMs, sums over K in float64, a running sum of experts in bf16
};

/// Of the sampled tokens, in their order. Where an engine mixes up the tokens of its output alone, h and the
/// activation are not told: empty.
struct Stages {
  std::vector<float> h;           ///< [S*K, 2I], rows of absent experts zero
  std::vector<float> activation;  ///< [S*K, I]
  std::vector<float> output;      ///< [S, H]
};

class Replay {
 public:
  /// `subject` must outlive it. `tokens`: those to compute, ascending.
  Replay(const Subject& subject, std::vector<int64_t> tokens);
  ~Replay();
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;

  const std::vector<int64_t>& tokens() const { return tokens_; }
  /// Runs so far: what a search has cost.
  int64_t runs() const { return runs_; }

  Stages run(const Deviation& deviation, const Staging& staging, Rounding rounding = Rounding::kSpecified);
  /// What is due without a fault after the stages of `given`: the activation from its h, the output from its
  /// activation, as far as it has them.
  Stages run_after(const Stages& given, const Staging& staging);

 private:
  struct Slot;
  struct FirstResult;
  struct Converted;

  const FirstResult& first(const FirstDeviation& deviation, const Staging& staging, Rounding rounding);
  FirstResult compute_first(const FirstDeviation& deviation, const Staging& staging, Rounding rounding);
  /// Fills in h and the activation.
  void activate(const FirstResult& before, const ActivationChange& change, Rounding rounding,
                Stages& stages) const;
  /// -> z [S*K, H], and what each row's output is multiplied by: 0 where it is missing.
  std::vector<float> second(const FirstResult& before, const Deviation& deviation, const Staging& staging,
                            Rounding rounding, const std::vector<float>& activation,
                            std::vector<float>& weights);
  std::vector<Slot> make_slots(const FirstDeviation& deviation, const RoutedSlots& routed) const;
  int64_t read_expert(const FirstDeviation& deviation, const Permutation& permutation, int64_t slot,
                      int64_t expert) const;
  /// The weights that an engine reads; experts that `slots` need are converted where the source says so.
  const ExpertWeights& weights_of(WeightSource source, const std::vector<Slot>& slots);
  /// Adds up z [S*K, H] by token, and the shared expert.
  void combine(const Deviation& deviation, const Staging& staging, Rounding rounding,
               const std::vector<float>& weights, const std::vector<float>& z, Stages& stages);
  const std::vector<float>& shared_output(const Deviation& deviation, TokenOrder order,
                                          const Staging& staging, Rounding rounding);
  void add_shared(const Deviation& deviation, const Staging& staging, Rounding rounding, Stages& stages);

  struct SharedKey {
    TokenOrder order;
    bool not_clamped;
    Staging staging;
    Rounding rounding;
    bool operator==(const SharedKey&) const = default;
  };

  const Subject& subject_;
  std::vector<int64_t> tokens_;
  int64_t runs_ = 0;
  std::list<FirstResult> cache_;  // latest first
  std::list<std::pair<SharedKey, std::vector<float>>> shared_;
  std::vector<std::unique_ptr<Converted>> converted_;
  std::optional<ExpertWeights> shared_layer_;
  std::vector<float> shared_weights_;  // [T]
};

/// The token whose row an engine puts at `token`.
int64_t source_token(TokenOrder order, int64_t token, int64_t tokens);

}  // namespace fourfold::diagnosis
