// Backends that are deliberately broken: an engine of its own composed of the reference's stages, with one
// bug of the kind that ruins served models in silence.
#pragma once

#include <cstdint>
#include <memory>
#include <ostream>
#include <string>

#include "fourfold/moe_layer.h"

namespace fourfold {

enum class Fault : uint8_t {
  kNone,
  kTransposedScales,      ///< weight scales (N, K_sf) read as (K_sf, N)
  kSwappedNibbles,        ///< even index in the high nibble
  kSwappedGateUp,         ///< up first, gate second
  kGateGlobalForUp,       ///< one global scale for both halves
  kReciprocalGlobal,      ///< weight_scale_2 taken for a divisor
  kDroppedInputScale,     ///< the activations' global scale is lost
  kWrongTieRule,          ///< codes round ties away from zero
  kExpertOffByOne,        ///< expert e computes with the weights of e + 1
  kMissingRoutingWeight,  ///< expert outputs are summed unweighted
  kBlockOf32,             ///< scales read as one per 32 values
};

inline constexpr Fault kPlantedFaults[] = {
    Fault::kTransposedScales,     Fault::kSwappedNibbles,    Fault::kSwappedGateUp, Fault::kGateGlobalForUp,
    Fault::kReciprocalGlobal,     Fault::kDroppedInputScale, Fault::kWrongTieRule,  Fault::kExpertOffByOne,
    Fault::kMissingRoutingWeight, Fault::kBlockOf32,
};

std::string name_of(Fault fault);
inline void PrintTo(Fault fault, std::ostream* out) {
  *out << name_of(fault);
}  // for test listings

/// A backend with this bug.
std::unique_ptr<Backend> make_faulty_backend(Fault fault);

}  // namespace fourfold
