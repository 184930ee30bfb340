#include "tools/rule_options.h"

#include <fmt/format.h>

#include "fourfold/error.h"
#include "tools/commands.h"

namespace fourfold {

void add_rule_options(CLI::App& command, RuleArguments& arguments, const std::string& model) {
  command
      .add_option("--activation", arguments.activation,
                  "the function between the GEMMs, instead of the config's: swiglu, swiglu-step, geglu, "
                  "geglu-tanh, relu2, silu or gelu, with ,alpha=A ,beta=B ,limit=L, e.g. swiglu,limit=10")
      ->check(nonempty("an activation"));
  command
      .add_option("--router", arguments.router,
                  "how the checkpoint's router is computed, instead of the config's: softmax, "
                  "softmax-of-top-k, sigmoid or sqrt-softplus, with ,top-k=K ,renormalise=yes|no ,scale=F "
                  ",groups=G ,top-groups=N")
      ->check(nonempty("a router"));
  command.add_flag("--weight-on-input", arguments.weight_on_input,
                   "routing weights multiply an expert's input instead of its output (Llama-4)");
  command
      .add_option("--gate-up-order", arguments.gate_up_order,
                  "order of gate and up in fused tensors (default: the family's)")
      ->check(CLI::IsMember({"gate-first", "up-first", "interleaved"}));
  command
      .add_option(
          "--scheme", arguments.scheme,
          fmt::format("how to read the four-bit weights of {}, instead of what tensor names and types say: "
                      "modelopt (global scales multiply), compressed-tensors (they divide) or mxfp4",
                      model))
      ->check(CLI::IsMember({"modelopt", "compressed-tensors", "mxfp4"}));
}

RuleOverrides overrides_in(const RuleArguments& arguments) {
  RuleOverrides overrides;
  overrides.weight_on_input = arguments.weight_on_input;
  try {
    if (!arguments.activation.empty()) overrides.activation = parse_activation(arguments.activation);
    if (!arguments.router.empty()) overrides.router = parse_router(arguments.router);
  } catch (const Error& error) {
    throw CLI::ValidationError(error.what());
  }
  return overrides;
}

}  // namespace fourfold
