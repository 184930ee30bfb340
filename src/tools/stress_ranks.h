// A layer as the ranks of a parallel server hold it.
#pragma once

#include <cstdint>
#include <string>

#include "tools/stress.h"

namespace fourfold {

/// Why the layer can't be cut into `degree` parts along I; empty when it can.
std::string why_not_tensor_parallel(const StressSubject& whole, int64_t degree);

/// Rank `rank` of `degree`: rows of gate and up, columns of down. Biases of down and the shared expert are
/// the first rank's alone.
StressSubject tensor_parallel_rank(const StressSubject& whole, int64_t rank, int64_t degree);

/// The experts [first, first + count); ids of the inputs stay the model's. The shared expert is the first
/// rank's alone.
StressSubject expert_parallel_rank(const StressSubject& whole, int64_t first, int64_t count);

}  // namespace fourfold
