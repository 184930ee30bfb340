// Exit codes of the command `fourfold`.
#pragma once

namespace fourfold {

enum ExitCode : int {
  kExitFine = 0,
  kExitError = 1,    ///< bad input, or the system refused
  kExitUsage = 2,    ///< the command line makes no sense
  kExitFinding = 3,  ///< it ran, and the numbers disagree
};

}  // namespace fourfold
