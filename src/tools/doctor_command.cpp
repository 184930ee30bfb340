// `fourfold doctor`.
#include <fmt/format.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "base/fail.h"
#include "base/files.h"
#include "cpu/isa.h"
#include "fourfold/checkpoint.h"
#include "fourfold/model_family.h"
#include "tools/commands.h"
#include "tools/doctor.h"
#include "tools/gpu_self_test.h"
#include "tools/terminal.h"

namespace fourfold {
namespace {

struct DoctorArguments {
  std::string model, json;
  bool self_test = false;
  std::optional<int64_t> layer;
};

void print_fact(const std::string& label, const std::string& text) {
  fmt::print("{:<12} {}\n", label, printable(text));
}

void print_trouble(const std::string& label, const std::string& text) {
  fmt::print("{:<12} {}\n", label, red(printable(text)));
}

/// What would run, and why none of the faster ones; or why nothing would.
DoctorChoice choice_of(const std::string& task,
                       const std::function<BackendChoice(std::string& kernel)>& choose) {
  DoctorChoice choice;
  choice.task = task;
  try {
    const BackendChoice chosen = choose(choice.kernel);
    choice.backend = chosen.backend->name();
    choice.reason = chosen.reason;
  } catch (const Error& error) {
    choice.trouble = error.what();
  }
  return choice;
}

void print_choice(const std::string& label, const DoctorChoice& choice) {
  if (!choice.trouble.empty()) return print_trouble(label, choice.trouble);
  print_fact(label, fmt::format("{} ({}{})", choice.backend, choice.reason,
                                choice.kernel.empty() ? "" : "; kernel: " + choice.kernel));
}

/// The kernel that `backend` would take for a plan of a few tokens.
std::string kernel_text(const BackendChoice& choice, const ExpertWeights& weights, const LayerConfig& config,
                        const LayerOptions& options) {
  // One expert tells the kernel and spares the packing of a whole layer.
  ExpertWeights one = weights;
  one.experts.resize(1);
  LayerConfig small = config;
  small.experts = small.top_k = 1;
  const LayerPlan plan = choice.backend->make_layer(one, small, options)->plan(1);
  return fmt::format("{} ({})", plan.kernel, plan.reason);
}

/// The layer of a checkpoint that is asked about.
struct Subject {
  int64_t number = 0;
  ExpertLayer layer;
  LayerConfig config;
  std::string trouble;  ///< why it can't be run; empty where it can
};

/// Throws Error for a model or layer that is not there; what is wrong with one that is goes into `trouble`.
Subject load_subject(const DoctorArguments& arguments) {
  Subject subject;
  try {
    const auto checkpoint = Checkpoint::open(arguments.model);
    const std::vector<int64_t> layers = layers_with_experts(*checkpoint);
    subject.number = arguments.layer.value_or(layers.empty() ? 0 : layers.front());
    subject.layer = load_experts(checkpoint, subject.number);
    subject.config = layer_config(subject.layer, rules_of(checkpoint->config()));
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kNotFound) throw;
    subject.trouble = error.what();
  }
  return subject;
}

/// Which backend would run it, for each form of activations.
DoctorLayer judge(const DoctorArguments& arguments, const Subject& subject) {
  DoctorLayer judged;
  judged.model = arguments.model;
  judged.layer = subject.number;
  judged.trouble = subject.trouble;
  if (!subject.trouble.empty()) return judged;
  const ExpertWeights& weights = subject.layer.weights;
  judged.scheme = subject.layer.scheme;
  judged.config = subject.config;
  for (const ActivationFormat format : {ActivationFormat::kNvfp4, ActivationFormat::kBf16}) {
    judged.choices.push_back(choice_of(std::string(to_string(format)), [&](std::string& kernel) {
      LayerOptions options;
      options.activations = format;
      const DefaultPolicies policies = default_scale_policies(weights, format);
      options.x_scale = policies.x;
      options.intermediate_scale = policies.intermediate;
      const BackendChoice choice = choose_backend("", weights, subject.config, options);
      kernel = kernel_text(choice, weights, subject.config, options);
      return choice;
    }));
  }
  return judged;
}

void print_layer(const DoctorLayer& layer) {
  if (!layer.trouble.empty()) {
    print_trouble("layer", layer.trouble);
    print_fact("", fmt::format("fourfold inspect {} lists everything that is wrong", layer.model));
    return;
  }
  print_fact("layer",
             fmt::format("{}, layer {}: {} experts, {}, hidden {}, intermediate {}", layer.model, layer.layer,
                         layer.config.experts, layer.scheme, layer.config.hidden, layer.config.intermediate));
  for (const DoctorChoice& choice : layer.choices) print_choice("  " + choice.task, choice);
}

/// Why FOURFOLD_ISA or --isa asks for what can't run: every layer on the CPU would be refused. Empty where it
/// can.
std::string forced_isa_trouble() {
  try {
    cpu::choose_isa();
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

void print_self_tests(const std::vector<SelfTest>& tests) {
  for (const SelfTest& test : tests) {
    const auto print = test.is_fine ? print_fact : print_trouble;
    print(
        &test == &tests.front() ? "self-test" : "",
        fmt::format("{:<15} {:<7} {} in {:.2f} s{}", test.backend, to_string(test.activations),
                    test.is_fine ? "right" : "WRONG", test.seconds, test.is_fine ? "" : ": " + test.trouble));
  }
}

int execute(const DoctorArguments& arguments) {
  if (!arguments.json.empty()) require_creatable(arguments.json);
  DoctorReport report;
  if (!arguments.model.empty()) report.layer = judge(arguments, load_subject(arguments));
  report.machine = describe_machine();
  report.chosen = choice_of("", [](std::string&) { return choose_backend(""); });
  report.isa_trouble = forced_isa_trouble();
  const Progress progress;
  report.self_tests = run_self_tests([&](std::string_view what) { progress.show(what); });
  if (arguments.self_test) {
    for (SelfTest& test : run_gpu_self_tests([&](std::string_view what) { progress.show(what); })) {
      report.self_tests.push_back(std::move(test));
    }
  }
  progress.clear();

  for (const auto& [label, text] : report.machine) print_fact(label, text);
  print_choice("chosen", report.chosen);
  if (!report.isa_trouble.empty()) print_trouble("cpu", report.isa_trouble);
  if (report.layer) print_layer(*report.layer);
  print_self_tests(report.self_tests);
  const bool fine = is_fine(report);
  fmt::print("\n{}\n", fine ? green("this machine is fine") : red("something is wrong: see above"));
  if (!arguments.json.empty()) write_file(arguments.json, format_doctor_json(report));
  return fine ? kExitFine : kExitFinding;
}

}  // namespace

void add_doctor(CLI::App& app, int& exit_code) {
  auto arguments = std::make_shared<DoctorArguments>();
  CLI::App* command = app.add_subcommand(
      "doctor", "Say what this machine can run, and for a layer which backend and why; test each");
  command->add_option("DIR", arguments->model, "a model directory whose layer is to be run")
      ->check(nonempty());
  command->add_option("--layer", arguments->layer, "layer number (default: the first that has experts)")
      ->check(whole_number<int64_t>());
  add_isa_option(*command);
  command->add_flag(
      "--self-test", arguments->self_test,
      "test every kernel of the GPU, not one of each backend; for reports of a new kind of GPU");
  command->add_option("--json", arguments->json, "write everything as JSON too (docs/inspect.md)")
      ->check(nonempty());
  command->footer("Exit code: 0 fine, 1 error, 2 usage, 3 something is wrong.");
  command->callback([arguments, command, &exit_code] {
    if (arguments->layer && arguments->model.empty()) {
      throw CLI::RequiredError(fmt::format("{}: --layer: DIR", command->get_name()));
    }
    exit_code = execute(*arguments);
  });
}

}  // namespace fourfold
