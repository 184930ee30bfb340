// `fourfold calibrate`.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <memory>
#include <utility>

#include "base/fail.h"
#include "base/files.h"
#include "base/mapped_file.h"
#include "checkpoint/model_directory.h"
#include "tools/calibrate.h"
#include "tools/calibrated_copy.h"
#include "tools/commands.h"
#include "tools/number_list.h"
#include "tools/rule_options.h"
#include "tools/terminal.h"

namespace fourfold {
namespace {

struct CalibrateArguments : RuleArguments {
  std::string model, copy, layers, output, backend, unreached = "max";
  std::vector<std::string> inputs;
};

constexpr std::array<std::pair<const char*, UnreachedPolicy>, 3> kPolicies = {
    {{"max", UnreachedPolicy::kMax}, {"skip", UnreachedPolicy::kSkip}, {"error", UnreachedPolicy::kError}}};

CalibrateRequest request_of(const CalibrateArguments& arguments) {
  CalibrateRequest request;
  request.model = arguments.model;
  request.inputs.assign(arguments.inputs.begin(), arguments.inputs.end());
  request.layers = parse_list(arguments.layers, "--layers");
  request.overrides = overrides_in(arguments);
  request.gate_up_order = parse_gate_up_order(arguments.gate_up_order);
  request.scheme = parse_weight_scheme(arguments.scheme);
  request.backend = arguments.backend;
  for (const auto& [name, policy] : kPolicies) {
    if (arguments.unreached == name) request.unreached = policy;
  }
  return request;
}

/// "0.00123-0.0456": smallest and largest scale of the experts that have one.
std::string scale_range(const LayerCalibration& layer, float ExpertAmax::*member) {
  float smallest = 0.0f, largest = 0.0f;
  for (const ExpertAmax& expert : layer.experts) {
    const float amax = expert.*member;
    if (amax == 0.0f) continue;
    smallest = smallest == 0.0f ? amax : std::min(smallest, amax);
    largest = std::max(largest, amax);
  }
  if (largest == 0.0f) return "none";
  return fmt::format("{:.3g}-{:.3g}", smallest / kNvfp4Range, largest / kNvfp4Range);
}

void print_layer(const LayerCalibration& layer) {
  std::vector<int64_t> rows;
  for (const ExpertAmax& expert : layer.experts) rows.push_back(expert.rows);
  std::sort(rows.begin(), rows.end());
  fmt::print("{:>6} {:>8} {:>20} {:>9} {:>20} {:>20}\n", layer.layer, layer.tokens,
             fmt::format("{}/{}/{}", rows.front(), rows[rows.size() / 2], rows.back()),
             layer.unreached.size(), scale_range(layer, &ExpertAmax::x),
             scale_range(layer, &ExpertAmax::intermediate));
}

/// What became of those that have no amax of their own.
const char* outcome(UnreachedPolicy policy) {
  return policy == UnreachedPolicy::kMax ? "they have the largest scale of their layer (--unreached max)"
                                         : "they have no scale (--unreached skip)";
}

void print_experts(const CalibrateResult& result, const char* what,
                   std::vector<int64_t> LayerCalibration::*member, UnreachedPolicy policy) {
  size_t count = 0;
  for (const LayerCalibration& layer : result.layers) count += (layer.*member).size();
  if (count == 0) return;
  fmt::print("{} expert{} {}: {}\n", count, count == 1 ? "" : "s", what, outcome(policy));
  for (const LayerCalibration& layer : result.layers) {
    if ((layer.*member).empty()) continue;
    fmt::print("  layer {}, {} of {}: {} of {}\n", layer.layer, (layer.*member).size(), layer.experts.size(),
               format_list(layer.*member), printable(layer.naming));
  }
}

void print_report(const CalibrateArguments& arguments, const CalibrateRequest& request,
                  const CalibrateResult& result) {
  fmt::print("model        {}\n", printable(arguments.model));
  for (const std::string& input : arguments.inputs) {
    fmt::print("{:<12} {}\n", &input == &arguments.inputs.front() ? "input" : "", printable(input));
  }
  fmt::print("backend      {}\n", printable(result.layers.front().backend));
  for (const LayerCalibration& layer : result.layers) {
    if (layer.backend == result.layers.front().backend) continue;
    fmt::print("             layer {}: {}\n", layer.layer, printable(layer.backend));
  }
  for (const std::string& note : result.notes) fmt::print("note         {}\n", printable(note));
  fmt::print("\n layer   tokens       rows an expert unreached           scales of x  of the intermediate\n");
  for (const LayerCalibration& layer : result.layers) print_layer(layer);
  print_experts(result, "got no token", &LayerCalibration::unreached, request.unreached);
  print_experts(result, "got zeros alone, as x or between the GEMMs", &LayerCalibration::zero,
                request.unreached);
}

/// What can't be written is said before the work.
void require_targets(const CalibrateArguments& arguments) {
  if (!arguments.output.empty()) require_creatable(arguments.output);
  if (arguments.copy.empty()) return;
  if (std::filesystem::exists(std::filesystem::symlink_status(arguments.copy)))
    reject(arguments.copy, "a name that is free", "something there");
  if (!std::filesystem::is_directory(arguments.model))
    reject(arguments.model, "a model directory, since a copy of it is wanted", "something else");
  require_apart(arguments.model, arguments.copy, "DIR");
}

int64_t write_copy(const CalibrateArguments& arguments, const CalibrateRequest& request,
                   const Checkpoint& checkpoint, CalibrateResult& result) {
  const auto show = [&](int64_t done, int64_t total) {
    request.progress(fmt::format("writing {}: {} of {} MB", arguments.copy, done >> 20, total >> 20));
  };
  return write_calibrated_copy(checkpoint, arguments.copy, result, request.scheme, show, result.notes);
}

int execute(const CalibrateArguments& arguments) {
  const Progress progress;
  CalibrateRequest request = request_of(arguments);
  request.progress = [&](std::string_view what) { progress.show(what); };
  require_targets(arguments);
  const auto checkpoint = Checkpoint::open(arguments.model);
  CalibrateResult result = calibrate(checkpoint, request);
  require_mapped_files_intact();
  int64_t scales = 0, matrices = 0;
  if (!arguments.copy.empty()) matrices = write_copy(arguments, request, *checkpoint, result);
  if (!arguments.output.empty()) scales = write_input_scales(arguments.output, *checkpoint, result);
  progress.clear();
  print_report(arguments, request, result);
  if (scales > 0) fmt::print("wrote        {}: {} input scales\n", printable(arguments.output), scales);
  if (matrices > 0) {
    fmt::print("wrote        {}: a copy with input scales of {} matrices\n", printable(arguments.copy),
               matrices);
  }
  return kExitFine;
}

}  // namespace

void add_calibrate(CLI::App& app, int& exit_code) {
  auto arguments = std::make_shared<CalibrateArguments>();
  CLI::App* command = app.add_subcommand(
      "calibrate", "Run activations through a model's experts, and write the input scales that fit them");
  command->add_option("DIR", arguments->model, "a model directory")->required()->check(nonempty());
  command
      ->add_option("DST", arguments->copy, "a copy of DIR, to be made, with these scales; all else as it is")
      ->check(nonempty());
  command
      ->add_option("--input", arguments->inputs,
                   "safetensors with x [T, H], and optionally topk_ids and topk_weights [T, K], or token_ids "
                   "[T]; or the same of several layers, named layers.L.x ...; several files add up")
      ->required()
      ->check(nonempty());
  command
      ->add_option("--layers,--layer", arguments->layers,
                   "layers to calibrate, e.g. 0,3,8-11 (default: all that the inputs are of)")
      ->check(nonempty("layers"));
  command
      ->add_option("--output", arguments->output,
                   "safetensors file for the scales, for convert --input-scale (docs/calibrate.md)")
      ->check(nonempty());
  command
      ->add_option("--unreached", arguments->unreached,
                   "experts that no token reaches: the layer's largest scale, no scale, or an error")
      ->capture_default_str()
      ->check(CLI::IsMember({"max", "skip", "error"}));
  add_rule_options(*command, *arguments, "DIR");
  command->add_option(
      "--backend", arguments->backend,
      fmt::format("backend that runs the experts (default: the best that can, or {})", kBackendVariable));
  add_isa_option(*command);
  command->footer("Exit code: 0 fine, 1 error, 2 usage.");
  command->callback([arguments, &exit_code] {
    if (arguments->output.empty() && arguments->copy.empty())
      throw CLI::ValidationError("expected --output FILE or DST, found neither");
    exit_code = execute(*arguments);
  });
}

}  // namespace fourfold
