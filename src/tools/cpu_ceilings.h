// What this CPU can do at most, measured: reading memory, and arithmetic by instruction set.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace fourfold {

/// A measured limit. Bytes or operations a second; a multiplication and an addition are two operations.
struct Ceiling {
  std::string name;
  std::optional<double> per_second;  ///< absent: not measured
  std::string note;                  ///< why not, or how
};

/// Bytes of the largest data cache that the system tells of; 32 MB where it tells nothing.
int64_t last_level_cache_bytes();

/// As the system names it.
std::string cpu_name();

/// Reading DRAM once, sequentially, with as many threads as OpenMP takes, each its own part: `bytes` in pages
/// of 2 MB where the system gives them. The best of seven passes; of two where less than kCeilingRunSeconds
/// is asked for, which is for trying things out.
Ceiling measure_dram_read(int64_t bytes, double min_seconds);

/// A run of one of the peaks takes so long: many short ones, since a busy neighbour leaves short gaps.
inline constexpr double kCeilingRunSeconds = 0.005;

/// Peaks of the instruction sets that this CPU and its system have, with as many threads as OpenMP takes;
/// operands stay in registers (or tiles); the best of several runs of kCeilingRunSeconds, or of `min_seconds`
/// where that is less. The names are those of LayerPlan::arithmetic:
///   f32            multiplication and addition as the compiler vectorises them for any CPU of this kind
///   f32-avx2, f32-avx512           fused multiply-add
///   int8-avx2                          vpmaddubsw and the addition of its 16-bit sums
///   int8-vnni-avx2, int8-vnni-avx512   vpdpbusd
///   bf16-avx512                    vdpbf16ps
///   int8-amx, bf16-amx             tile multiplication
/// Those that can't run are listed without a number, with the reason.
std::vector<Ceiling> measure_cpu_peaks(double min_seconds);

/// Operations a second that one of these peaks reaches right behind `work`, at the clock that `work` may
/// have left, beside whoever shares the core then: the best of up to five runs of kCeilingRunSeconds / 10,
/// each behind a run of `work`, as many as a second allows. Nothing where `peak` is none of them, or was not
/// measured.
std::optional<double> measure_cpu_peak_behind(const Ceiling& peak, const std::function<void()>& work);

}  // namespace fourfold
