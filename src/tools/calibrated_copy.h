// A copy of a checkpoint with other input scales.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/model_writer.h"
#include "fourfold/checkpoint.h"
#include "tools/calibrate.h"

namespace fourfold {

/// Writes `checkpoint` as the model directory `target`, which appears whole or not at all, with the input
/// scales of `result` for every NVFP4 matrix that it has one for: under the names, and as the multiplier or
/// divisor, of the matrix's scheme, or of `scheme`. One for all experts, where fused tensors store one, is
/// the largest of them. All other tensors, and the other files of the directory, are carried over byte for
/// byte, but for folders and weights in other formats, which `notes` names. Returns how many matrices got
/// one. Throws Error where `target` exists or can't be written, and where no matrix is NVFP4.
int64_t write_calibrated_copy(const Checkpoint& checkpoint, const std::filesystem::path& target,
                              const CalibrateResult& result, std::optional<WeightScheme> scheme,
                              const WriteProgress& progress, std::vector<std::string>& notes);

}  // namespace fourfold
