// The backend "blackwell": GPUs with tensor cores for NVFP4.
#include "blackwell/blackwell_backend.h"

#include <string>

#include "base/fail.h"
#include "blackwell/activation_support.h"
#include "blackwell/expert_stages.h"
#include "blackwell/standalone_gemm.h"
#include "cuda/device.h"
#include "cuda/expert_layer.h"
#include "cuda/permute.h"
#include "cuda/prepared_weights.h"

namespace fourfold {
namespace blackwell {
namespace {

std::string compiled_in() {
  std::string list;
  for (const GemmKernels& kernels : compiled_kernels()) {
    list += fmt::format("{}{} ({})", list.empty() ? "" : ", ", kernels.capability(), kernels.architecture);
  }
  return list;
}

class BlackwellBackend final : public Backend {
 public:
  /// `forced` null: the kernels of the current device.
  explicit BlackwellBackend(const GemmKernels* forced) : forced_(forced) {}

  std::string_view name() const override { return "blackwell"; }
  std::string_view description() const override {
    return "Blackwell GPUs: NVFP4 x NVFP4 tensor cores, by CUTLASS";
  }

  std::string why_unavailable() const override {
    const cuda::GpuProbe probe = cuda::probe_gpu();
    if (!probe.gpu) return fmt::format("no CUDA device ({})", probe.why_none);
    const cuda::Gpu& gpu = *probe.gpu;
    if (forced_ != nullptr ? forced_->runs_on(gpu.major, gpu.minor)
                           : kernels_of(gpu.major, gpu.minor) != nullptr) {
      return "";
    }
    const std::string wanted = forced_ != nullptr ? forced_->capability() : "one of " + compiled_in();
    return fmt::format("needs compute capability {}, found {} with {}.{}", wanted, gpu.name, gpu.major,
                       gpu.minor);
  }

  std::string why_unsupported(const ExpertWeights& weights, const LayerConfig& config,
                              const LayerOptions& options) const override {
    std::string reason = why_reference_only(options);
    if (reason.empty()) reason = why_not_activation_rule(options);
    if (reason.empty()) reason = why_not_activations(options.activations);
    if (!reason.empty()) return reason;
    if (config.experts > cuda::kMostExperts) {
      return fmt::format("it permutes to at most {} experts, not {}", cuda::kMostExperts, config.experts);
    }
    const cuda::GpuProbe probe = cuda::probe_gpu();
    return cuda::why_unpreparable(name(), weights, probe.gpu ? probe.gpu->index : 0);
  }

  std::unique_ptr<MoeLayer> make_layer(const ExpertWeights& weights, const LayerConfig& config,
                                       const LayerOptions& options) const override {
    validate(weights, config, options);
    const GemmKernels& kernels = require_available();
    const std::string reason = why_unsupported(weights, config, options);
    if (!reason.empty()) fail(ErrorCode::kUnsupported, "blackwell: {}", reason);
    return std::make_unique<cuda::ExpertLayer<ExpertStages>>(weights, config, options, kernels);
  }

  const Memory& memory() const override {
    require_available();
    return cuda::device_memory(cuda::current_device());
  }

  size_t gemm_workspace_bytes(const GroupedGemmArgs& args) const override {
    return grouped_gemm_workspace_bytes(require_available(), args);
  }
  void gemm(const GemmArgs& args) const override { blackwell::gemm(require_available(), args); }
  void grouped_gemm(const GroupedGemmArgs& args) const override {
    blackwell::grouped_gemm(require_available(), args);
  }

 private:
  const GemmKernels& require_available() const {
    const std::string reason = why_unavailable();
    if (!reason.empty()) fail(ErrorCode::kUnsupported, "blackwell: {}", reason);
    if (forced_ != nullptr) return *forced_;
    const cuda::Gpu gpu = *cuda::probe_gpu().gpu;
    return *kernels_of(gpu.major, gpu.minor);
  }

  const GemmKernels* forced_;
};

}  // namespace

std::unique_ptr<Backend> make_backend(const GemmKernels& kernels) {
  return std::make_unique<BlackwellBackend>(&kernels);
}

}  // namespace blackwell

const Backend& blackwell_backend() {
  static const blackwell::BlackwellBackend backend(nullptr);
  return backend;
}

}  // namespace fourfold
