// Files of tensors that a serving engine computed: safetensors, npz or npy (docs/diagnosis.md).
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "fourfold/safetensors.h"

namespace fourfold {

/// A tensor of a candidate file, in memory of its own.
struct DumpedTensor {
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  std::vector<std::byte> bytes;
  std::string file;

  std::string describe() const;  ///< e.g. "F32 [16, 4096]"
  /// Every element; of BF16, F16, F32 or F64. Throws Error naming `name` for another type, and for a finite
  /// number beyond float32.
  std::vector<float> floats(const std::string& name) const;
  /// Throws Error naming `name` unless its type is an integer one other than U64.
  std::vector<int64_t> integers(const std::string& name) const;
};

using DumpedTensors = std::map<std::string, DumpedTensor>;

/// By the file's name: .npz (np.savez, not compressed), .npy (one tensor, called as the file is: x.npy), else
/// safetensors. Throws Error naming file, what was expected and what was found.
DumpedTensors read_dumped_tensors(const std::filesystem::path& path);

}  // namespace fourfold
