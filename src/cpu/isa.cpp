#include "cpu/isa.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <mutex>
#include <optional>

#include "base/fail.h"
#include "fourfold/cpu.h"

namespace fourfold::cpu {
namespace {

constexpr std::array<Isa, 5> kIsas = {Isa::kAmx, Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2, Isa::kPortable};

/// A bit of a CPUID leaf (Intel SDM, volume 2, CPUID).
struct CpuFeature {
  const char* name;
  uint32_t leaf, subleaf;
  enum Register : uint8_t { kEax, kEbx, kEcx, kEdx } where;
  int bit;
};

constexpr std::array kAvx2Features = {
    CpuFeature{"avx2", 7, 0, CpuFeature::kEbx, 5},
    CpuFeature{"fma", 1, 0, CpuFeature::kEcx, 12},
    CpuFeature{"f16c", 1, 0, CpuFeature::kEcx, 29},
};
constexpr std::array kAvx512Features = {
    CpuFeature{"avx512f", 7, 0, CpuFeature::kEbx, 16},     CpuFeature{"avx512dq", 7, 0, CpuFeature::kEbx, 17},
    CpuFeature{"avx512bw", 7, 0, CpuFeature::kEbx, 30},    CpuFeature{"avx512vl", 7, 0, CpuFeature::kEbx, 31},
    CpuFeature{"avx512_vnni", 7, 0, CpuFeature::kEcx, 11},
};
constexpr std::array kAvx512Bf16Features = {
    CpuFeature{"avx512_bf16", 7, 1, CpuFeature::kEax, 5},
};
constexpr std::array kAmxFeatures = {
    CpuFeature{"amx_tile", 7, 0, CpuFeature::kEdx, 24},
    CpuFeature{"amx_bf16", 7, 0, CpuFeature::kEdx, 22},
    CpuFeature{"avx512_fp16", 7, 0, CpuFeature::kEdx, 23},
    CpuFeature{"avx512_vbmi", 7, 0, CpuFeature::kEcx, 1},
    CpuFeature{"avx512_vbmi2", 7, 0, CpuFeature::kEcx, 6},
};

// Register state that the system must save (XCR0): SSE and AVX; opmasks and ZMM; tile configuration and data.
constexpr uint64_t kAvxState = 0x6, kAvx512State = 0xE6, kAmxState = 0x60006;

bool has(const CpuFeature& feature) {
  std::array<uint32_t, 4> registers = {};
  return __get_cpuid_count(feature.leaf, feature.subleaf, &registers[0], &registers[1], &registers[2],
                           &registers[3]) != 0 &&
         ((registers[feature.where] >> feature.bit) & 1u) != 0;
}

uint64_t enabled_state() {
  if (!has({"osxsave", 1, 0, CpuFeature::kEcx, 27})) return 0;
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

/// Tile data is granted to a process that asks (Linux 5.16, arch_prctl ARCH_REQ_XCOMP_PERM of XTILEDATA).
bool may_use_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

std::string why_lacking(std::span<const CpuFeature> features, uint64_t state) {
  std::string missing;
  for (const CpuFeature& feature : features) {
    if (!has(feature)) missing += fmt::format("{}{}", missing.empty() ? "" : ", ", feature.name);
  }
  if (!missing.empty()) return "the CPU has no " + missing;
  return (enabled_state() & state) == state ? "" : "the system does not save its registers";
}

std::string find_reason(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "";
    case Isa::kAvx2:
      return why_lacking(kAvx2Features, kAvxState);
    case Isa::kAvx512: {
      const std::string& reason = why_not(Isa::kAvx2);
      return reason.empty() ? why_lacking(kAvx512Features, kAvx512State) : reason;
    }
    case Isa::kAvx512Bf16: {
      const std::string& reason = why_not(Isa::kAvx512);
      return reason.empty() ? why_lacking(kAvx512Bf16Features, kAvx512State) : reason;
    }
    case Isa::kAmx: {
      std::string reason = why_not(Isa::kAvx512);
      if (reason.empty()) reason = why_lacking(kAmxFeatures, kAmxState);
      if (reason.empty() && !may_use_tiles()) reason = "the system does not grant this process tiles";
      return reason;
    }
  }
  return "";
}

/// Why one that can run is not what a machine should take by itself; empty where it is. Sapphire Rapids, the
/// one Intel CPU that was measured, adds bf16 products at half the rate of float32's, Zen 4 at twice that
/// rate (docs/cpu.md).
std::string why_not_by_itself(Isa isa) {
  if (!why_not(isa).empty()) return why_not(isa);
  __builtin_cpu_init();
  if (isa == Isa::kAvx512Bf16 && __builtin_cpu_is("intel")) {
    return "this maker's bf16 products are slower than its float32 ones";
  }
  return "";
}

std::optional<Isa> isa_named(std::string_view name) {
  for (const Isa isa : kIsas) {
    if (to_string(isa) == name) return isa;
  }
  return std::nullopt;
}

/// Throws Error unless `name` is an instruction set that can run.
Isa require_isa(std::string_view name, std::string_view origin) {
  std::string all;
  for (const Isa isa : kIsas) {
    const std::string& reason = why_not(isa);
    all += fmt::format("{}{} ({})", all.empty() ? "" : ", ", to_string(isa),
                       reason.empty() ? "can run here" : "can't run here: " + reason);
  }
  const std::optional<Isa> isa = isa_named(name);
  if (!isa) reject(std::string(origin), "one of " + all, fmt::format("'{}'", name));
  if (!why_not(*isa).empty()) {
    fail(ErrorCode::kUnsupported, "{}: '{}' can't run on this machine; there are {}", origin, name, all);
  }
  return *isa;
}

struct Forced {
  std::mutex mutex;
  std::optional<Isa> isa;
};

Forced& forced() {
  static Forced instance;
  return instance;
}

}  // namespace

std::span<const Isa> isas() {
  return kIsas;
}

std::string_view to_string(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
      return "amx";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kPortable:
      return "portable";
  }
  return "?";
}

const std::string& why_not(Isa isa) {
  switch (isa) {
    case Isa::kAmx: {
      static const std::string reason = find_reason(Isa::kAmx);
      return reason;
    }
    case Isa::kAvx512Bf16: {
      static const std::string reason = find_reason(Isa::kAvx512Bf16);
      return reason;
    }
    case Isa::kAvx512: {
      static const std::string reason = find_reason(Isa::kAvx512);
      return reason;
    }
    case Isa::kAvx2: {
      static const std::string reason = find_reason(Isa::kAvx2);
      return reason;
    }
    case Isa::kPortable:
      break;
  }
  static const std::string none;
  return none;
}

IsaChoice choose_isa() {
  {
    const std::lock_guard lock(forced().mutex);
    if (forced().isa) return {*forced().isa, "forced by --isa"};
  }
  const char* const variable = std::getenv(kIsaVariable);
  if (variable != nullptr && *variable != '\0') {
    return {require_isa(variable, kIsaVariable), fmt::format("forced by {}", kIsaVariable)};
  }
  std::string passed_over;
  for (const Isa isa : kIsas) {
    const std::string reason = why_not_by_itself(isa);
    if (reason.empty()) {
      return {isa, passed_over.empty() ? "the best there is" : "passed over " + passed_over};
    }
    passed_over += fmt::format("{}{}: {}", passed_over.empty() ? "" : "; ", to_string(isa), reason);
  }
  return {};
}

std::string describe_choice() {
  try {
    const IsaChoice choice = choose_isa();
    return fmt::format("{} ({})", to_string(choice.isa), choice.reason);
  } catch (const Error& error) {
    return error.what();
  }
}

}  // namespace fourfold::cpu

namespace fourfold {

void force_cpu_isa(std::string_view name) {
  const auto isa = name.empty() ? std::nullopt : std::optional(cpu::require_isa(name, "--isa"));
  const std::lock_guard lock(cpu::forced().mutex);
  cpu::forced().isa = isa;
}

}  // namespace fourfold
