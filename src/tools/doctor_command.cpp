// `fourfold doctor`.
#include <fmt/format.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "base/fail.h"
#include "cpu/isa.h"
#include "fourfold/checkpoint.h"
#include "fourfold/model_family.h"
#include "tools/commands.h"
#include "tools/doctor.h"
#include "tools/terminal.h"

namespace fourfold {
namespace {

struct Arguments {
  std::string model;
  std::optional<int64_t> layer;
};

void print_fact(const std::string& label, const std::string& text) {
  fmt::print("{:<12} {}\n", label, printable(text));
}

void print_trouble(const std::string& label, const std::string& text) {
  fmt::print("{:<12} {}\n", label, red(printable(text)));
}

/// What would run, and why none of the faster ones; false, with the reason printed, where nothing would.
bool print_choice(const std::string& label, const std::function<BackendChoice()>& choose) {
  try {
    const BackendChoice choice = choose();
    print_fact(label, fmt::format("{} ({})", choice.backend->name(), choice.reason));
    return true;
  } catch (const Error& error) {
    print_trouble(label, error.what());
    return false;
  }
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
  return fmt::format("; kernel: {} ({})", plan.kernel, plan.reason);
}

/// The layer of a checkpoint that is asked about.
struct Subject {
  int64_t number = 0;
  ExpertLayer layer;
  LayerConfig config;
  std::string trouble;  ///< why it can't be run; empty where it can
};

/// Throws Error for a model or layer that is not there; what is wrong with one that is goes into `trouble`.
Subject load_subject(const Arguments& arguments) {
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

/// Which backend would run it, for each form of activations. False where none would.
bool print_subject(const Arguments& arguments, const Subject& subject) {
  if (!subject.trouble.empty()) {
    print_trouble("layer", subject.trouble);
    print_fact("", fmt::format("fourfold inspect {} lists everything that is wrong", arguments.model));
    return false;
  }
  const ExpertWeights& weights = subject.layer.weights;
  print_fact("layer", fmt::format("{}, layer {}: {} experts, {}, hidden {}, intermediate {}", arguments.model,
                                  subject.number, subject.config.experts, subject.layer.scheme,
                                  subject.config.hidden, subject.config.intermediate));
  bool fine = true;
  for (const ActivationFormat format : {ActivationFormat::kNvfp4, ActivationFormat::kBf16}) {
    fine &= print_choice(fmt::format("  {}", to_string(format)), [&] {
      LayerOptions options;
      options.activations = format;
      const DefaultPolicies policies = default_scale_policies(weights, format);
      options.x_scale = policies.x;
      options.intermediate_scale = policies.intermediate;
      BackendChoice choice = choose_backend("", weights, subject.config, options);
      choice.reason += kernel_text(choice, weights, subject.config, options);
      return choice;
    });
  }
  return fine;
}

/// False, with the reason printed, where FOURFOLD_ISA or --isa asks for what can't run: every layer on the
/// CPU would be refused.
bool print_forced_isa() {
  try {
    cpu::choose_isa();
    return true;
  } catch (const Error& error) {
    print_trouble("cpu", error.what());
    return false;
  }
}

bool print_self_tests() {
  const Progress progress;
  const std::vector<SelfTest> tests = run_self_tests([&](std::string_view what) { progress.show(what); });
  progress.clear();
  bool fine = true;
  for (const SelfTest& test : tests) {
    fine &= test.is_fine;
    const auto print = test.is_fine ? print_fact : print_trouble;
    print(
        &test == &tests.front() ? "self-test" : "",
        fmt::format("{:<13} {:<6} {} in {:.2f} s{}", test.backend, to_string(test.activations),
                    test.is_fine ? "right" : "WRONG", test.seconds, test.is_fine ? "" : ": " + test.trouble));
  }
  return fine;
}

int execute(const Arguments& arguments) {
  std::optional<Subject> subject;
  if (!arguments.model.empty()) subject = load_subject(arguments);
  for (const auto& [label, text] : describe_machine()) print_fact(label, text);
  bool fine = print_choice("chosen", [] { return choose_backend(""); });
  fine &= print_forced_isa();
  if (subject) fine &= print_subject(arguments, *subject);
  fine &= print_self_tests();
  fmt::print("\n{}\n", fine ? green("this machine is fine") : red("something is wrong: see above"));
  return fine ? kExitFine : kExitFinding;
}

}  // namespace

void add_doctor(CLI::App& app, int& exit_code) {
  auto arguments = std::make_shared<Arguments>();
  CLI::App* command = app.add_subcommand(
      "doctor", "Say what this machine can run, and for a layer which backend and why; test each");
  command->add_option("DIR", arguments->model, "a model directory whose layer is to be run")
      ->check(nonempty());
  command->add_option("--layer", arguments->layer, "layer number (default: the first that has experts)")
      ->check(whole_number<int64_t>());
  add_isa_option(*command);
  command->footer("Exit code: 0 fine, 1 error, 2 usage, 3 something is wrong.");
  command->callback([arguments, command, &exit_code] {
    if (arguments->layer && arguments->model.empty()) {
      throw CLI::RequiredError(fmt::format("{}: --layer: DIR", command->get_name()));
    }
    exit_code = execute(*arguments);
  });
}

}  // namespace fourfold
