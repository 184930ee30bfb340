// The faults that are known: how engines and converters go wrong in the field (docs/diagnosis.md).
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "diagnosis/deviation.h"
#include "diagnosis/subject.h"

namespace fourfold::diagnosis {

/// Where a fault acts.
enum class FaultPlace : uint8_t { kWeights, kStaging, kActivation, kRouting, kExperts, kCombine };
std::string_view to_string(FaultPlace place);

struct Fault {
  std::string id;        ///< stable, e.g. "scales-transposed.w13"
  std::string sentence;  ///< what the engine does, e.g. "block scales of w13 are read as (K_sf, N)"
  std::string remedy;    ///< where to look
  FaultPlace place = FaultPlace::kWeights;
  bool needs_nvfp4_staging = false;  ///< nothing happens where activations are staged otherwise
  void (*apply)(Deviation&, const Fault&) = nullptr;
  int code = 0;  ///< of the wrong e2m1 table, ranks, tile or tail: what `apply` takes from here
  float value = 0.0f;

  void apply_to(Deviation& deviation) const { apply(deviation, *this); }
};

/// Those that could happen to this layer, with w13 and w2 told apart where weights are read.
std::vector<Fault> known_faults(const Subject& subject);

/// e2m1's code 1 to 7 decoded as `value` in all weights.
Fault wrong_code_fault(int code, float value);
/// Whether it is one of those.
bool is_wrong_code(const Fault& fault);
/// What a code could be taken for.
std::vector<float> wrong_values_of(int code);

/// Whether both can be there: neither undoes or replaces what the other does.
bool can_be_combined(const Fault& a, const Fault& b);

}  // namespace fourfold::diagnosis
