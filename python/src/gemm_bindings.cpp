// Backends, and their GEMMs.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstdlib>

#include "arrays.h"
#include "bindings.h"
#include "failures.h"
#include "fourfold/memory.h"

namespace fourfold::python {
namespace {

Device device_of(const ActivationView& a) {
  return a.format == ActivationFormat::kBf16 ? a.values.device : a.codes.device;
}

OutputView output(const ArrayView& array) {
  if (array.is(Element::kF32)) return f32_matrix(array);
  return bf16_matrix(array);
}

void require_device(const Backend& backend, std::string_view what, Device found) {
  if (found == backend.memory().device()) return;
  const auto name = [](Device device) {
    return device.kind == Device::Kind::kHost ? std::string("the host")
                                              : fmt::format("cuda:{}", device.index);
  };
  reject(what,
         fmt::format("memory of {}, where the backend {} computes", name(backend.memory().device()),
                     backend.name()),
         fmt::format("memory of {}; copy it, or name another backend", name(found)));
}

/// The backend of that name. Without a name: the best that computes in `place`, where the operands are; where
/// there is none, or FOURFOLD_BACKEND names one, the choice for any place.
const Backend& backend_for(const std::string& name, Device place) {
  const Backend& best = *choose_backend(name).backend;
  const char* const variable = std::getenv("FOURFOLD_BACKEND");  // empty is as good as none
  const bool forced = !name.empty() || (variable != nullptr && *variable != '\0');
  if (forced || best.memory().device() == place) return best;
  for (const Backend* backend : backends()) {
    if (backend->why_unavailable().empty() && backend->memory().device() == place) return *backend;
  }
  return best;
}

/// Computes d = a . b^T by groups of rows; one group: a plain GEMM. Returns the backend's name.
std::string multiply(const Activations& a, const std::vector<const Weight*>& b,
                     const std::optional<Array>& offset_array, const WritableArray& d_array,
                     const std::string& backend_name, uintptr_t stream) {
  const ArrayView d = view_of(d_array, "out");
  const Backend& backend = backend_for(backend_name, device_of(a.view));
  require_device(backend, "a", device_of(a.view));
  require_device(backend, "out", d.device);
  GroupedGemmArgs args;
  std::vector<WeightView> weights;
  for (const Weight* weight : b) {
    require_device(backend, "b", fourfold::device_of(weight->view));
    weights.push_back(weight->view);
  }
  args.a = a.view;
  args.b = weights;
  args.d = output(d);
  args.stream = reinterpret_cast<void*>(stream);
  if (offset_array) {
    const ArrayView offsets = view_of(*offset_array, "group_offsets");
    require_device(backend, "group_offsets", offsets.device);
    args.group_offsets = i32_vector(offsets);
  }
  const GemmArgs dense = {args.a, weights.at(0), args.d, args.accumulation, {}, args.stream};
  const std::array<int32_t, 2> one_group = {0, static_cast<int32_t>(a.view.rows)};
  if (offset_array) {
    validate_shapes(args);
  } else {
    validate(dense);
    args.group_offsets = one_group;  // for the workspace's size alone
  }
  const nb::gil_scoped_release release;
  const Buffer workspace = backend.memory().allocate(backend.gemm_workspace_bytes(args));
  args.workspace = {workspace.data(), workspace.bytes()};
  if (offset_array) {
    backend.grouped_gemm(args);
  } else {
    GemmArgs with_workspace = dense;
    with_workspace.workspace = args.workspace;
    backend.gemm(with_workspace);
  }
  backend.memory().synchronize();  // the workspace goes
  return std::string(backend.name());
}

}  // namespace

void bind_gemm(nb::module_& module) {
  module.def("backends", [] {
    nb::list all;
    for (const Backend* backend : backends()) {
      all.append(nb::make_tuple(std::string(backend->name()), std::string(backend->description()),
                                backend->why_unavailable()));
    }
    return all;
  });
  module.def(
      "choose_backend",
      [](const std::string& forced) {
        const BackendChoice choice = choose_backend(forced);
        return nb::make_tuple(std::string(choice.backend->name()), choice.reason);
      },
      nb::arg("forced"));
  module.def("multiply", multiply, nb::arg("a"), nb::arg("b"), nb::arg("group_offsets").none(),
             nb::arg("out"), nb::arg("backend"), nb::arg("stream"));
}

}  // namespace fourfold::python
