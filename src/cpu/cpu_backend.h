// The backend "cpu".
#pragma once

#include <memory>

#include "cpu/isa.h"
#include "fourfold/moe_layer.h"

namespace fourfold::cpu {

/// The backend with one instruction set, whatever is forced; why_unavailable says why it can't run.
std::unique_ptr<Backend> make_backend(Isa isa);

}  // namespace fourfold::cpu
