#include "tools/bench_routing.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/fail.h"
#include "tools/layer_inputs.h"
#include "tools/random.h"

namespace fourfold {
namespace {

/// How much each rank of expert is asked for, where all tokens are alike.
std::vector<double> popularity(RoutingKind kind, int64_t experts) {
  std::vector<double> weights(static_cast<size_t>(experts), 1.0);
  if (kind == RoutingKind::kZipf) {
    for (size_t rank = 0; rank < weights.size(); ++rank) weights[rank] = 1.0 / static_cast<double>(rank + 1);
  }
  return weights;
}

/// The same for the tokens of one sequence. Streams of random numbers: `call` for all of the call, those
/// behind it for its sequences.
std::vector<double> popularity_in_sequence(int64_t experts, uint64_t seed, uint64_t call, int64_t sequence) {
  Random all(seed, Random::Purpose::kGroups, call);
  Random own(seed, Random::Purpose::kGroups, call + 1 + static_cast<uint64_t>(sequence));
  std::vector<double> weights(static_cast<size_t>(experts));
  for (double& weight : weights) {
    weight = std::exp(kPopularitySigma * all.normal() + kSequenceSigma * own.normal());
  }
  return weights;
}

int64_t tokens_of_sequence(int64_t tokens) {
  return std::clamp<int64_t>(tokens / kLeastSequences, 1, kMostSequenceTokens);
}

/// Draws `count` different ranks, each in proportion to what is left; `weights` comes back as it was.
void draw_ranks(Random& random, std::vector<double>& weights, int64_t count, int32_t* ranks) {
  double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  std::vector<double> taken;
  for (int64_t k = 0; k < count; ++k) {
    double left = random.uniform() * total;
    size_t chosen = weights.size();
    for (size_t rank = 0; rank < weights.size(); ++rank) {
      if (weights[rank] == 0.0) continue;
      chosen = rank;  // the last one that is left, should rounding carry `left` beyond the sum
      left -= weights[rank];
      if (left < 0.0) break;
    }
    ranks[k] = static_cast<int32_t>(chosen);
    taken.push_back(weights[chosen]);
    total -= weights[chosen];
    weights[chosen] = 0.0;
  }
  for (int64_t k = 0; k < count; ++k) weights[static_cast<size_t>(ranks[k])] = taken[static_cast<size_t>(k)];
}

/// The ranks of a token's experts, and its weights.
void route_token(RoutingKind kind, Random& random, std::vector<double>& weights, int64_t top_k,
                 int32_t* ranks, float* topk_weights) {
  int64_t first = 0;
  if (kind == RoutingKind::kOneExpert) {
    ranks[first++] = 0;
    weights[0] = 0.0;
  }
  draw_ranks(random, weights, top_k - first, ranks + first);
  double sum = 0.0;
  std::vector<double> shares;
  for (int64_t k = 0; k < top_k; ++k) sum += shares.emplace_back(0.05 + random.uniform());
  for (int64_t k = 0; k < top_k; ++k) {
    topk_weights[k] = static_cast<float>(shares[static_cast<size_t>(k)] / sum);
  }
}

RoutingStep empty_step(const RoutingRotation& rotation) {
  const auto slots = static_cast<size_t>(rotation.tokens * rotation.top_k);
  RoutingStep step;
  step.topk_ids.resize(slots);
  step.topk_weights.resize(slots);
  return step;
}

void count_rows(RoutingStep& step, int64_t experts) {
  step.rows_of_expert.assign(static_cast<size_t>(experts), 0);
  for (const int32_t id : step.topk_ids) {
    if (id >= 0) ++step.rows_of_expert[static_cast<size_t>(id)];
  }
}

/// Ranks instead of expert numbers.
RoutingStep draw_step(RoutingKind kind, const RoutingRotation& rotation, uint64_t seed) {
  RoutingStep step = empty_step(rotation);
  const auto first_stream = static_cast<uint64_t>(rotation.steps.size()) << 32;
  const int64_t sequence_tokens = tokens_of_sequence(rotation.tokens);
#pragma omp parallel
  {
    std::vector<double> weights = popularity(kind, rotation.experts);
    int64_t sequence = -1;
#pragma omp for schedule(static)
    for (int64_t token = 0; token < rotation.tokens; ++token) {
      if (kind == RoutingKind::kSequences && token / sequence_tokens != sequence) {
        sequence = token / sequence_tokens;
        // Stream 0 is shuffled_experts'.
        weights = popularity_in_sequence(rotation.experts, seed, first_stream + 1, sequence);
      }
      Random random(seed, Random::Purpose::kRouting, first_stream + static_cast<uint64_t>(token));
      const auto slot = static_cast<size_t>(token * rotation.top_k);
      route_token(kind, random, weights, rotation.top_k, &step.topk_ids[slot], &step.topk_weights[slot]);
    }
  }
  count_rows(step, rotation.experts);
  return step;
}

std::vector<int32_t> shuffled_experts(int64_t experts, uint64_t seed) {
  std::vector<int32_t> deck(static_cast<size_t>(experts));
  std::iota(deck.begin(), deck.end(), 0);
  Random random(seed, Random::Purpose::kGroups, 0);
  for (int64_t i = experts - 1; i > 0; --i) {
    std::swap(deck[static_cast<size_t>(i)], deck[static_cast<size_t>(random.below(i + 1))]);
  }
  return deck;
}

/// Gives the ranks that `step` hits the next experts of the deck, which goes round.
void hand_out_experts(RoutingStep& step, const std::vector<int32_t>& deck, size_t& next) {
  std::vector<int32_t> expert_of_rank(deck.size(), -1);
  for (size_t rank = 0; rank < deck.size(); ++rank) {
    if (step.rows_of_expert[rank] > 0) expert_of_rank[rank] = deck[next++ % deck.size()];
  }
  for (int32_t& id : step.topk_ids) id = expert_of_rank[static_cast<size_t>(id)];
  count_rows(step, static_cast<int64_t>(deck.size()));
}

bool is_complete(const RoutingRotation& rotation, int64_t hits) {
  if (rotation.steps.size() < kLeastSteps) return false;
  if (rotation.steps.size() >= kMostSteps) return true;
  int64_t sum = 0;
  for (const RoutingStep& step : rotation.steps) sum += step.experts_hit();
  return sum >= hits;
}

void add_steps_of_file(RoutingRotation& rotation, const std::filesystem::path& path, int64_t hits) {
  const LayerInputs file = read_routing(path);
  if (file.top_k != rotation.top_k) {
    reject(fmt::format("{}: topk_ids: top-k", path.string()), rotation.top_k, file.top_k);
  }
  if (file.tokens < rotation.tokens) {
    reject(fmt::format("{}: topk_ids: tokens", path.string()),
           fmt::format("at least {}, as in --tokens", rotation.tokens), file.tokens);
  }
  const auto slots = static_cast<size_t>(rotation.tokens * rotation.top_k);
  for (size_t first = 0; first + slots <= file.topk_ids.size() && !is_complete(rotation, hits);
       first += slots) {
    RoutingStep step = empty_step(rotation);
    std::copy_n(file.topk_ids.begin() + static_cast<ptrdiff_t>(first), slots, step.topk_ids.begin());
    std::copy_n(file.topk_weights.begin() + static_cast<ptrdiff_t>(first), slots, step.topk_weights.begin());
    for (const int32_t id : step.topk_ids) {
      if (id >= rotation.experts) {
        reject(fmt::format("{}: topk_ids", path.string()),
               fmt::format("expert numbers below {}", rotation.experts), id);
      }
    }
    count_rows(step, rotation.experts);
    rotation.steps.push_back(std::move(step));
  }
}

}  // namespace

std::string RoutingSource::describe() const {
  switch (kind) {
    case RoutingKind::kUniform:
      return "uniform";
    case RoutingKind::kZipf:
      return "zipf";
    case RoutingKind::kOneExpert:
      return "one-expert";
    case RoutingKind::kSequences:
      return "sequences";
    case RoutingKind::kFile:
      return file.string();
  }
  return "?";
}

RoutingSource parse_routing(const std::string& text) {
  for (const RoutingKind kind :
       {RoutingKind::kUniform, RoutingKind::kZipf, RoutingKind::kOneExpert, RoutingKind::kSequences}) {
    const RoutingSource source{kind, {}};
    if (source.describe() == text) return source;
  }
  return {RoutingKind::kFile, text};
}

int64_t RoutingStep::experts_hit() const {
  return std::count_if(rows_of_expert.begin(), rows_of_expert.end(), [](int32_t rows) { return rows > 0; });
}

int64_t RoutingStep::rows() const {
  return std::accumulate(rows_of_expert.begin(), rows_of_expert.end(), int64_t{0});
}

Routing RoutingRotation::view(size_t step) const {
  return {MatrixView<const int32_t>(steps[step].topk_ids.data(), tokens, top_k),
          {steps[step].topk_weights.data(), tokens, top_k}};
}

RoutingRotation make_rotation(const RoutingSource& source, int64_t tokens, int64_t experts, int64_t top_k,
                              int64_t hits, uint64_t seed) {
  if (top_k < 1 || top_k > experts) {
    reject("routing: top-k", fmt::format("1 to {}, the number of experts", experts), top_k);
  }
  RoutingRotation rotation{tokens, top_k, experts, {}};
  if (source.kind == RoutingKind::kFile) {
    add_steps_of_file(rotation, source.file, hits);
    return rotation;
  }
  const std::vector<int32_t> deck = shuffled_experts(experts, seed);
  size_t next = 0;
  while (!is_complete(rotation, hits)) {
    RoutingStep step = draw_step(source.kind, rotation, seed);
    hand_out_experts(step, deck, next);
    rotation.steps.push_back(std::move(step));
  }
  return rotation;
}

}  // namespace fourfold
