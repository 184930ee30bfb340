// Which GPU code this build carries, for reports.
#pragma once

#include <string>
#include <vector>

namespace fourfold {

/// A line an architecture: its name, as nvcc has it, then the instruction that multiplies there, and what it
/// runs on. Empty without CUDA.
std::vector<std::string> describe_compiled_code();

}  // namespace fourfold
