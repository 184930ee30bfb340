// One MoE layer on one backend: the interface that every backend implements and every engine calls.
//
//   auto choice = choose_backend("", weights, config, options);
//   auto layer = choice.backend->make_layer(weights, config, options);
//   auto plan = layer->plan(max_tokens);
//   layer->forward(plan, {.x = x, .routing = routing, .y = y, .workspace = workspace});
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "fourfold/activations.h"
#include "fourfold/expert_weights.h"
#include "fourfold/export.h"
#include "fourfold/gemm.h"
#include "fourfold/memory.h"
#include "fourfold/quantize.h"
#include "fourfold/routing.h"

namespace FOURFOLD_EXPORT fourfold {

/// The function between the two GEMMs, on g = gate and u = up; docs/formats.md, section 4.
enum class ActivationKind : uint8_t {
  /// g' * sigmoid(alpha g') * (u' + beta), g' = min(g, limit), u' = clamp(u, -limit, limit). alpha 1 and beta
  /// 0
  /// are silu(g) * u: Mixtral, Qwen, DeepSeek (V4 with limit 10). gpt-oss has 1.702, 1 and limit 7.
  kSwiglu,
  kSwigluStep,   ///< min(silu(g), limit) * clamp(u, -limit, limit)
  kGeglu,        ///< gelu(g) * u, gelu(x) = x/2 (1 + erf(x / sqrt 2))
  kGegluTanh,    ///< the same with gelu's tanh approximation
  kReluSquared,  ///< relu(u)^2, no gate: Nemotron
  kSilu,         ///< silu(u), no gate
  kGelu,         ///< gelu(u), no gate
};

/// Without a gate an expert has up and down alone, and h is [M, I].
constexpr bool is_gated(ActivationKind kind) {
  return kind < ActivationKind::kReluSquared;
}

/// Parameters are in real units: the values that the formulas above name. Finite, but for `limit`, which is
/// positive.
struct ActivationFunction {
  ActivationKind kind = ActivationKind::kSwiglu;
  float alpha = 1.0f;                                    ///< kSwiglu
  float beta = 0.0f;                                     ///< kSwiglu
  float limit = std::numeric_limits<float>::infinity();  ///< kSwiglu, kSwigluStep; infinity: no clamp
};

/// As reports print it, e.g. "silu(min(g, 10)) * clamp(u, -10, 10)".
std::string describe(const ActivationFunction& function);

/// What the model is. A backend that does not implement one of these refuses; nothing is ignored.
struct LayerConfig {
  int64_t hidden = 0;
  int64_t intermediate = 0;
  int64_t experts = 0;  ///< on this rank
  int64_t top_k = 0;
  ActivationFunction activation;
  /// The routing weight multiplies the expert's input, rounded to bf16, instead of its output: Llama-4.
  bool weight_on_input = false;
  /// S of the shared expert; 0: there is none, or another rank adds it.
  int64_t shared_intermediate = 0;
  ActivationFunction shared_activation = {};  ///< of the shared expert

  /// Columns of h: gate and up, or up alone.
  int64_t h_columns() const { return is_gated(activation.kind) ? 2 * intermediate : intermediate; }
  bool has_shared() const { return shared_intermediate > 0; }
};

/// The shared expert's part of `config` as a layer of one expert that every token goes to.
LayerConfig shared_config(const LayerConfig& config);

/// How the layer is to be computed.
struct LayerOptions {
  ActivationFormat activations = ActivationFormat::kNvfp4;
  ScalePolicy x_scale = ScalePolicy::kStatic;             ///< used by nvfp4 and nvfp4x2 alone
  ScalePolicy intermediate_scale = ScalePolicy::kStatic;  ///< the same, for the second GEMM's input
  /// How block scales of activations are chosen. Others than amax are for nvfp4 alone, and run on the
  /// backends reference and cpu.
  ScaleRule activation_rule = ScaleRule::kAmax;
  Accumulation accumulation = Accumulation::kFloat32;
  /// For max-over-experts: the largest input scales over all ranks, where this layer holds a part of the
  /// experts. Absent: the largest of this layer.
  std::optional<float> x_max_scale, intermediate_max_scale;
  /// Multiply by weights dequantized to float32 instead of applying the global scale in the epilogue: the
  /// "reference in the dequantized weights". Backends other than the reference refuse it.
  bool dequantize_weights = false;
};

/// The same options for bf16 activations, which have no block scales to choose.
LayerOptions with_bf16_activations(const LayerOptions& options);

/// How the shared expert is computed: NVFP4 weights with the layer's activation format and scale policies
/// (max-over-experts is its own scale), weights in any other format with bf16 activations.
LayerOptions shared_options(const SharedExpert& shared, const LayerOptions& options);

/// Why a backend other than the reference has to refuse these options (float64 sums, dequantized weights);
/// empty when it need not. Fast backends call it in why_unsupported.
std::string why_reference_only(const LayerOptions& options);
/// Why a backend that stages activations by the rule amax alone has to refuse them; empty when it need not.
std::string why_not_activation_rule(const LayerOptions& options);

/// Workspaces start at a multiple of this many bytes.
inline constexpr size_t kWorkspaceAlignment = 256;

/// The frozen choice of kernels for up to `max_tokens` tokens, and the workspace they need.
struct LayerPlan {
  int64_t max_tokens = 0;
  size_t workspace_bytes = 0;           ///< aligned to kWorkspaceAlignment
  std::string kernel;                   ///< which kernel will run, for reports
  std::string reason;                   ///< why that one
  std::shared_ptr<const void> details;  ///< the backend's own
  /// On CPUs: which arithmetic its multiplications use, by the name of the peak that `fourfold bench`
  /// measures (src/tools/cpu_ceilings.h), e.g. "int8-vnni-avx512".
  std::string arithmetic = {};
};

/// Stages of the shared expert; rows are tokens, formats those of shared_options.
struct SharedTaps {
  const StagedActivations* staged_x = nullptr;
  MatrixView<Bf16> h;           ///< [T, 2S], gate columns first; [T, S] without a gate
  MatrixView<Bf16> activation;  ///< [T, S]
  const StagedActivations* staged_intermediate = nullptr;
  MatrixView<Bf16> z;         ///< [T, H], before its output's gate
  std::span<float> z_weight;  ///< [T]: sigmoid(x . gate), or 1
};

/// Optional outputs, one a stage; empty ones are not written. Rows are in permuted order.
/// Taps have room for T * K rows, of which the M that have an expert are written.
/// A tapped run equals an untapped one bit for bit.
struct StageTaps {
  std::span<int32_t> group_offsets;  ///< [E+1]
  std::span<int32_t> slot_of_row;    ///< [T*K]
  std::span<int32_t> row_of_slot;    ///< [T*K]
  const StagedActivations* staged_x = nullptr;
  MatrixView<Bf16> h;           ///< [T*K, 2I], gate columns first; [T*K, I] without a gate
  MatrixView<Bf16> activation;  ///< [T*K, I]
  const StagedActivations* staged_intermediate = nullptr;
  MatrixView<Bf16> z;  ///< [T*K, H], before routing weights
  SharedTaps shared;
};

/// Told when a call has enqueued (on a CPU: computed) a stage: how `fourfold bench --stages` times them.
/// Stages that would overlap then follow each other: the same bits, later.
class StageObserver {
 public:
  virtual ~StageObserver() = default;
  /// `stage` names what came since the call before, e.g. "gemm1", or "gemm1+activate" where they are one
  /// kernel. `stream` is that of the arguments.
  virtual void after(std::string_view stage, void* stream) = 0;
};

struct ForwardArgs {
  MatrixView<const Bf16> x;  ///< [T, H]
  Routing routing;
  OutputView y;  ///< [T, H]; float32 for partial sums that other ranks add to
  std::span<std::byte> workspace;
  void* stream = nullptr;     ///< cudaStream_t where the backend has streams
  int32_t* status = nullptr;  ///< StatusBits, in the backend's memory; may be null
  StageTaps taps = {};
  StageObserver* observer = nullptr;  ///< may be null
};

/// The routed experts alone, for callers that permute and combine themselves (expert parallelism) and take
/// care of the shared expert.
struct ExpertsArgs {
  ActivationView activations;              ///< [M, H], staged in the layer's format
  std::span<const int32_t> group_offsets;  ///< [E+1]
  MatrixView<Bf16> z;                      ///< [M, H]
  std::span<std::byte> workspace;
  void* stream = nullptr;
  StageTaps taps = {};
};

/// Owns its prepared weights. Calls check their arguments, then enqueue; they neither allocate nor
/// synchronise. One layer may run concurrently with separate workspaces.
class MoeLayer {
 public:
  virtual ~MoeLayer() = default;

  virtual const LayerConfig& config() const = 0;
  virtual const LayerOptions& options() const = 0;
  /// Throws Error unless max_tokens * top_k lies between 0 and 2^31 - 1. experts() then takes up to that many
  /// rows.
  virtual LayerPlan plan(int64_t max_tokens) const = 0;
  /// permute, stage, experts, combine. Throws Error for arguments that do not fit the plan.
  virtual void forward(const LayerPlan& plan, const ForwardArgs& args) const = 0;
  virtual void experts(const LayerPlan& plan, const ExpertsArgs& args) const = 0;
  /// Replaces the weights in place; shapes and formats must be those of make_layer.
  virtual void update_weights(const ExpertWeights& weights) = 0;
};

/// A way to compute layers on some hardware.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string_view name() const = 0;
  virtual std::string_view description() const = 0;
  /// Why this machine cannot run it; empty when it can.
  virtual std::string why_unavailable() const = 0;
  /// Why it cannot compute this layer this way; empty when it can.
  virtual std::string why_unsupported(const ExpertWeights& weights, const LayerConfig& config,
                                      const LayerOptions& options) const = 0;
  virtual std::unique_ptr<MoeLayer> make_layer(const ExpertWeights& weights, const LayerConfig& config,
                                               const LayerOptions& options) const = 0;
  /// Where it computes: pointers in the arguments of its layers and GEMMs lie there.
  virtual const Memory& memory() const { return host_memory(); }
  /// Workspace that gemm and grouped_gemm need for these shapes.
  virtual size_t gemm_workspace_bytes(const GroupedGemmArgs& /*args*/) const { return 0; }
  virtual void gemm(const GemmArgs& args) const = 0;
  virtual void grouped_gemm(const GroupedGemmArgs& args) const = 0;
};

/// The backend "reference": plain loops (fourfold/reference.h).
const Backend& reference_backend();
/// The backend "cpu": the best instruction set that the CPU has (fourfold/cpu.h forces one).
const Backend& cpu_backend();
/// The backend "sm90": Hopper GPUs. In libraries built with CUDA alone.
const Backend& sm90_backend();
/// The backend "blackwell": GPUs with tensor cores for NVFP4. In libraries built with FOURFOLD_BLACKWELL.
const Backend& blackwell_backend();

/// Every backend compiled in, best first; the reference is last and can always run.
std::span<const Backend* const> backends();

/// The backend called `name`; throws Error naming all that are compiled in.
const Backend& find_backend(std::string_view name);

/// Environment variable that forces a backend where no name is given.
inline constexpr const char* kBackendVariable = "FOURFOLD_BACKEND";

struct BackendChoice {
  const Backend* backend = nullptr;
  std::string reason;  ///< why this one and none of the better ones
};

/// The best backend that this machine can run, for operations that belong to no layer; forced like
/// choose_backend.
BackendChoice choose_backend(std::string_view forced);

/// The best backend that can run this layer. `forced`, or else FOURFOLD_BACKEND, names the only one to
/// consider; when it can't run, Error says why for every backend compiled in. There is no silent fallback.
BackendChoice choose_backend(std::string_view forced, const ExpertWeights& weights, const LayerConfig& config,
                             const LayerOptions& options);

/// The default scale policies: static where every expert has usable input scales (the shared one too, where
/// it is NVFP4), dynamic-token where none has any. Otherwise throws Error naming the missing ones. Formats
/// other than NVFP4 get dynamic-token, which they ignore.
struct DefaultPolicies {
  ScalePolicy x = ScalePolicy::kDynamicToken;
  ScalePolicy intermediate = ScalePolicy::kDynamicToken;
};
DefaultPolicies default_scale_policies(const ExpertWeights& weights, ActivationFormat format);

/// Throws Error when a layer of this config can't be planned for so many tokens.
void validate_plan(const LayerConfig& config, int64_t max_tokens);
/// Throws Error unless `updated` has the shapes, formats and scale layouts of `current`.
void validate_update(const ExpertWeights& current, const ExpertWeights& updated);

/// Throws Error when config, weights and options do not fit each other, or a static policy lacks an input
/// scale.
void validate(const ExpertWeights& weights, const LayerConfig& config, const LayerOptions& options);
/// Throws Error when arguments do not fit layer and plan.
void validate(const MoeLayer& layer, const LayerPlan& plan, const ForwardArgs& args);
void validate(const MoeLayer& layer, const LayerPlan& plan, const ExpertsArgs& args);

}  // namespace fourfold
