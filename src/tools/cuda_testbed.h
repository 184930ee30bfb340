// The testbed of backends that compute on a GPU.
#pragma once

#include <memory>

#include "tools/testbed.h"

namespace fourfold {

/// `memory` is that of the current device.
std::unique_ptr<Testbed> make_cuda_testbed(const Memory& memory);

}  // namespace fourfold
