#include "cpu/cpu_backend.h"

#include <optional>

#include "base/fail.h"
#include "cpu/cpu_layer.h"
#include "cpu/standalone_gemm.h"

namespace fourfold {
namespace cpu {
namespace {

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(std::optional<Isa> isa)
      : isa_(isa),
        description_(isa ? std::string(to_string(*isa))
                         : "AMX, AVX-512, AVX2 or any CPU; here " + describe_choice()) {}

  std::string_view name() const override { return "cpu"; }
  std::string_view description() const override { return description_; }

  /// Where nothing is forced, some instruction set always runs. What was forced and can't run is no reason to
  /// pass over this backend in silence: choice() throws.
  std::string why_unavailable() const override { return isa_ ? why_not(*isa_) : ""; }

  std::string why_unsupported(const ExpertWeights& weights, const LayerConfig& /*config*/,
                              const LayerOptions& options) const override {
    choice();
    return cpu::why_unsupported(weights, options);
  }

  std::unique_ptr<MoeLayer> make_layer(const ExpertWeights& weights, const LayerConfig& config,
                                       const LayerOptions& options) const override {
    validate(weights, config, options);
    const std::string reason = cpu::why_unsupported(weights, options);
    if (!reason.empty()) throw Error(ErrorCode::kUnsupported, "cpu: " + reason);
    return cpu::make_layer(choice(), weights, config, options);
  }

  size_t gemm_workspace_bytes(const GroupedGemmArgs& args) const override {
    return cpu::gemm_workspace_bytes(choice().isa, args);
  }
  void gemm(const GemmArgs& args) const override { cpu::gemm(choice().isa, args); }
  void grouped_gemm(const GroupedGemmArgs& args) const override { cpu::grouped_gemm(choice().isa, args); }

 private:
  IsaChoice choice() const {
    if (!isa_) return choose_isa();
    if (!why_not(*isa_).empty())
      fail(ErrorCode::kUnsupported, "cpu: {}: {}", to_string(*isa_), why_not(*isa_));
    return {*isa_, "given"};
  }

  std::optional<Isa> isa_;
  std::string description_;
};

}  // namespace

std::unique_ptr<Backend> make_backend(Isa isa) {
  return std::make_unique<CpuBackend>(isa);
}

}  // namespace cpu

const Backend& cpu_backend() {
  static const cpu::CpuBackend backend{std::nullopt};
  return backend;
}

}  // namespace fourfold
