// `layertest --candidate`: what a serving engine computed, compared with the reference and explained.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "diagnosis/error_map.h"
#include "diagnosis/matcher.h"
#include "tools/diagnosis_subject.h"

namespace fourfold {

struct CandidateRequest {
  /// safetensors, .npz or .npy; of several, each gives tensors that the others have not
  std::vector<std::string> candidate;
  std::string input;  ///< where x is, and perhaps the routing, if not in the candidate; may be empty
  SubjectSource source;
  std::string activation_format;  ///< "auto", or one of kActivationFormats
  std::function<void(std::string_view)> progress = [](std::string_view) {};
};

/// What --activation-format takes beside "auto".
inline constexpr std::string_view kActivationFormats[] = {"bf16", "fp8", "nvfp4-static",
                                                          "nvfp4-max-over-experts", "nvfp4-dynamic-token"};

/// How the engine staged x, where the candidate has its codes.
struct StagedXReport {
  std::string layout;     ///< of the scales: "row-major", "swizzled 128x4", "transposed"
  double distance = 0.0;  ///< of codes x scales to x, after the best global factor: about 0.09 where right
  double runner_up = 0.0;
  std::string runner_up_layout;
};

struct CandidateReport {
  std::vector<std::pair<std::string, std::string>> facts;
  std::vector<std::string> notes;
  std::string model;
  int64_t layer = 0;
  std::optional<diagnosis::RoutingDiagnosis> routing;  ///< where the engine's routing and a router are there
  std::string routing_left_out;                        ///< why not
  std::optional<StagedXReport> staged_x;
  diagnosis::Diagnosis experts;
  diagnosis::ErrorMap map;
  int64_t mapped_tokens = 0;
  /// "fine", or where the fault is: "routing", "weights", "staging", "activation", "experts", "combine"; or
  /// "unexplained".
  std::string verdict;
  std::string explanation;  ///< a sentence
  std::string remedy;
};

/// Throws Error naming file, tensor, expected and found.
CandidateReport run_candidate_test(const CandidateRequest& request);

std::string format_candidate(const CandidateReport& report);
std::string candidate_json(const CandidateReport& report);

}  // namespace fourfold
