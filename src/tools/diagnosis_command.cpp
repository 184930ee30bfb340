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
  for (const char* name :
       {"--original", "--layers", "--all-layers", "--stress", "--experts", "--tokens", "--activations",
        "--activation-scale", "--gate-up", "--accumulate", "--backend", "--isa", "--double-quantize"}) {
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
  request.seed = task.seed;
  request.progress = [&](std::string_view what) { progress.show(what); };
  const SelfTestReport report = run_self_test(request);
  progress.clear();
  fmt::print("{}", format_self_test(report));
  if (!task.json.empty()) write_file(task.json, self_test_json(report));
  return report.passes() ? kExitFine : kExitFinding;
}

}  // namespace fourfold
