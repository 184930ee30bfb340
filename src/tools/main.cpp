// The command `fourfold`.
#include <fmt/format.h>

#include <exception>
#include <new>

#include "fourfold/error.h"
#include "fourfold/moe_layer.h"
#include "tools/commands.h"

namespace {

std::string version_text() {
  std::string text = fmt::format("fourfold {}\nbackends, best first:", FOURFOLD_VERSION);
  for (const fourfold::Backend* backend : fourfold::backends()) {
    const std::string reason = backend->why_unavailable();
    text += fmt::format("\n  {:<10} {}{}", backend->name(), backend->description(),
                        reason.empty() ? "" : "; not here: " + reason);
  }
  return text;
}

}  // namespace

int main(int argc, char** argv) {
  int exit_code = fourfold::kExitFine;
  try {
    CLI::App app(
        "NVFP4-native mixture-of-experts inference: run a layer, and find out why its numbers are wrong.");
    app.name("fourfold");
    app.set_version_flag("--version", version_text());
    app.require_subcommand(1);
    fourfold::add_layertest(app, exit_code);
    fourfold::add_synthesize(app, exit_code);
    fourfold::add_gemmtest(app, exit_code);
    try {
      app.parse(argc, argv);
    } catch (const CLI::ParseError& error) {
      return app.exit(error) == 0 ? fourfold::kExitFine : fourfold::kExitUsage;
    }
  } catch (const std::bad_alloc&) {
    fmt::print(stderr, "fourfold: out of memory\n");
    return fourfold::kExitError;
  } catch (const std::exception& error) {
    fmt::print(stderr, "fourfold: {}\n", error.what());
    return fourfold::kExitError;
  }
  return exit_code;
}
