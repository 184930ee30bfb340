// Loops that are compiled twice: for any x86-64, and for AVX2 where a CPU has it.
//
// AVX2 without FMA: every product and every sum is rounded by itself in both, so both give the same bits.
#pragma once

#include <cstdlib>
#include <string_view>

#if defined(__x86_64__)
#define FOURFOLD_HAS_AVX2_LOOPS 1
/// For functions whose names say "avx2"; tests/instruction_sets_test.py looks.
#define FOURFOLD_AVX2_LOOP [[gnu::target("avx2")]]
#else
#define FOURFOLD_HAS_AVX2_LOOPS 0
#endif
/// For what is inlined into both.
#define FOURFOLD_INLINE [[gnu::always_inline]] inline

namespace fourfold {

/// Whether this CPU and its system can run them, and FOURFOLD_ISA (fourfold/cpu.h) is not "portable".
inline bool has_avx2() {
#if FOURFOLD_HAS_AVX2_LOOPS
  static const bool has = [] {
    const char* const isa = std::getenv("FOURFOLD_ISA");
    return __builtin_cpu_supports("avx2") != 0 && (isa == nullptr || std::string_view(isa) != "portable");
  }();
  return has;
#else
  return false;
#endif
}

}  // namespace fourfold
