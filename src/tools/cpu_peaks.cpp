#include "tools/cpu_peaks.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>
#endif

namespace fourfold {
namespace {

// Independent chains, enough to cover a latency of 4 to 5 cycles on two ports.
constexpr int kChains = 12;

/// Keeps a value alive without moving it: the compiler must believe that somebody reads and changes it.
template <class T>
void keep_float(T& value) {
  asm volatile("" : "+m"(value));
}

void run_f32(int64_t iterations) {
  float sums[kChains * 4] = {}, factor = 1.0f, term = 0.5f;
  keep_float(factor);
  keep_float(term);
  for (int64_t i = 0; i < iterations; ++i) {
    for (float& sum : sums) sum = sum * factor + term;
  }
  for (float& sum : sums) keep_float(sum);
}

#if defined(__x86_64__)

__attribute__((target("avx2,fma"))) void run_f32_avx2(int64_t iterations) {
  __m256 factor = _mm256_set1_ps(1.0f), term = _mm256_set1_ps(0.5f), sums[kChains];
  asm volatile("" : "+x"(factor), "+x"(term));
  for (__m256& sum : sums) sum = _mm256_setzero_ps();
  for (int64_t i = 0; i < iterations; ++i) {
    for (__m256& sum : sums) sum = _mm256_fmadd_ps(sum, factor, term);
  }
  for (__m256& sum : sums) asm volatile("" ::"x"(sum));
}

__attribute__((target("avx512f"))) void run_f32_avx512(int64_t iterations) {
  __m512 factor = _mm512_set1_ps(1.0f), term = _mm512_set1_ps(0.5f), sums[kChains];
  asm volatile("" : "+v"(factor), "+v"(term));
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < iterations; ++i) {
    for (__m512& sum : sums) sum = _mm512_fmadd_ps(sum, factor, term);
  }
  for (__m512& sum : sums) asm volatile("" ::"v"(sum));
}

/// Products of bytes in pairs, each added to 16-bit sums: what there is without VNNI.
__attribute__((target("avx2"))) void run_int8_maddubs(int64_t iterations) {
  __m256i a = _mm256_set1_epi32(0x01020304), b = a, sums[kChains];
  for (__m256i& sum : sums) sum = _mm256_setzero_si256();
  for (int64_t i = 0; i < iterations; ++i) {
    for (__m256i& sum : sums) {
      asm volatile("" : "+x"(a), "+x"(b));  // the products are computed anew each time
      sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b));
    }
  }
  for (__m256i& sum : sums) asm volatile("" ::"x"(sum));
}

__attribute__((target("avx2,avxvnni"))) void run_int8_avx2(int64_t iterations) {
  __m256i a = _mm256_set1_epi32(0x01020304), b = a, sums[kChains];
  asm volatile("" : "+x"(a), "+x"(b));
  for (__m256i& sum : sums) sum = _mm256_setzero_si256();
  for (int64_t i = 0; i < iterations; ++i) {
    for (__m256i& sum : sums) sum = _mm256_dpbusd_avx_epi32(sum, a, b);
  }
  for (__m256i& sum : sums) asm volatile("" ::"x"(sum));
}

__attribute__((target("avx512f,avx512vnni"))) void run_int8_avx512(int64_t iterations) {
  __m512i a = _mm512_set1_epi32(0x01020304), b = a, sums[kChains];
  asm volatile("" : "+v"(a), "+v"(b));
  for (__m512i& sum : sums) sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < iterations; ++i) {
    for (__m512i& sum : sums) sum = _mm512_dpbusd_epi32(sum, a, b);
  }
  for (__m512i& sum : sums) asm volatile("" ::"v"(sum));
}

__attribute__((target("avx512f,avx512bf16"))) void run_bf16_avx512(int64_t iterations) {
  const __m512i ones = _mm512_set1_epi32(0x3F803F80);
  __m512bh a = reinterpret_cast<__m512bh>(ones), b = a;
  __m512 sums[kChains];
  asm volatile("" : "+v"(a), "+v"(b));
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < iterations; ++i) {
    for (__m512& sum : sums) sum = _mm512_dpbf16_ps(sum, a, b);
  }
  for (__m512& sum : sums) asm volatile("" ::"v"(sum));
}

/// The 64 bytes of `ldtilecfg`: eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_a_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

/// Inline assembly: g++ 12's _tile_loadconfig declares 8 of the 64 bytes as its input, so that the compiler
/// drops the stores of the others.
__attribute__((target("amx-tile"))) void load_tile_config() {
  const TileConfig config;
  asm volatile("ldtilecfg %0" ::"m"(config));
}

/// Sums of zero, and operands that were loaded: tiles that TILEZERO made are multiplied at full speed even
/// while a neighbour on the same core has the tile unit, when no other tiles are (docs/cpu-tried.md).
__attribute__((target("amx-tile"))) void fill_tiles_amx() {
  alignas(64) uint8_t operand[16 * 64];  // as bf16 0.746, as int8 63
  std::memset(operand, 0x3F, sizeof operand);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, operand, 64);
  _tile_loadd(5, operand, 64);
  _tile_loadd(6, operand, 64);
  _tile_loadd(7, operand, 64);
}

/// Four accumulators of 2 x 2 operand tiles, as a GEMM has them.
__attribute__((target("amx-tile,amx-bf16"))) void run_bf16_amx(int64_t iterations) {
  load_tile_config();
  fill_tiles_amx();
  for (int64_t i = 0; i < iterations; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

__attribute__((target("amx-tile,amx-int8"))) void run_int8_amx(int64_t iterations) {
  load_tile_config();
  fill_tiles_amx();
  for (int64_t i = 0; i < iterations; ++i) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
}

struct CpuidLeaf7 {
  uint32_t edx = 0, eax_of_1 = 0;
};

CpuidLeaf7 read_leaf7() {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  CpuidLeaf7 leaf;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return leaf;
  leaf.edx = edx;
  const uint32_t most_subleaf = eax;
  if (most_subleaf >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) leaf.eax_of_1 = eax;
  return leaf;
}

constexpr uint32_t kAvxVnniBit = 1u << 4;                                                   // leaf 7.1, eax
constexpr uint32_t kAmxBf16Bit = 1u << 22, kAmxTileBit = 1u << 24, kAmxInt8Bit = 1u << 25;  // leaf 7.0, edx

/// Why a thread may not use tiles; the permission holds for the whole process.
std::string why_no_tiles(const CpuidLeaf7& leaf) {
  constexpr int64_t kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (!(leaf.edx & kAmxTileBit)) return "this CPU has no AMX";
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? ""
                                                                     : "the system refuses the use of tiles";
}

std::string unless(bool has, const char* why_not) {
  return has ? "" : why_not;
}

std::vector<CpuPeak> x86_peaks() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f");
  const CpuidLeaf7 leaf = read_leaf7();
  const std::string no_tiles = why_no_tiles(leaf);
  const auto tiles = [&](uint32_t bit, const char* why_not) {
    return no_tiles.empty() ? unless(leaf.edx & bit, why_not) : no_tiles;
  };
  return {
      {"f32-avx2", unless(avx2, "this CPU has no AVX2"), run_f32_avx2, kChains * 8 * 2.0},
      {"f32-avx512", unless(avx512, "this CPU has no AVX-512"), run_f32_avx512, kChains * 16 * 2.0},
      {"int8-avx2", unless(avx2, "this CPU has no AVX2"), run_int8_maddubs, kChains * 32 * 2.0},
      {"int8-vnni-avx2", unless(avx2 && (leaf.eax_of_1 & kAvxVnniBit), "this CPU has no AVX-VNNI"),
       run_int8_avx2, kChains * 32 * 2.0},
      {"int8-vnni-avx512",
       unless(avx512 && __builtin_cpu_supports("avx512vnni"), "this CPU has no AVX-512 VNNI"),
       run_int8_avx512, kChains * 64 * 2.0},
      {"bf16-avx512", unless(avx512 && __builtin_cpu_supports("avx512bf16"), "this CPU has no AVX-512 BF16"),
       run_bf16_avx512, kChains * 32 * 2.0},
      {"int8-amx", tiles(kAmxInt8Bit, "this CPU has no AMX for int8"), run_int8_amx, 4 * 16 * 16 * 64 * 2.0},
      {"bf16-amx", tiles(kAmxBf16Bit, "this CPU has no AMX for bf16"), run_bf16_amx, 4 * 16 * 16 * 32 * 2.0},
  };
}

__attribute__((target("avx2"))) uint64_t xor_words_avx2(const uint64_t* words, size_t count) {
  __m256i sums[4] = {};
  for (size_t i = 0; i < count; i += 16) {
    for (size_t j = 0; j < 4; ++j) {
      const auto* const at = reinterpret_cast<const __m256i*>(words + i + 4 * j);
      sums[j] = _mm256_xor_si256(sums[j], _mm256_load_si256(at));
    }
  }
  alignas(32) uint64_t lanes[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_xor_si256(_mm256_xor_si256(sums[0], sums[1]),
                                                                         _mm256_xor_si256(sums[2], sums[3])));
  return lanes[0] ^ lanes[1] ^ lanes[2] ^ lanes[3];
}

__attribute__((target("avx512f"))) uint64_t xor_words_avx512(const uint64_t* words, size_t count) {
  __m512i sums[4] = {};
  for (size_t i = 0; i < count; i += 32) {
    for (size_t j = 0; j < 4; ++j) {
      sums[j] = _mm512_xor_si512(sums[j], _mm512_load_si512(words + i + 8 * j));
    }
  }
  alignas(64) uint64_t lanes[8];
  _mm512_store_si512(
      lanes, _mm512_xor_si512(_mm512_xor_si512(sums[0], sums[1]), _mm512_xor_si512(sums[2], sums[3])));
  uint64_t sum = 0;
  for (const uint64_t lane : lanes) sum ^= lane;
  return sum;
}

#endif

uint64_t xor_words_portable(const uint64_t* words, size_t count) {
  uint64_t sums[8] = {};
  for (size_t i = 0; i < count; i += 8) {
    for (size_t j = 0; j < 8; ++j) sums[j] ^= words[i + j];
  }
  uint64_t sum = 0;
  for (const uint64_t lane : sums) sum ^= lane;
  return sum;
}

}  // namespace

std::vector<CpuPeak> cpu_peaks() {
  std::vector<CpuPeak> peaks = {{"f32", "", run_f32, kChains * 4 * 2.0}};
#if defined(__x86_64__)
  for (CpuPeak& peak : x86_peaks()) peaks.push_back(std::move(peak));
#endif
  return peaks;
}

uint64_t xor_words(const uint64_t* words, size_t count) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return xor_words_avx512(words, count);
  if (__builtin_cpu_supports("avx2")) return xor_words_avx2(words, count);
#endif
  return xor_words_portable(words, count);
}

}  // namespace fourfold
