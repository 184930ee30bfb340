// The instruction sets that kernels exist for, and the choice of one, made from what the CPU and the system
// say of themselves; never from the model's name.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace fourfold::cpu {

enum class Isa : uint8_t { kAmx, kAvx512Bf16, kAvx512, kAvx2, kPortable };

/// Best first, but for Intel's CPUs (choose_isa); the last can always run.
std::span<const Isa> isas();
/// "amx", "avx512_bf16", "avx512", "avx2" or "portable".
std::string_view to_string(Isa isa);
/// Why this machine can't run it, e.g. "the CPU has no avx512_vnni"; empty when it can. Asks the system for
/// the permission to use tiles.
const std::string& why_not(Isa isa);

struct IsaChoice {
  Isa isa = Isa::kPortable;
  std::string reason;  ///< why this one and none of the better ones
};

/// The best that can run, or the forced one (fourfold/cpu.h). "avx512_bf16" is passed over on Intel's CPUs,
/// whose bf16 products are slower than their float32 ones. Throws Error when the forced one can't run, saying
/// why for each.
IsaChoice choose_isa();

/// For listings: what choose_isa() gives, or its error.
std::string describe_choice();

}  // namespace fourfold::cpu
