// How findings are worded where more than one rule needs it.
#pragma once

#include <cstdint>
#include <string>

#include "fourfold/error.h"
#include "fourfold/inspection.h"

namespace fourfold {

inline constexpr const char* kConvertAgain = "download it again if its checksum is wrong, else convert again";

/// "3 NaN scales of 1024, the first at row 2, block 5".
std::string nan_scales_text(int64_t count, int64_t total, int64_t row, int64_t block);

/// A reader's Error as a finding: the tensor that its message quotes, if the checkpoint has it, and what it
/// says of it.
Finding finding_of(const Error& error, const Checkpoint& checkpoint, int64_t layer, FindingKind kind);

}  // namespace fourfold
