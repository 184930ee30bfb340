// What this machine can run, and whether it computes right: the checks behind `fourfold doctor`.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fourfold/activations.h"
#include "fourfold/moe_layer.h"

namespace fourfold {

/// A small layer on one backend, stage by stage against the specification.
struct SelfTest {
  std::string backend;  ///< e.g. "cpu avx512"
  std::string kernel;   ///< that ran
  ActivationFormat activations = ActivationFormat::kNvfp4;
  bool is_fine = false;
  std::string trouble;  ///< findings, or the Error that ended it; empty where it is fine
  double seconds = 0.0;
};

/// Generated NVFP4 weights of 8 experts, gate's and up's global scales apart, 48 tokens, some experts busier
/// than others. Never throws Error: a backend that does is in trouble.
SelfTest test_backend(const Backend& backend, const std::string& name, ActivationFormat activations);
/// The same under other options.
SelfTest test_backend(const Backend& backend, const std::string& name, const LayerOptions& options);

/// Every backend that can run here and is not the reference, and every instruction set of the backend "cpu"
/// that this CPU has; with NVFP4 and with bf16 activations (two NVFP4 terms where a backend takes no bf16).
std::vector<SelfTest> run_self_tests(const std::function<void(std::string_view)>& progress);

/// Lines of the report: label and text.
using Facts = std::vector<std::pair<std::string, std::string>>;

/// CPU, its instruction sets, memory, GPU and driver, backends compiled in, what forces a choice.
Facts describe_machine();

/// Which backend takes a task, or why none does.
struct DoctorChoice {
  std::string task;  ///< activation format; empty: any
  std::string backend, reason, kernel;
  std::string trouble;  ///< then the others are empty
};

/// A layer of a checkpoint, as this machine would run it.
struct DoctorLayer {
  std::string model;
  int64_t layer = 0;
  std::string trouble;  ///< why it can't be run at all; then what follows is empty
  std::string scheme;
  LayerConfig config;
  std::vector<DoctorChoice> choices;
};

struct DoctorReport {
  Facts machine;
  DoctorChoice chosen;      ///< for operations of no layer
  std::string isa_trouble;  ///< of a forced instruction set; empty where it can run
  std::optional<DoctorLayer> layer;
  std::vector<SelfTest> self_tests;
};

/// Nothing is in trouble.
bool is_fine(const DoctorReport& report);

/// docs/inspect.md is its schema.
std::string format_doctor_json(const DoctorReport& report);

/// The version that a loaded NVIDIA driver reports to the system; empty where there is none.
std::string nvidia_driver_version();

}  // namespace fourfold
