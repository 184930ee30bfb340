// The numbers of synthetic models: reproducible, a stream a row, so that they do not depend on threads.
#pragma once

#include <cstdint>
#include <vector>

#include "fourfold/tensor.h"
#include "tools/random.h"
#include "tools/synthesize.h"
#include "tools/synthetic_layout.h"

namespace fourfold {

/// float32 [rows, cols] in memory.
struct DenseMatrix {
  int64_t rows = 0, cols = 0;
  std::vector<float> values;
  MatrixView<const float> view() const { return {values.data(), rows, cols}; }
};

/// Number of the shared expert in SyntheticValues::weight.
inline constexpr int64_t kSyntheticShared = -1;

class SyntheticValues {
 public:
  explicit SyntheticValues(const SynthesizeRequest& request) : request_(request) {}

  /// Weights of about the size of trained ones. Gate and up differ by factors around four, up the larger in
  /// some experts and gate in others, so that their global scales differ in every expert.
  DenseMatrix weight(int64_t layer, int64_t expert, Matrix matrix, int64_t intermediate) const;
  /// [size] of N(0, 0.2^2): large enough to change results.
  std::vector<float> expert_bias(int64_t layer, int64_t expert, Matrix matrix, int64_t size) const;
  std::vector<float> router_weight(int64_t layer) const;  ///< [experts, hidden]
  std::vector<float> router_bias(int64_t layer) const;    ///< [experts], changes some choices
  /// Experts of every token id, all different in a row: [vocabulary, top_k].
  std::vector<int64_t> hash_table(int64_t layer, int64_t vocabulary) const;
  std::vector<float> shared_gate(int64_t layer) const;  ///< [hidden]

 private:
  std::vector<float> normal_values(int64_t count, double sigma, Random::Purpose purpose,
                                   uint64_t stream) const;

  const SynthesizeRequest& request_;
};

}  // namespace fourfold
