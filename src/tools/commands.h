// The subcommands of `fourfold`. Each adds itself to the command line and stores its exit code when it ran.
#pragma once

#include <CLI/CLI.hpp>

namespace fourfold {

enum ExitCode : int {
  kExitFine = 0,
  kExitError = 1,    ///< bad input, or the system refused
  kExitUsage = 2,    ///< the command line makes no sense
  kExitFinding = 3,  ///< it ran, and the numbers disagree
};

void add_synthesize(CLI::App& app, int& exit_code);
void add_layertest(CLI::App& app, int& exit_code);
void add_gemmtest(CLI::App& app, int& exit_code);

}  // namespace fourfold
