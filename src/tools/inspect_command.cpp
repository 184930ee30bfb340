// `fourfold inspect`.
#include <fmt/format.h>

#include <limits>
#include <memory>
#include <optional>

#include "base/files.h"
#include "tools/commands.h"
#include "tools/inspect_report.h"
#include "tools/terminal.h"

namespace fourfold {
namespace {

struct InspectArguments {
  std::string model, json, scheme;
  std::optional<int64_t> layer;
  int64_t most_unsampled_bytes = kMostUnsampledBytes;
  bool all_codes = false;
};

int execute(const InspectArguments& arguments) {
  if (!arguments.json.empty()) require_creatable(arguments.json);
  const Progress progress;
  InspectOptions options;
  if (arguments.layer) options.layers = {*arguments.layer};
  options.most_unsampled_bytes =
      arguments.all_codes ? std::numeric_limits<int64_t>::max() : arguments.most_unsampled_bytes;
  options.scheme = parse_weight_scheme(arguments.scheme);
  options.progress = [&](std::string_view what) { progress.show(what); };
  const ModelInspection model = inspect_model(arguments.model, options);
  progress.clear();
  if (!arguments.json.empty()) write_file(arguments.json, format_inspection_json(arguments.model, model));
  fmt::print("{}", format_inspection(arguments.model, model));
  return model.findings.empty() ? kExitFine : kExitFinding;
}

}  // namespace

void add_inspect(CLI::App& app, int& exit_code) {
  auto arguments = std::make_shared<InspectArguments>();
  CLI::App* command =
      app.add_subcommand("inspect", "Say what a model's MoE layers hold, and what is wrong with them");
  command->add_option("DIR", arguments->model, "a model directory, or one .safetensors file")
      ->required()
      ->check(nonempty());
  command->add_option("--layer", arguments->layer, "this layer alone, in detail (default: all)")
      ->check(whole_number<int64_t>());
  CLI::Option* all_codes =
      command->add_flag("--all-codes", arguments->all_codes, "read every code of every layer");
  command
      ->add_option("--sample-above", arguments->most_unsampled_bytes,
                   fmt::format("where the layers hold more bytes than this together, read one run of rows of "
                               "their codes in {}",
                               kSampledOneIn))
      ->capture_default_str()
      ->check(whole_number<int64_t>())
      ->excludes(all_codes);
  command
      ->add_option("--scheme", arguments->scheme,
                   "how to read four-bit weights, instead of what tensor names and types say: modelopt "
                   "(global scales multiply), compressed-tensors (they divide) or mxfp4")
      ->check(CLI::IsMember({"modelopt", "compressed-tensors", "mxfp4"}));
  command->add_option("--json", arguments->json, "write everything as JSON too (docs/inspect.md)")
      ->check(nonempty());
  command->footer("Exit code: 0 clean, 1 error, 2 usage, 3 something is wrong.");
  command->callback([arguments, &exit_code] { exit_code = execute(*arguments); });
}

}  // namespace fourfold
