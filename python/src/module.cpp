// The extension module fourfold._native. The package around it allocates results and gives everything its
// types and its documentation; what is here takes arrays as they come, checks them and computes.
#include "bindings.h"
#include "failures.h"

namespace fourfold::python {
namespace {

/// The classes of fourfold.errors, by code.
const char* class_name(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidArgument:
      return "InvalidArgumentError";
    case ErrorCode::kBadFile:
      return "BadFileError";
    case ErrorCode::kNotFound:
      return "NotFoundError";
    case ErrorCode::kUnsupported:
      return "UnsupportedError";
    case ErrorCode::kIo:
      return "InputOutputError";
    case ErrorCode::kDevice:
      return "DeviceError";
  }
  return "Error";
}

void translate(const std::exception_ptr& thrown, void*) {
  try {
    std::rethrow_exception(thrown);
  } catch (const Error& error) {
    const nb::object type = nb::module_::import_("fourfold.errors").attr(class_name(error.code()));
    PyErr_SetString(type.ptr(), error.what());
  }
}

}  // namespace

ActivationFormat activation_format(const std::string& name) {
  return parse_name("activations", name, parse_activation_format, "nvfp4, nvfp4x2, fp8 or bf16");
}

ScalePolicy scale_policy(const std::string& name) {
  return parse_name("scale policy", name, parse_scale_policy,
                    "static, max-over-experts, dynamic-tensor or dynamic-token");
}

ScaleRule scale_rule(const char* argument, const std::string& name) {
  return parse_name(argument, name, parse_scale_rule, "amax, four-over-six or mse");
}

}  // namespace fourfold::python

NB_MODULE(_native, module) {
  using namespace fourfold::python;
  module.doc() = "The C++ library behind the package fourfold; its interface may change with any version.";
  nb::register_exception_translator(translate);
  bind_numeric(module);
  bind_gemm(module);
  bind_checkpoint(module);
  bind_layer(module);
}
