// Which activations native FP4 multiplies take.
#pragma once

#include <string>

#include "base/fail.h"
#include "fourfold/activations.h"

namespace fourfold::blackwell {

/// Why not activations in `format`, and what to do instead; empty when they can be multiplied.
inline std::string why_not_activations(ActivationFormat format) {
  if (is_nvfp4(format)) return "";
  return fmt::format(
      "{} activations: its tensor cores multiply FP4 by FP4; nvfp4x2 comes closest in accuracy, the backend "
      "cpu "
      "multiplies {}",
      to_string(format), to_string(format));
}

}  // namespace fourfold::blackwell
