#include <fmt/format.h>

#include <algorithm>

#include "tools/commands.h"

namespace fourfold {

void add_activation_rule(CLI::App& command, std::string& rule) {
  command
      .add_option("--activation-rule", rule,
                  "block scales of nvfp4 activations: amax / 6, amax / 6 or amax / 4 (four-over-six), or a "
                  "search (mse), whichever errs least; others than amax on the backends reference and cpu")
      ->capture_default_str()
      ->check(CLI::IsMember({"amax", "four-over-six", "mse"}));
}

ScaleRule activation_rule_in(const std::string& text, std::span<const ActivationFormat> formats) {
  const ScaleRule rule = *parse_scale_rule(text);
  const auto other = std::find_if(formats.begin(), formats.end(),
                                  [](ActivationFormat format) { return format != ActivationFormat::kNvfp4; });
  if (rule != ScaleRule::kAmax && other != formats.end()) {
    throw CLI::ValidationError(
        "--activation-rule",
        fmt::format("expected --activations nvfp4 beside {}, found {}", text, to_string(*other)));
  }
  return rule;
}

}  // namespace fourfold
