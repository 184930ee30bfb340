// Options of `fourfold layertest` that diagnose: --candidate and --self-test.
#pragma once

#include <CLI/CLI.hpp>

#include <cstdint>
#include <string>
#include <vector>

#include "tools/rule_options.h"

namespace fourfold {

/// As given; empty: not given.
struct DiagnosisArguments {
  std::vector<std::string> candidate;
  std::string activation_format = "auto";
  bool self_test = false;
  int64_t trials = 200;
};

/// What the other options of layertest say: the layer, what goes into it, where reports go.
struct DiagnosisTask {
  const DiagnosisArguments& diagnosis;
  const RuleArguments& rules;
  std::string nvfp4, input, json, html;
  int64_t layer = 0;
  uint64_t seed = 0;
};

/// Adds --candidate, --activation-format and --self-test to `layertest`, whose other options must be there
/// already: those that would be ignored beside them are refused.
void add_diagnosis_options(CLI::App& layertest, DiagnosisArguments& arguments);

/// Prints and writes the report; returns the exit code.
int diagnose_candidate(const DiagnosisTask& task);
/// On made-up layers, and on that of --nvfp4 where it is given.
int test_itself(const DiagnosisTask& task);

}  // namespace fourfold
