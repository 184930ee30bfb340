// Parts of the planted engine (planted_engine.h): its loader and its router, and the faults that are in them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "diagnosis/faults.h"
#include "diagnosis/subject.h"

namespace fourfold::planted {

/// What is planted, by the ids of known faults.
class Faults {
 public:
  explicit Faults(const std::vector<diagnosis::Fault>& faults) : faults_(faults) {}

  const diagnosis::Fault* find(std::string_view id) const;
  bool has(std::string_view id) const { return find(id) != nullptr; }
  /// In w13, w2, x or the intermediate, or everywhere.
  bool has_at(const std::string& id, const std::string& site) const {
    return has(id) || has(id + "." + site);
  }
  const diagnosis::Fault* find_prefix(std::string_view prefix, std::string_view suffix = "") const;
  bool is_any_in(diagnosis::FaultPlace place) const;

 private:
  const std::vector<diagnosis::Fault>& faults_;
};

/// Weights of all experts, one after another, as an engine's loader leaves them.
struct Stack {
  int64_t experts = 0, rows = 0, cols = 0, block = 16;
  bool has_codes = false, is_e4m3 = false;
  std::vector<uint8_t> codes, scales;  // [E, R, K/2], [E, R, K/block]
  std::vector<float> values;           // [E, R, K], what a kernel multiplies by
  std::vector<float> globals;          // [E, R]
  std::vector<float> biases;           // [E, R]

  int64_t blocks() const { return cols / block; }
};

struct Weights {
  int64_t experts = 0, inner = 0;
  Stack w13, w2;
};

/// The layer that an engine with `faults` ends up with.
Weights load_weights(const diagnosis::Subject& subject, const Faults& faults);

struct Routes {
  std::vector<int32_t> ids;    // [T, K]
  std::vector<float> weights;  // [T, K]
};

Routes route_tokens(const diagnosis::Subject& subject, const Faults& faults);

/// Offset of a scale in the tensor core's tiles: (row block, column block, 32, 4, 4).
int64_t tiled(int64_t row, int64_t col, int64_t blocks);

/// A vector in float32.
std::vector<float> decoded(const DenseView& vector);

}  // namespace fourfold::planted
