// The instruction sets of functions. Whole files are compiled for any x86-64: a flag for a file would also
// apply to the inline functions of the standard library in it, and the linker may keep those copies for
// everybody.
#pragma once

#include "base/avx2.h"  // FOURFOLD_INLINE

#define FOURFOLD_AVX2_FEATURES "avx2,fma,f16c"
#define FOURFOLD_AVX512_FEATURES \
  FOURFOLD_AVX2_FEATURES ",avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,prefer-vector-width=512"

#define FOURFOLD_AVX2 [[gnu::target(FOURFOLD_AVX2_FEATURES)]]
#define FOURFOLD_AVX512 [[gnu::target(FOURFOLD_AVX512_FEATURES)]]
// What the tile kernel takes beside AMX; CPUs with tiles have it.
#define FOURFOLD_AMX_VECTORS [[gnu::target(FOURFOLD_AVX512_FEATURES ",avx512fp16,avx512vbmi,avx512vbmi2")]]
#define FOURFOLD_AVX512_BF16 [[gnu::target(FOURFOLD_AVX512_FEATURES ",avx512bf16")]]
#define FOURFOLD_AVX512_VBMI [[gnu::target(FOURFOLD_AVX512_FEATURES ",avx512vbmi")]]
