#include "tools/command_line.h"

#include <fmt/format.h>

#include <csignal>
#include <cstdio>
#include <exception>
#include <new>
#include <string>
#include <string_view>

#include "base/mapped_file.h"
#include "fourfold/error.h"
#include "fourfold/moe_layer.h"
#include "tools/commands.h"
#include "tools/terminal.h"

namespace fourfold {
namespace {

std::string version_text() {
  std::string text = fmt::format("fourfold {}\nbackends, best first:", FOURFOLD_VERSION);
  for (const Backend* backend : backends()) {
    const std::string reason = backend->why_unavailable();
    text += fmt::format("\n  {:<10} {}{}", backend->name(), backend->description(),
                        reason.empty() ? "" : "; not here: " + reason);
  }
  return text;
}

/// Says what went wrong: first of all, that what was read is void, since anything else follows from that.
int report(const char* message) {
  std::string text = message;
  try {
    require_mapped_files_intact();
  } catch (const std::exception& error) {
    text = error.what();
  }
  fmt::print(stderr, "fourfold: {}\n", printable(text));
  return kExitError;
}

/// Results that could not be written are no success.
int finish(int exit_code) {
  if (std::fflush(stdout) == 0 && !std::ferror(stdout)) return exit_code;
  fmt::print(stderr, "fourfold: can't write to standard output\n");
  return kExitError;
}

}  // namespace

int run_command_line(int argc, char** argv) {
  int exit_code = kExitFine;
  std::signal(SIGXFSZ, SIG_IGN);  // a file that grows too large is an error of write(), with its message
  guard_mapped_files();           // so is a model that is truncated while it is read
  try {
    CLI::App app(
        "NVFP4-native mixture-of-experts inference: run a layer, and find out why its numbers are wrong.");
    app.name("fourfold");
    app.set_version_flag("--version", version_text());
    app.require_subcommand(1);
    add_layertest(app, exit_code);
    add_synthesize(app, exit_code);
    add_gemmtest(app, exit_code);
    add_bench(app, exit_code);
    add_calibrate(app, exit_code);
    add_inspect(app, exit_code);
    add_convert(app, exit_code);
    add_doctor(app, exit_code);
    try {
      app.parse(argc, argv);
    } catch (const CLI::ParseError& error) {
      return finish(app.exit(error) == 0 ? kExitFine : kExitUsage);
    }
    require_mapped_files_intact();  // of commands that did not ask
  } catch (const std::bad_alloc&) {
    fmt::print(stderr, "fourfold: out of memory\n");
    return kExitError;
  } catch (const std::exception& error) {
    return report(error.what());
  }
  return finish(exit_code);
}

}  // namespace fourfold
