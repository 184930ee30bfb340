// Whether this build has sanitizers, under which arithmetic takes ten times as long.
#pragma once

#include <cstdint>

namespace fourfold {

#if defined(__SANITIZE_ADDRESS__)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

/// For loops over many cases, counted from 0: under sanitizers one in five runs, all of them without.
constexpr bool runs_here(uint64_t index) {
  return !kSanitized || index % 5 == 0;
}

}  // namespace fourfold
