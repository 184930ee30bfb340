// Which instruction set the backend "cpu" computes with.
#pragma once

#include <string_view>

#include "fourfold/export.h"

namespace FOURFOLD_EXPORT fourfold {

/// Environment variable that forces an instruction set where none is forced by name. "portable" there keeps
/// decoding and the reference from AVX2, too, which give the same bits with it.
inline constexpr const char* kIsaVariable = "FOURFOLD_ISA";

/// Layers and GEMMs of the backend "cpu" that are made from now on compute with `name`: "amx",
/// "avx512_bf16", "avx512", "avx2" or "portable"; "" is the fastest that runs here, the default. Throws Error
/// for a name that is none of these, and for one that can't run here, saying why for each.
void force_cpu_isa(std::string_view name);

}  // namespace fourfold
