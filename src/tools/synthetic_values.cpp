#include "tools/synthetic_values.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "tools/random.h"

namespace fourfold {
namespace {

using Purpose = Random::Purpose;

/// Of trained weights, and of the published simulations.
constexpr double kWeightSigma = 0.02;

double sigma_of(int64_t expert, Matrix matrix) {
  constexpr std::array<double, 4> kUpRatios = {0.25, 3.0, 0.2, 4.5};
  if (matrix != Matrix::kUp || expert == kSyntheticShared) return kWeightSigma;
  return kWeightSigma * kUpRatios[static_cast<size_t>(expert % 4)];
}

}  // namespace

DenseMatrix SyntheticValues::weight(int64_t layer, int64_t expert, Matrix matrix,
                                    int64_t intermediate) const {
  const bool is_down = matrix == Matrix::kDown;
  DenseMatrix weight{is_down ? request_.hidden : intermediate, is_down ? intermediate : request_.hidden, {}};
  weight.values.resize(static_cast<size_t>(weight.rows * weight.cols));
  const double scale = sigma_of(expert, matrix);
  const bool is_shared = expert == kSyntheticShared;
  const int64_t number = is_shared ? layer : layer * request_.experts + expert;
  const auto tensor = static_cast<uint64_t>(number * 3 + static_cast<int64_t>(matrix));
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < weight.rows; ++row) {
    Random random(request_.seed, is_shared ? Purpose::kSharedWeight : Purpose::kWeight,
                  (tensor << 24) + static_cast<uint64_t>(row));
    const bool realistic = request_.profile == WeightProfile::kRealistic;
    const double row_scale = realistic ? scale * std::exp(0.3 * random.normal()) : scale;
    for (int64_t col = 0; col < weight.cols; ++col) {
      const double value = realistic ? random.student_t(5) : random.normal();
      weight.values[static_cast<size_t>(row * weight.cols + col)] = static_cast<float>(row_scale * value);
    }
  }
  return weight;
}

std::vector<float> SyntheticValues::normal_values(int64_t count, double sigma, Purpose purpose,
                                                  uint64_t stream) const {
  Random random(request_.seed, purpose, stream);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = static_cast<float>(sigma * random.normal());
  return values;
}

std::vector<float> SyntheticValues::expert_bias(int64_t layer, int64_t expert, Matrix matrix,
                                                int64_t size) const {
  const int64_t number = (layer * request_.experts + expert) * 3 + static_cast<int64_t>(matrix);
  return normal_values(size, 0.2, Purpose::kBias, static_cast<uint64_t>(number));
}

/// The bias continues the stream of the weight.
std::vector<float> SyntheticValues::router_weight(int64_t layer) const {
  return normal_values(request_.experts * request_.hidden, 0.02, Purpose::kRouter,
                       static_cast<uint64_t>(layer));
}

std::vector<float> SyntheticValues::router_bias(int64_t layer) const {
  Random random(request_.seed, Purpose::kRouter, static_cast<uint64_t>(layer));
  for (int64_t i = 0; i < request_.experts * request_.hidden; ++i) random.normal();
  std::vector<float> bias(static_cast<size_t>(request_.experts));
  for (float& value : bias) value = static_cast<float>(0.1 * random.normal());
  return bias;
}

std::vector<int64_t> SyntheticValues::hash_table(int64_t layer, int64_t vocabulary) const {
  std::vector<int64_t> table, experts(static_cast<size_t>(request_.experts));
  for (int64_t token = 0; token < vocabulary; ++token) {
    Random random(request_.seed, Purpose::kHashTable, static_cast<uint64_t>(layer * vocabulary + token));
    std::iota(experts.begin(), experts.end(), 0);
    for (int64_t k = 0; k < request_.top_k; ++k) {
      const auto slot = static_cast<size_t>(k);
      std::swap(experts[slot], experts[static_cast<size_t>(k + random.below(request_.experts - k))]);
      table.push_back(experts[slot]);
    }
  }
  return table;
}

std::vector<float> SyntheticValues::shared_gate(int64_t layer) const {
  return normal_values(request_.hidden, 0.02, Purpose::kSharedGate, static_cast<uint64_t>(layer));
}

}  // namespace fourfold
