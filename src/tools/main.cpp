// The command `fourfold`.
#include <fmt/format.h>

#include <cstdio>
#include <exception>
#include <new>
#include <string>
#include <string_view>

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

/// Text from files as a terminal may have it: control characters made visible, and an end.
std::string printable(std::string_view text) {
  constexpr size_t kMost = 2000;
  std::string safe;
  for (const char c : text.substr(0, kMost)) {
    const auto byte = static_cast<unsigned char>(c);
    safe += byte < 0x20 || byte == 0x7F ? fmt::format("\\x{:02x}", byte) : std::string(1, c);
  }
  return text.size() > kMost ? safe + " ..." : safe;
}

/// Results that could not be written are no success.
int finish(int exit_code) {
  if (std::fflush(stdout) == 0 && !std::ferror(stdout)) return exit_code;
  fmt::print(stderr, "fourfold: can't write to standard output\n");
  return fourfold::kExitError;
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
      return finish(app.exit(error) == 0 ? fourfold::kExitFine : fourfold::kExitUsage);
    }
  } catch (const std::bad_alloc&) {
    fmt::print(stderr, "fourfold: out of memory\n");
    return fourfold::kExitError;
  } catch (const std::exception& error) {
    fmt::print(stderr, "fourfold: {}\n", printable(error.what()));
    return fourfold::kExitError;
  }
  return finish(exit_code);
}
