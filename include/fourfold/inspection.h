// Inspecting a checkpoint: what its MoE layers hold, and what is wrong with them. docs/inspect.md.
//
// Unlike load_experts, which refuses at the first thing that is wrong, an inspection goes on: a damaged
// tensor costs the statistics of that tensor alone.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "fourfold/checkpoint.h"
#include "fourfold/export.h"
#include "fourfold/weight_statistics.h"

namespace FOURFOLD_EXPORT fourfold {

/// What can be wrong. Names, for reports, by to_string.
enum class FindingKind : uint8_t {
  kDamagedFile,           ///< a shard, index or config that can't be read
  kMissingTensor,         ///< an expert's, while its siblings are there
  kBadTensor,             ///< type, shape or content that its reader refuses
  kUnknownTensor,         ///< in an MoE block, and nothing reads it
  kNanScale,              ///< block scales that are NaN
  kNegativeScale,         ///< block scales with their sign set
  kZeroWeights,           ///< every code, or every block scale, of a matrix is zero
  kSaturatedScales,       ///< more than kMostSaturated of a matrix's block scales are 448
  kSubnormalScales,       ///< more than kMostSubnormal of a matrix's block scales are below 2^-6
  kNonFiniteWeights,      ///< NaN or infinity among plain or FP8 weights, or in a router
  kBadScale,              ///< a global or tile scale that is zero, negative, infinite or NaN
  kReciprocalGlobal,      ///< weights would be enormous, and ordinary by its reciprocal
  kMissingInputScale,     ///< while others of the layer or model have one
  kBadInputScale,         ///< zero, negative, infinite or NaN
  kReciprocalInputScale,  ///< as of the global scale
  kMissingRouter,
  kMissingSharedExpert,  ///< config.json speaks of one
  kConfigDisagrees,      ///< config.json and tensors
  kRefused,              ///< the library's own loader refuses the layer for another reason
};

std::string_view to_string(FindingKind kind);  ///< e.g. "nan-scale"

struct Finding {
  FindingKind kind = FindingKind::kRefused;
  int64_t layer = -1;  ///< -1: the whole model
  std::string tensor;  ///< what it is about; of config.json, the key
  std::string file;    ///< that holds it; empty where none does
  std::string found;   ///< what was found there, and what was expected
  std::string remedy;  ///< what to do
};

// Limits of rules that judge by amount; docs/inspect.md says why.
inline constexpr double kMostSaturated = 0.1;
inline constexpr double kMostSubnormal = 0.5;

/// All matrices of one kind in a layer: "gate", "up", "down", "gate_up" of fused tensors, and the same of a
/// shared expert with "shared " before it.
struct MatrixGroup {
  std::string role;
  std::string format;          ///< "nvfp4", "mxfp4", "fp8", "bf16", ..., or "mixed"
  int64_t rows = 0, cols = 0;  ///< of one matrix [out, in], as most have it
  int64_t matrices = 0;        ///< of which statistics were taken
  int64_t unread = 0;          ///< of which none were: see the findings, or lost files
  int64_t bytes = 0;           ///< of all their tensors
  ScaleCounts scales;          ///< 4-bit formats alone; all block scales
  CodeCounts codes;            ///< the same; the rows that were sampled
  ValueCounts values;          ///< other formats
  std::optional<float> smallest_global, largest_global;  ///< multipliers
};

/// How far gate's and up's global scales are apart, over the experts that have both.
struct GateUpRatios {
  int64_t pairs = 0, different = 0;
  double median = 1.0, largest = 1.0;  ///< larger / smaller
  int64_t largest_expert = -1;
};

/// Usable calibrated activation scales of routed experts.
struct InputScaleSummary {
  int64_t usable = 0, expected = 0;  ///< 0 usable: none has any
  std::optional<float> smallest, largest;
};

struct LayerInspection {
  int64_t layer = 0;
  std::string scheme, naming;
  int64_t experts = 0, hidden = 0, intermediate = 0;
  std::string shared_scheme, shared_naming;  ///< empty: no shared expert
  int64_t shared_intermediate = 0;
  bool shared_gate = false;
  std::string router;       ///< name; empty: none
  std::string router_rule;  ///< how it is computed; empty where the family is not known
  std::string activation;   ///< the same
  int64_t top_k = 0;        ///< 0: unknown
  int64_t bytes = 0;        ///< of the experts' tensors, the shared one's among them
  std::vector<MatrixGroup> groups;
  GateUpRatios gate_up;
  InputScaleSummary input_scales;
  std::optional<ExpertLayer> loaded;  ///< where the loader takes it; of transposed tensors expert 0 alone
};

/// Where the layers that are inspected hold more, kSampledOneIn of their codes is read.
inline constexpr int64_t kMostUnsampledBytes = int64_t{4} << 30;
inline constexpr int64_t kSampledOneIn = 16;

struct InspectOptions {
  std::vector<int64_t> layers;  ///< ascending; empty: all that hold experts
  int64_t most_unsampled_bytes = kMostUnsampledBytes;
  std::optional<WeightScheme> scheme;  ///< of codes of four bits, whatever names and dtypes say
  std::function<void(std::string_view)> progress = [](std::string_view) {};
};

struct ModelInspection {
  std::vector<Finding> findings;  ///< of the model first, then by layer and kind
  std::vector<LayerInspection> layers;
  std::vector<int64_t> expert_layers;  ///< all layers that hold experts
  std::string family;                  ///< empty: not known
  int64_t tensors = 0, bytes = 0, files = 0;
  std::optional<WeightScheme> forced_scheme;  ///< of the options
  int64_t codes_one_in = 1;  ///< of codes and plain values, one run of rows in so many was read
  ModelConfig config;
};

/// Inspects the model at `path`. OpenMP inside. Throws Error where nothing can be inspected: no such model,
/// no readable file; and, where all files can be read, no experts, or none in a layer of `options`.
ModelInspection inspect_model(const std::filesystem::path& path, const InspectOptions& options);

}  // namespace fourfold
