// The command `fourfold` from its words to its exit code.
#pragma once

namespace fourfold {

/// Runs the subcommand that the words name, prints its errors to stderr, and gives the exit code
/// (tools/exit_codes.h).
int run_command_line(int argc, char** argv);

}  // namespace fourfold
