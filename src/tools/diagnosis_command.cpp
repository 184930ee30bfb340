#include "tools/diagnosis_command.h"

#include <fmt/format.h>

#include "base/files.h"
#include "tools/candidate_test.h"
#include "tools/commands.h"
#include "tools/self_test.h"
#include "tools/terminal.h"

namespace fourfold {
namespace {

SubjectSource source_of(const DiagnosisTask& task) {
  SubjectSource source;
  source.checkpoint = task.nvfp4;
  source.layer = task.layer;
  source.overrides = overrides_in(task.rules);
  source.gate_up_order = parse_gate_up_order(task.rules.gate_up_order);
  source.scheme = parse_weight_scheme(task.rules.scheme);
  source.seed = task.seed;
  return source;
}

/// Few tokens: every trial computes all of them.
LayerInputs inputs_of(const DiagnosisTask& task) {
  constexpr int64_t kTokens = 8;
  const auto checkpoint = Checkpoint::open(task.nvfp4);
  const ExpertLayer layer =
      load_experts(checkpoint, task.layer, {}, source_of(task).gate_up_order, source_of(task).scheme);
  const ExpertWeights& weights = layer.weights;
  // A planted engine holds every expert in float32, on each thread.
  int64_t bytes = 0;
  const int64_t matrix = weights.hidden * weights.intermediate;
  if (__builtin_mul_overflow(weights.count() * 24, matrix, &bytes)) bytes = INT64_MAX;
  require_memory(bytes, "layertest --self-test with this checkpoint (a smaller model will do)");
  if (!task.input.empty()) return read_inputs(task.input, task.layer, weights.hidden, kTokens);
  return make_inputs(kTokens, weights.hidden, task.seed, false);
}

}  // namespace

void add_diagnosis_options(CLI::App& layertest, DiagnosisArguments& arguments) {
  CLI::Option* candidate =
      layertest
          .add_option("--candidate", arguments.candidate,
                      "what a serving engine computed: safetensors or npz with x, output and perhaps "
                      "topk_ids, topk_weights, h, activation, x_codes, x_scales; or .npy files named after "
                      "these: compared with the reference, and explained (docs/diagnosis.md)")
          ->check(nonempty());
  std::vector<std::string> formats = {"auto"};
  formats.insert(formats.end(), std::begin(kActivationFormats), std::end(kActivationFormats));
  layertest
      .add_option("--activation-format", arguments.activation_format,
                  "what the engine of --candidate does to activations; auto: whatever fits best")
      ->capture_default_str()
      ->check(CLI::IsMember(formats))
      ->needs(candidate);
  CLI::Option* self_test =
      layertest.add_flag("--self-test", arguments.self_test,
                         "plant every known fault in an engine and see whether the diagnosis names it");
  layertest
      .add_option(
          "--trials", arguments.trials,
          "of --self-test: sound engines; pairs of faults are a quarter as many; with fewer than 200, "
          "faults are planted in fewer layers")
      ->capture_default_str()
      ->check(whole_number<int64_t>())
      ->check(CLI::Range(int64_t{1}, int64_t{100'000}))
      ->needs(self_test);
  for (const char* name : {"--original", "--layers", "--all-layers", "--stress", "--experts", "--tokens",
                           "--activations", "--activation-scale", "--activation-rule", "--gate-up",
                           "--accumulate", "--backend", "--isa", "--double-quantize"}) {
    candidate->excludes(name);
    self_test->excludes(name);
  }
  self_test->excludes(candidate)->excludes("--html");
}

int diagnose_candidate(const DiagnosisTask& task) {
  const Progress progress;
  CandidateRequest request;
  request.candidate = task.diagnosis.candidate;
  request.input = task.input;
  request.source = source_of(task);
  request.activation_format = task.diagnosis.activation_format;
  request.progress = [&](std::string_view what) { progress.show(what); };
  const CandidateReport report = run_candidate_test(request);
  progress.clear();
  fmt::print("{}", format_candidate(report));
  if (!task.json.empty()) write_file(task.json, candidate_json(report));
  if (!task.html.empty()) write_file(task.html, candidate_html(report));
  return report.verdict == "fine" ? kExitFine : kExitFinding;
}

int test_itself(const DiagnosisTask& task) {
  const Progress progress;
  SelfTestRequest request;
  std::optional<LoadedSubject> loaded;
  if (!task.nvfp4.empty()) {
    loaded.emplace(source_of(task), inputs_of(task));
    request.subject = &loaded->subject();
    request.subject_name = fmt::format("{}, layer {}: {} tokens, x: {}", task.nvfp4, task.layer,
                                       loaded->subject().tokens, loaded->inputs().x_origin);
  } else if (!task.input.empty()) {
    throw CLI::RequiredError("--nvfp4 beside --input");
  }
  request.seed = task.seed;
  request.sound_trials = task.diagnosis.trials;
  request.progress = [&](std::string_view what) { progress.show(what); };
  const SelfTestReport report = run_self_test(request);
  progress.clear();
  fmt::print("{}", format_self_test(report));
  if (!task.json.empty()) write_file(task.json, self_test_json(report));
  return report.passes() ? kExitFine : kExitFinding;
}

}  // namespace fourfold
