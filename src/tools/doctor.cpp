#include "tools/doctor.h"

#include <fmt/format.h>
#include <omp.h>

#include <array>
#include <chrono>
#include <cstdlib>
#include <fstream>

#include "cpu/cpu_backend.h"
#include "cpu/isa.h"
#include "fourfold/cpu.h"
#include "fourfold/error.h"
#include "tools/compiled_code.h"
#include "tools/layertest.h"
#include "tools/testbed.h"

namespace fourfold {
namespace {

/// Widths that are no multiples of what kernels like to work on, but of blocks.
constexpr GeneratedLayer kTestLayer = {8, 272, 176, 1};
constexpr int64_t kTestTokens = 48, kTestTopK = 3;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

LayerConfig test_config() {
  LayerConfig config;
  config.hidden = kTestLayer.hidden;
  config.intermediate = kTestLayer.intermediate;
  config.experts = kTestLayer.experts;
  config.top_k = kTestTopK;
  return config;
}

/// NVFP4 activations, and the best that the backend takes beside: bf16, or two NVFP4 terms where tensor cores
/// multiply FP4 alone.
std::vector<ActivationFormat> formats_to_test(const Backend& backend) {
  LayerOptions options;
  options.activations = ActivationFormat::kBf16;
  const ExpertWeights weights = make_cpu_testbed()->generate(kTestLayer);
  const bool takes_bf16 = backend.why_unsupported(weights, test_config(), options).empty();
  return {ActivationFormat::kNvfp4, takes_bf16 ? ActivationFormat::kBf16 : ActivationFormat::kNvfp4x2};
}

LayertestReport test_layer(const Backend& backend, const LayerOptions& options) {
  const ExpertWeights weights = make_cpu_testbed()->generate(kTestLayer);
  LayerInputs inputs = make_inputs(kTestTokens, kTestLayer.hidden, kTestLayer.seed, false);
  route_at_random(inputs, kTestLayer.experts, kTestTopK, kTestLayer.seed);
  LayertestRequest request;
  request.nvfp4 = &weights;
  for (int64_t expert = 0; expert < kTestLayer.experts; ++expert) request.expert_ids.push_back(expert);
  request.config = test_config();
  request.options = options;
  request.backend = &backend;
  request.inputs = &inputs;
  request.explains = false;  // a self-test says what it found
  return run_layertest(request);
}

std::string join_findings(const LayertestReport& report) {
  std::string text;
  for (const std::string& finding : report.findings) text += (text.empty() ? "" : "; ") + finding;
  return text;
}

void add_instruction_sets(Facts& facts) {
  for (const cpu::Isa isa : cpu::isas()) {
    const std::string& reason = cpu::why_not(isa);
    facts.emplace_back(
        isa == cpu::isas().front() ? "cpu sets" : "",
        fmt::format("{:<11} {}", cpu::to_string(isa), reason.empty() ? "yes" : "no: " + reason));
  }
}

/// Without CUDA in this build, a GPU is known by its driver alone.
void add_gpu(Facts& facts) {
  const std::string driver = nvidia_driver_version();
  facts.emplace_back("driver", driver.empty() ? "no NVIDIA driver is loaded" : "NVIDIA " + driver);
#if FOURFOLD_HAS_CUDA
  std::string found;
  for (const Backend* backend : backends()) {
    if (backend->name() != "blackwell" && backend->name() != "sm90") continue;
    const std::string reason = backend->why_unavailable();
    if (reason.empty()) {
      found = make_testbed(*backend)->machine();
      break;
    }
    found += fmt::format("{}{}: {}", found.empty() ? "none that runs: " : "; ", backend->name(), reason);
  }
  facts.emplace_back("gpu", found);
#else
  facts.emplace_back("gpu", driver.empty() ? "not looked for: this build is without CUDA"
                                           : "this build is without CUDA: build with nvcc in PATH to use it");
#endif
}

void add_compiled_code(Facts& facts) {
  const std::vector<std::string> lines = describe_compiled_code();
  for (const std::string& line : lines) facts.emplace_back(&line == &lines.front() ? "gpu code" : "", line);
}

void add_backends(Facts& facts) {
  for (const Backend* backend : backends()) {
    const std::string reason = backend->why_unavailable();
    facts.emplace_back(backend == backends().front() ? "backends" : "",
                       fmt::format("{:<9} {}{}", backend->name(), backend->description(),
                                   reason.empty() ? "" : "; not here: " + reason));
  }
}

}  // namespace

SelfTest test_backend(const Backend& backend, const std::string& name, ActivationFormat activations) {
  LayerOptions options;
  options.activations = activations;
  return test_backend(backend, name, options);
}

SelfTest test_backend(const Backend& backend, const std::string& name, const LayerOptions& options) {
  SelfTest test;
  test.backend = name;
  test.activations = options.activations;
  const auto start = std::chrono::steady_clock::now();
  try {
    const LayertestReport report = test_layer(backend, options);
    test.kernel = report.kernel;
    test.is_fine = report.findings.empty();
    test.trouble = join_findings(report);
  } catch (const Error& error) {
    test.trouble = error.what();
  }
  test.seconds = seconds_since(start);
  return test;
}

std::vector<SelfTest> run_self_tests(const std::function<void(std::string_view)>& progress) {
  std::vector<SelfTest> tests;
  const auto run = [&](const Backend& backend, const std::string& name) {
    for (const ActivationFormat format : formats_to_test(backend)) {
      progress(fmt::format("self-test: {}, {}", name, to_string(format)));
      tests.push_back(test_backend(backend, name, format));
    }
  };
  for (const Backend* backend : backends()) {
    if (backend->name() == reference_backend().name() || !backend->why_unavailable().empty()) continue;
    if (backend->name() != cpu_backend().name()) {
      run(*backend, std::string(backend->name()));
      continue;
    }
    for (const cpu::Isa isa : cpu::isas()) {
      if (!cpu::why_not(isa).empty()) continue;
      run(*cpu::make_backend(cpu::kernels_of(isa)), fmt::format("cpu {}", cpu::to_string(isa)));
    }
  }
  return tests;
}

Facts describe_machine() {
  Facts facts;
  const auto host = make_cpu_testbed();
  facts.emplace_back("machine", fmt::format("{}; {} cores for this process, {} OpenMP threads",
                                            host->machine(), omp_get_num_procs(), omp_get_max_threads()));
  facts.emplace_back("memory", fmt::format("{:.1f} GB available, last cache {:.1f} MB",
                                           1e-9 * static_cast<double>(host->free_bytes()),
                                           1e-6 * static_cast<double>(host->cache_bytes())));
  add_instruction_sets(facts);
  add_gpu(facts);
  add_compiled_code(facts);
  add_backends(facts);
  for (const char* variable : {kBackendVariable, kIsaVariable}) {
    const char* value = std::getenv(variable);
    if (value != nullptr && *value != '\0')
      facts.emplace_back("forced", fmt::format("{}={}", variable, value));
  }
  return facts;
}

std::string nvidia_driver_version() {
  // "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 ..."
  std::ifstream file("/proc/driver/nvidia/version");
  for (std::string word; file >> word;) {
    const bool is_version =
        word.find_first_not_of("0123456789.") == std::string::npos && word.find('.') != std::string::npos;
    if (is_version) return word;
  }
  return "";
}

}  // namespace fourfold
