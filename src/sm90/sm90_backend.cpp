// The backend "sm90": Hopper GPUs.
#include <string>

#include "base/fail.h"
#include "cuda/device.h"
#include "cuda/permute.h"
#include "cuda/prepared_weights.h"
#include "fourfold/moe_layer.h"
#include "sm90/sm90_layer.h"
#include "sm90/standalone_gemm.h"

namespace fourfold {
namespace {

class Sm90Backend final : public Backend {
 public:
  std::string_view name() const override { return "sm90"; }
  std::string_view description() const override {
    return "Hopper GPUs: NVFP4 weights decoded in registers, bf16 tensor cores";
  }

  std::string why_unavailable() const override {
    const cuda::GpuProbe probe = cuda::probe_gpu();
    if (!probe.gpu) return fmt::format("no CUDA device ({})", probe.why_none);
    if (probe.gpu->major == 9 && probe.gpu->minor == 0) return "";
    return fmt::format("needs compute capability 9.0 (H100, H200), found {} with {}.{}", probe.gpu->name,
                       probe.gpu->major, probe.gpu->minor);
  }

  std::string why_unsupported(const ExpertWeights& weights, const LayerConfig& config,
                              const LayerOptions& options) const override {
    std::string reason = why_reference_only(options);
    if (reason.empty()) reason = why_not_activation_rule(options);
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
    require_available();
    const std::string reason = why_unsupported(weights, config, options);
    if (!reason.empty()) fail(ErrorCode::kUnsupported, "sm90: {}", reason);
    return sm90::make_layer(weights, config, options);
  }

  const Memory& memory() const override {
    require_available();
    return cuda::device_memory(cuda::current_device());
  }

  size_t gemm_workspace_bytes(const GroupedGemmArgs& args) const override {
    return sm90::grouped_gemm_workspace_bytes(args);
  }
  void gemm(const GemmArgs& args) const override {
    require_available();
    sm90::gemm(args);
  }
  void grouped_gemm(const GroupedGemmArgs& args) const override {
    require_available();
    sm90::grouped_gemm(args);
  }

 private:
  void require_available() const {
    static const std::string reason = why_unavailable();
    if (!reason.empty()) fail(ErrorCode::kUnsupported, "sm90: {}", reason);
  }
};

}  // namespace

const Backend& sm90_backend() {
  static const Sm90Backend backend;
  return backend;
}

}  // namespace fourfold
