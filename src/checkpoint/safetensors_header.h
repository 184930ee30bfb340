// The header of a safetensors file, apart from where its bytes come from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>

#include "fourfold/safetensors.h"

namespace fourfold {

using TensorMap = std::map<std::string, Tensor, std::less<>>;

/// A file starts with the header's length, a u64.
inline constexpr size_t kSafetensorsLengthBytes = 8;

/// The header's length, at most what the file and the format hold. `file_bytes`: at least that of `start`.
uint64_t safetensors_header_bytes(std::span<const std::byte, kSafetensorsLengthBytes> start,
                                  uint64_t file_bytes, const std::string& file);

/// The tensors that the header `text` describes in `data`, which they must tile. Looks at no byte of `data`.
/// Throws Error naming `file` and the tensor.
TensorMap parse_safetensors_header(std::string_view text, const std::string& file, const std::byte* data,
                                   uint64_t data_bytes);

}  // namespace fourfold
