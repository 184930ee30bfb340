// Loops that do nothing but arithmetic, one an instruction set, behind the CPU's own word on what it has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace fourfold {

struct CpuPeak {
  std::string name;
  std::string why_not;  ///< why it can't run here; empty when it can
  void (*run)(int64_t iterations) = nullptr;
  double operations_an_iteration = 0.0;
};

/// All of them, in the order of cpu_ceilings.h. Asks the system for the use of tiles.
std::vector<CpuPeak> cpu_peaks();

/// The xor of all words, by the widest loads that the CPU has. `count` is a multiple of 32, `words` of 64
/// bytes.
uint64_t xor_words(const uint64_t* words, size_t count);

}  // namespace fourfold
