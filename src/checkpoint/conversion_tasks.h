// The work of a conversion: matrices, rows at a time, in memory of a few megabytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/conversion.h"
#include "checkpoint/conversion_names.h"
#include "checkpoint/linear_reader.h"

namespace fourfold {

/// How values are stored anew.
struct Recoding {
  TargetFormat to = TargetFormat::kNvfp4;
  ScaleRule rule = ScaleRule::kAmax;
  float global = 1.0f;     ///< NVFP4's, by which values are quantized
  int kmax = kNoExponent;  ///< MXFP4 to NVFP4: of the tensors that share a global scale
  std::string name;        ///< of the source, for messages
};

/// A matrix whose values are to be stored anew.
struct SourceMatrix {
  std::string name;  ///< of the linear as it will be called
  WeightView view;
  std::vector<std::span<const std::byte>> reads;  ///< bytes of the mapped file behind `view`
};

/// Whether it is cast, not quantized: MXFP4 to NVFP4.
bool is_cast(const WeightView& view, TargetFormat to);

/// NVFP4's global scale after a cast with this kmax.
float cast_global_scale(int kmax);

/// The largest magnitude; throws Error naming `name` and the row where a value is NaN or infinite.
float finite_absolute_maximum(const WeightView& view, const std::string& name);

/// A task that quantizes `matrices`, which share a global scale, and writes weight, scales and global scale
/// of each. `kmax`: where the values are cast.
WriteTask separate_task(std::vector<SourceMatrix> matrices, TargetFormat to, const LinearNames& names,
                        ScaleRule rule, int kmax);

/// One expert of a tensor of all experts: its source is opened by the task, since a transposed one is
/// repacked.
struct FusedSource {
  std::shared_ptr<const FusedReader> reader;
  bool is_transposed = false;
  int64_t expert = 0, rows = 0, cols = 0;
  std::vector<std::span<const std::byte>> reads;
};

/// A task that stores one expert's matrix into the fused tensors `name`.
WriteTask fused_task(FusedSource source, const std::string& name, ExpertLayout layout,
                     const Recoding& recoding);

}  // namespace fourfold
