// What launch_expert_gemm checks and derives on the host.
#pragma once

#include "sm90/expert_gemm.h"

namespace fourfold::sm90 {

/// Throws Error naming the first argument that does not fit.
void validate(const ExpertGemm& args);
void validate(const PackWeights& args);
/// Of launch_expert_gemms.
void validate(const ExpertGemm& first, const ExpertGemm& second, const int32_t* progress);

/// The kernel that args name, alone, or else plan_gemm's plan.
GemmPlan planned_launches(const ExpertGemm& args);

/// The GEMM's epilogue computes kSwiglu with a limit that bf16 holds; other activations are a kernel of their
/// own over h.
bool needs_own_activation(const ExpertGemm& args);

}  // namespace fourfold::sm90
