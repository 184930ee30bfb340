// The subcommands of `fourfold`. Each adds itself to the command line and stores its exit code when it ran.
#pragma once

#include <CLI/CLI.hpp>

#include "tools/exit_codes.h"

namespace fourfold {

void add_synthesize(CLI::App& app, int& exit_code);
void add_layertest(CLI::App& app, int& exit_code);
void add_gemmtest(CLI::App& app, int& exit_code);

}  // namespace fourfold
