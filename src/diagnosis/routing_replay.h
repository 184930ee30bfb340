// The routing that an engine with a fault arrives at.
#pragma once

#include <cstdint>
#include <vector>

#include "diagnosis/deviation.h"
#include "diagnosis/subject.h"

namespace fourfold::diagnosis {

struct RoutedSlots {
  std::vector<int32_t> ids;    ///< [T, K]
  std::vector<float> weights;  ///< [T, K]
};

/// Of all tokens. A change that needs the router needs `subject.router`.
RoutedSlots route_with(const Subject& subject, const RoutingChange& change);

/// Whether two routings weigh the same experts alike, whatever their order: |a - b| / |b| over the dense
/// [T, E] matrices of weights.
double routing_distance(const RoutedSlots& a, const RoutedSlots& b, int64_t tokens, int64_t experts);

}  // namespace fourfold::diagnosis
