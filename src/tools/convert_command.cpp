// `fourfold convert`. docs/convert.md.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "base/fail.h"
#include "checkpoint/conversion.h"
#include "checkpoint/model_directory.h"
#include "tools/commands.h"
#include "tools/number_list.h"
#include "tools/terminal.h"

namespace fourfold {
namespace {

using Clock = std::chrono::steady_clock;

struct ConvertArguments {
  std::string source, target, to, scheme, scale = "amax", input_scale, layers;
  bool tie_gate_up = false, allow_inexact = false;
};

ConversionRequest request_of(const ConvertArguments& arguments) {
  ConversionRequest request;
  request.to = *parse_target_format(arguments.to);
  if (!arguments.scheme.empty()) request.scheme = parse_weight_scheme(arguments.scheme);
  request.scale = *parse_scale_rule(arguments.scale);
  request.tie_gate_up = arguments.tie_gate_up;
  request.allow_inexact = arguments.allow_inexact;
  request.dynamic_inputs = arguments.input_scale == "dynamic";
  if (!request.dynamic_inputs) request.input_scales = arguments.input_scale;
  if (!arguments.layers.empty()) request.layers = parse_list(arguments.layers, "--layers");
  const bool is_nvfp4 = request.to == TargetFormat::kNvfp4;
  const auto only_nvfp4 = [&](bool given, const char* option) {
    if (given && !is_nvfp4) throw CLI::ValidationError(option, "expected --to nvfp4, found " + arguments.to);
  };
  if (!arguments.scheme.empty() && request.to == TargetFormat::kBf16)
    throw CLI::ValidationError("--scheme", "expected --to nvfp4 or mxfp4, found bf16, which has none");
  only_nvfp4(arguments.scale != "amax", "--scale");
  only_nvfp4(arguments.tie_gate_up, "--tie-gate-up");
  only_nvfp4(arguments.allow_inexact, "--allow-inexact");
  only_nvfp4(!arguments.input_scale.empty(), "--input-scale");
  return request;
}

void report_layer(const LayerConversion& layer, const std::string& to) {
  const bool is_elsewhere = layer.layer == LayerConversion::kElsewhere;
  fmt::print("{}: {} matrices, {} -> {}", is_elsewhere ? "elsewhere" : fmt::format("layer {}", layer.layer),
             layer.matrices, layer.from, to);
  if (layer.unchanged > 0) fmt::print("; {} keep their codes", layer.unchanged);
  if (layer.cast) {
    const CastReport& cast = *layer.cast;
    const double exact = 100.0 * (1.0 - static_cast<double>(cast.inexact) / static_cast<double>(cast.blocks));
    fmt::print("; {}% of {} blocks exact", cast.inexact == 0 ? "100" : fmt::format("{:.6f}", exact),
               cast.blocks);
  }
  fmt::print("\n");
}

/// "12.3 of 60.1 GB, 512 MB/s, 1 min 34 s left", at most five times a second.
class ByteProgress {
 public:
  explicit ByteProgress(const Progress& progress) : progress_(progress) {}

  void show(int64_t done, int64_t total) {
    const auto now = Clock::now();
    if (now - last_ < std::chrono::milliseconds(200)) return;
    last_ = now;
    const double seconds = std::chrono::duration<double>(now - start_).count();
    const double rate = static_cast<double>(done) / seconds;
    const auto left = static_cast<int64_t>(static_cast<double>(total - done) / std::max(rate, 1.0));
    progress_.show(fmt::format("{:.2f} of {:.2f} GB, {:.0f} MB/s, {} min {} s left",
                               static_cast<double>(done) / 1e9, static_cast<double>(total) / 1e9, rate / 1e6,
                               left / 60, left % 60));
  }

 private:
  const Progress& progress_;
  Clock::time_point start_ = Clock::now(), last_ = {};
};

int execute(const ConvertArguments& arguments) {
  ConversionRequest request = request_of(arguments);
  require_apart(arguments.source, arguments.target, "SRC");
  const Progress progress;
  request.progress = [&](std::string_view what) { progress.show(what); };
  const auto start = Clock::now();
  const auto conversion = plan_conversion(Checkpoint::open(arguments.source), request);
  ByteProgress bytes(progress);
  const WrittenModel written = write_model(arguments.target, conversion->plan,
                                           [&](int64_t done, int64_t total) { bytes.show(done, total); });
  progress.clear();
  for (const LayerConversion& layer : conversion->layers) report_layer(layer, arguments.to);
  for (const std::string& note : conversion->notes) fmt::print("note: {}\n", printable(note));
  fmt::print("{}: {:.1f} MB of tensors and {} other files, in {:.1f} s\n", arguments.target,
             static_cast<double>(written.tensor_bytes) / 1e6, written.files,
             std::chrono::duration<double>(Clock::now() - start).count());
  return kExitFine;
}

}  // namespace

void add_convert(CLI::App& app, int& exit_code) {
  auto arguments = std::make_shared<ConvertArguments>();
  CLI::App* command =
      app.add_subcommand("convert", "Write a model with its experts in another format or scheme");
  command->add_option("SRC", arguments->source, "a model directory; stays as it is")
      ->required()
      ->check(nonempty());
  command->add_option("DST", arguments->target, "the directory to make; appears when it is complete")
      ->required()
      ->check(nonempty());
  command->add_option("--to", arguments->to, "format of the experts")
      ->required()
      ->check(CLI::IsMember({"nvfp4", "mxfp4", "bf16"}));
  command
      ->add_option("--scheme", arguments->scheme,
                   "whose names, global scales and config (default: the source's, else modelopt)")
      ->check(CLI::IsMember({"modelopt", "compressed-tensors"}));
  command
      ->add_option(
          "--scale", arguments->scale,
          "block scales of weights that are quantized to NVFP4: amax / 6, amax / 6 or amax / 4, or a "
          "search for the smallest squared error")
      ->capture_default_str()
      ->check(CLI::IsMember({"amax", "four-over-six", "mse"}));
  command->add_flag("--tie-gate-up", arguments->tie_gate_up,
                    "one global scale for gate and up of an expert, for engines that read one alone");
  command->add_flag("--allow-inexact", arguments->allow_inexact,
                    "round the blocks of MXFP4 that NVFP4 can't hold, instead of refusing");
  command
      ->add_option("--input-scale", arguments->input_scale,
                   "a safetensors file of input scales (docs/convert.md), or dynamic: write none (default: "
                   "keep the source's)")
      ->check(nonempty());
  command
      ->add_option("--layers", arguments->layers, "these alone, e.g. 0-3,7; others are carried as they are")
      ->check(nonempty("layers"));
  command->footer("Exit code: 0 converted, 1 error, 2 usage. On an error nothing is left at DST.");
  command->callback([arguments, &exit_code] { exit_code = execute(*arguments); });
}

}  // namespace fourfold
