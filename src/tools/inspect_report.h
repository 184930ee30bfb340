// What `fourfold inspect` prints, as text and as JSON. docs/inspect.md describes both.
#pragma once

#include <string>

#include "fourfold/inspection.h"

namespace fourfold {

/// Problems first. One line a layer; where there is one layer, its matrices in detail. Tensor names are
/// printable.
std::string format_inspection(const std::string& path, const ModelInspection& model);
std::string format_inspection_json(const std::string& path, const ModelInspection& model);

}  // namespace fourfold
