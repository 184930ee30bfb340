// `fourfold bench`: the command line, what is printed as cases come in, and the exit code.
#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <set>

#include "base/fail.h"
#include "base/files.h"
#include "tools/bench.h"
#include "tools/bench_report.h"
#include "tools/commands.h"
#include "tools/terminal.h"

namespace fourfold {
namespace {

struct BenchArguments {
  std::string shape = "qwen3-30b-a3b", tokens = "1,16,256", backends, activations = "nvfp4", activation_scale,
              activation_rule = "amax", routing = "uniform", threads, json;
  int64_t experts = 0;
  int repeats = TimingLimits{}.min_samples;
  double min_time = TimingLimits{}.min_seconds;
  bool stages = false, profile = false;
  uint64_t seed = 0;
};

constexpr int64_t kMostTokens = 1 << 20;
constexpr int64_t kMostExtent = 1 << 20;
constexpr int64_t kMostExperts = 1 << 16;
constexpr int64_t kMostThreads = 4096;

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

/// "1,4,16": numbers from 1 to `most`, in the order given.
template <class T>
std::vector<T> parse_counts(const std::string& text, const char* option, int64_t most) {
  std::vector<T> counts;
  for (const std::string& part : split(text)) {
    int64_t count = 0;
    int64_t* const fields[] = {&count};
    if (!parse_numbers(part, fields) || count < 1 || count > most) {
      throw CLI::ValidationError(
          option, fmt::format("expected numbers from 1 to {}, with commas; found '{}'", most, text));
    }
    counts.push_back(static_cast<T>(count));
  }
  return counts;
}

std::vector<ActivationFormat> parse_formats(const std::string& text) {
  std::vector<ActivationFormat> formats;
  for (const std::string& name : split(text)) {
    const auto format = parse_activation_format(name);
    if (!format) {
      throw CLI::ValidationError("--activations",
                                 fmt::format("expected nvfp4, nvfp4x2, fp8 or bf16, or several with commas; "
                                             "found '{}'",
                                             text));
    }
    formats.push_back(*format);
  }
  return formats;
}

void set_policies(BenchRequest& request, const std::string& text) {
  if (text.empty()) return;
  const DefaultPolicies policies = parse_scale_policies(text);
  request.x_scale = policies.x;
  request.intermediate_scale = policies.intermediate;
}

/// Refuses a file that is not there before anything is measured.
RoutingSource routing_of(const std::string& text) {
  RoutingSource source = parse_routing(text);
  std::error_code error;
  if (source.kind == RoutingKind::kFile && !std::filesystem::exists(source.file, error)) {
    fail(ErrorCode::kNotFound,
         "--routing: expected uniform, zipf, one-expert, sequences or a file, found no file '{}'", text);
  }
  return source;
}

void require_extents(const LayerShape& shape) {
  const auto fits = [](int64_t extent) { return extent >= 16 && extent <= kMostExtent && extent % 16 == 0; };
  if (!fits(shape.hidden) || !fits(shape.intermediate) || shape.experts < 1 || shape.experts > kMostExperts ||
      shape.top_k < 1 || shape.top_k > shape.experts) {
    throw CLI::ValidationError(
        "--shape",
        fmt::format("expected experts from 1 to {}, H and I that are multiples of 16 up to {}, and "
                    "top-k from 1 to the number of experts; found '{}'",
                    kMostExperts, kMostExtent, shape.name));
  }
}

/// Where no backend is named, of the best one here.
void require_gpu(const BenchRequest& request) {
  std::vector<const Backend*> backends = request.backends;
  if (backends.empty()) backends.push_back(choose_backend("").backend);
  for (const Backend* backend : backends) {
    if (!backend->why_unavailable().empty()) continue;  // its cases say so
    if (backend->memory().device().kind != Device::Kind::kHost) continue;
    throw CLI::ValidationError(
        "--profile",
        fmt::format("expected a backend on a GPU, found '{}'; --backend names one", backend->name()));
  }
}

BenchRequest request_of(const BenchArguments& arguments) {
  BenchRequest request;
  request.shapes = parse_shapes(arguments.shape);
  for (const LayerShape& shape : request.shapes) require_extents(shape);
  request.tokens = parse_counts<int64_t>(arguments.tokens, "--tokens", kMostTokens);
  request.activations = parse_formats(arguments.activations);
  set_policies(request, arguments.activation_scale);
  request.activation_rule = activation_rule_in(arguments.activation_rule, request.activations);
  request.routing = routing_of(arguments.routing);
  request.most_experts = arguments.experts;
  if (!arguments.threads.empty()) {
    request.threads = parse_counts<int>(arguments.threads, "--threads", kMostThreads);
  }
  request.timing = {arguments.min_time, arguments.repeats};
  request.stages = arguments.stages;
  request.profile = arguments.profile;
  request.seed = arguments.seed;
  if (!arguments.backends.empty()) {
    for (const std::string& name : split(arguments.backends)) request.backends.push_back(&find_backend(name));
  }
  if (request.profile) require_gpu(request);
  return request;
}

void print_head(const BenchRequest& request) {
  fmt::print(
      "routing      {}; a different one each call, cold: caches hold none of a call's weights unless it "
      "says warm\n",
      request.routing.describe());
  fmt::print(
      "floor        max((weights of the experts hit + x + y) / read bandwidth, operations / peak); m: "
      "memory, a: arithmetic\n");
  fmt::print("check        sampled rows of every stage against float64 in this run; limit of rel L2 3e-3\n");
}

int execute(const BenchArguments& arguments) {
  const BenchRequest request = request_of(arguments);
  if (!arguments.json.empty()) require_creatable(arguments.json);
  const Progress progress;
  std::vector<MachineReport> machines;
  std::vector<BenchResult> results;
  bool has_head = false;
  BenchListener listener;
  listener.progress = [&](std::string_view what) { progress.show(what); };
  listener.machine = [&](const MachineReport& machine) {
    progress.clear();
    machines.push_back(machine);
    fmt::print("{}", format_machine(machine));
    has_head = false;
  };
  listener.result = [&](const BenchResult& result) {
    progress.clear();
    results.push_back(result);
    if (!has_head) fmt::print("\n{}", format_case_head());
    has_head = true;
    fmt::print("{}", format_case(result));
    std::fflush(stdout);
    if (!arguments.json.empty()) {
      write_file(arguments.json, format_bench_json(request, machines, results));
    }
  };
  print_head(request);
  run_bench(request, listener);
  const auto ran = [](const BenchResult& result) { return result.not_run.empty(); };
  if (std::none_of(results.begin(), results.end(), ran)) {
    fail(ErrorCode::kUnsupported, "bench: none of the {} cases could run; the first: {}", results.size(),
         results.front().not_run);
  }
  const bool all_right = std::all_of(results.begin(), results.end(),
                                     [](const BenchResult& result) { return result.check.passed(); });
  return all_right ? kExitFine : kExitFinding;
}

}  // namespace

void add_bench(CLI::App& app, int& exit_code) {
  auto arguments = std::make_shared<BenchArguments>();
  CLI::App* command = app.add_subcommand(
      "bench", "Time layers of real shapes beside the machine's own limits, once they are right");
  command
      ->add_option("--shape", arguments->shape,
                   fmt::format("E,H,I,K (experts, hidden, intermediate, top-k), or names with commas: {}",
                               shape_names()))
      ->capture_default_str();
  command->add_option("--tokens", arguments->tokens, "numbers of tokens, with commas")->capture_default_str();
  command->add_option("--backend", arguments->backends,
                      "backends, with commas (default: for each shape the best that can run it)");
  add_isa_option(*command);
  command
      ->add_option("--activations", arguments->activations,
                   "what activations become before a GEMM: nvfp4, nvfp4x2, fp8, bf16, with commas")
      ->capture_default_str();
  command->add_option("--activation-scale", arguments->activation_scale,
                      "global scale of NVFP4 activations: static, max-over-experts, dynamic-tensor or "
                      "dynamic-token; two, with a comma, for x and the intermediate (default: static)");
  add_activation_rule(*command, arguments->activation_rule);
  command
      ->add_option(
          "--routing", arguments->routing,
          "uniform, zipf, one-expert, sequences, or a safetensors file with topk_ids and topk_weights")
      ->capture_default_str()
      ->check(nonempty());
  command
      ->add_option("--experts", arguments->experts,
                   "take at most so many of a shape's experts, to bound memory")
      ->check(whole_number<int64_t>())
      ->check(CLI::Range(int64_t{1}, kMostExperts));
  command->add_option("--threads", arguments->threads,
                      "numbers of threads, with commas, for backends that compute on the CPU (default: all)");
  command->add_option("--repeats", arguments->repeats, "time at least so many samples of a case")
      ->capture_default_str()
      ->check(whole_number<int>())
      ->check(CLI::Range(1, 1'000'000));
  command->add_option("--min-time", arguments->min_time, "and at least so many seconds of it")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 3600.0));
  command->add_flag("--stages", arguments->stages, "time the stages of a call, too");
  command->add_flag("--profile", arguments->profile,
                    "on a GPU: run a call of each case once more, between cudaProfilerStart and "
                    "cudaProfilerStop (ncu --profile-from-start off)");
  command->add_option("--seed", arguments->seed, "seed of weights, inputs and routings")
      ->capture_default_str()
      ->check(whole_number<uint64_t>());
  command->add_option("--json", arguments->json, "write the report as JSON too (docs/bench.md)")
      ->check(nonempty());
  command->footer("Exit code: 0 fine, 1 error, 2 usage, 3 a finding: a case computed wrong numbers.");
  command->callback([arguments, &exit_code] { exit_code = execute(*arguments); });
}

}  // namespace fourfold
