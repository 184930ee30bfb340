// Options that say what a layer's tensors and config.json do not, or say wrong.
#pragma once

#include <CLI/CLI.hpp>

#include <string>

#include "fourfold/model_family.h"

namespace fourfold {

/// As given; empty: not given.
struct RuleArguments {
  std::string activation, router, gate_up_order, scheme;
  bool weight_on_input = false;
};

/// Adds --activation, --router, --weight-on-input, --gate-up-order and --scheme. `model` is what the command
/// line calls the checkpoint that --scheme speaks of.
void add_rule_options(CLI::App& command, RuleArguments& arguments, const std::string& model);

/// Throws CLI::ValidationError for rules that can't be read.
RuleOverrides overrides_in(const RuleArguments& arguments);

}  // namespace fourfold
