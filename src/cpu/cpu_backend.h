// The backend "cpu".
#pragma once

#include <memory>

#include "cpu/kernels.h"
#include "fourfold/moe_layer.h"

namespace fourfold::cpu {

/// The backend with these kernels, whatever is forced. They can run here.
std::unique_ptr<Backend> make_backend(const Kernels& kernels);

}  // namespace fourfold::cpu
