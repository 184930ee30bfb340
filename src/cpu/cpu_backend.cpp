#include "cpu/cpu_backend.h"

#include "cpu/cpu_layer.h"
#include "cpu/standalone_gemm.h"
#include "fourfold/error.h"

namespace fourfold {
namespace cpu {
namespace {

class CpuBackend final : public Backend {
 public:
  /// `kernels`: the only ones that it uses; null: those of choose_isa().
  explicit CpuBackend(const Kernels* kernels)
      : kernels_(kernels),
        description_(kernels != nullptr ? std::string(to_string(kernels->isa))
                                        : "AMX, AVX-512 (with BF16 or without), AVX2 or any x86-64; here " +
                                              describe_choice()) {}

  std::string_view name() const override { return "cpu"; }
  std::string_view description() const override { return description_; }

  /// Some instruction set always runs. One that was forced and can't run is no reason to pass over this
  /// backend: why_unsupported and what computes throw.
  std::string why_unavailable() const override { return ""; }

  std::string why_unsupported(const ExpertWeights& weights, const LayerConfig& /*config*/,
                              const LayerOptions& options) const override {
    choose();
    return cpu::why_unsupported(weights, options);
  }

  std::unique_ptr<MoeLayer> make_layer(const ExpertWeights& weights, const LayerConfig& config,
                                       const LayerOptions& options) const override {
    validate(weights, config, options);
    const std::string reason = cpu::why_unsupported(weights, options);
    if (!reason.empty()) throw Error(ErrorCode::kUnsupported, "cpu: " + reason);
    const Choice choice = choose();
    return cpu::make_layer(choice.kernels, choice.reason, weights, config, options);
  }

  size_t gemm_workspace_bytes(const GroupedGemmArgs& args) const override {
    return cpu::gemm_workspace_bytes(choose().kernels, args);
  }
  void gemm(const GemmArgs& args) const override { cpu::gemm(choose().kernels, args); }
  void grouped_gemm(const GroupedGemmArgs& args) const override { cpu::grouped_gemm(choose().kernels, args); }

 private:
  struct Choice {
    const Kernels& kernels;
    std::string reason;
  };

  Choice choose() const {
    if (kernels_ != nullptr) return {*kernels_, "given"};
    const IsaChoice choice = choose_isa();
    return {kernels_of(choice.isa), choice.reason};
  }

  const Kernels* kernels_;
  std::string description_;
};

}  // namespace

std::unique_ptr<Backend> make_backend(const Kernels& kernels) {
  return std::make_unique<CpuBackend>(&kernels);
}

}  // namespace cpu

const Backend& cpu_backend() {
  static const cpu::CpuBackend backend{nullptr};
  return backend;
}

}  // namespace fourfold
