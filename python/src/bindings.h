// What the files of the extension module share: each binds one part of the library.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>
#include <string>

#include "fourfold/activations.h"
#include "fourfold/block_scaled.h"
#include "fourfold/moe_layer.h"

namespace fourfold::python {

namespace nb = nanobind;

/// A weight matrix, and what keeps it alive.
struct Weight {
  WeightView view;
  std::shared_ptr<const void> owner;
};

/// Activations as a GEMM reads them, and what keeps them alive.
struct Activations {
  ActivationView view;
  std::shared_ptr<const void> owner;
};

void bind_numeric(nb::module_& module);
void bind_gemm(nb::module_& module);
void bind_checkpoint(nb::module_& module);
void bind_layer(nb::module_& module);

ActivationFormat activation_format(const std::string& name);
ScalePolicy scale_policy(const std::string& name);
/// `argument`: what Python calls it.
ScaleRule scale_rule(const char* argument, const std::string& name);

}  // namespace fourfold::python
