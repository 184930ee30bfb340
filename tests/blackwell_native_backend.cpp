// The backend "blackwell" as it is: what the layer tests beside it run where there is such a GPU.
#include "cuda_support.h"
#include "tested_backend.h"

namespace fourfold {

const Backend& tested_backend() {
  return blackwell_backend();
}

std::string why_not_on_this_gpu() {
  return tested_backend().why_unavailable();
}

}  // namespace fourfold
