// --isa of the commands that take --backend.
#include <fmt/format.h>

#include "fourfold/cpu.h"
#include "tools/commands.h"

namespace fourfold {

void add_isa_option(CLI::App& command) {
  command
      .add_option_function<std::string>(
          "--isa", [](const std::string& name) { force_cpu_isa(name); },
          fmt::format("instruction set of the backend cpu (default: the best that runs here, or {})",
                      kIsaVariable))
      ->check(CLI::IsMember({"amx", "avx512_bf16", "avx512", "avx2", "portable"}));
}

}  // namespace fourfold
