// `layertest --candidate`: what a serving engine computed, compared with the reference and explained.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "diagnosis/error_map.h"
#include "diagnosis/matcher.h"
#include "tools/candidate_staging.h"
#include "tools/diagnosis_subject.h"
#include "tools/layer_charts.h"
#include "tools/layertest.h"

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

/// A stage of the candidate beside what is due after the candidate's own stage before it.
struct CandidateStage {
  std::string name;  ///< "h", "activation" or "output"
  double distance = 0.0, limit = 0.0;
  bool is_off() const { return !(distance <= limit); }
};

struct CandidateReport {
  std::vector<std::pair<std::string, std::string>> facts;
  std::vector<std::string> notes;
  std::string model;
  int64_t layer = 0;
  std::optional<diagnosis::RoutingDiagnosis> routing;  ///< where the engine's routing and a router are there
  std::string routing_left_out;                        ///< why not
  std::vector<StagedReport> staged;                    ///< where the candidate has codes and scales
  diagnosis::Diagnosis experts;
  std::vector<CandidateStage> stages;  ///< as many as the candidate has
  diagnosis::ErrorMap map;             ///< of the output
  int64_t mapped_tokens = 0;
  int64_t not_finite = 0;  ///< elements of the whole output
  /// "fine", or where the fault is: "routing", "weights", "staging", "activation", "experts", "combine"; or
  /// "unexplained".
  std::string verdict;
  std::string explanation;  ///< a sentence
  std::string remedy;
  std::vector<ReportedExplanation> explanations;  ///< the best, those that do the same, the runner-up, none
  LayerCharts charts;                             ///< block scales, errors, and the worst token
  std::optional<TokenScatter>
      explained_token;  ///< that token against the best explanation, where it explains
};

/// Throws Error naming file, tensor, expected and found.
CandidateReport run_candidate_test(const CandidateRequest& request);

std::string format_candidate(const CandidateReport& report);
/// A page as layertest's (report_page.h).
std::string candidate_html(const CandidateReport& report);
std::string candidate_json(const CandidateReport& report);

}  // namespace fourfold
