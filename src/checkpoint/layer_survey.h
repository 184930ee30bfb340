// The tensors of one MoE layer as they are, damaged or not: what an inspection counts and judges.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "checkpoint/linear_reader.h"
#include "checkpoint/moe_names.h"
#include "fourfold/inspection.h"

namespace fourfold {

/// One matrix of one expert: where its bytes lie.
struct MatrixSlice {
  WeightView weight;           ///< of transposed 4-bit codes: format alone, see `packed`
  bool is_transposed = false;  ///< NVFP4 codes [K/2, out] and scales [K/16, out]
  MatrixView<const uint8_t> packed;
  MatrixView<const uint8_t> scales;  ///< of 4-bit formats, as they lie
  ScaleType scale_type = ScaleType::kE4m3;
};

/// One linear layer's tensors: one expert's, or, where they are fused, all experts'.
struct SurveyedMatrix {
  std::string role;     ///< as MatrixGroup has it
  std::string name;     ///< of the linear, e.g. "model.layers.0.mlp.experts.3.up_proj"
  int64_t expert = -1;  ///< -1: fused, or shared
  bool is_shared = false;
  int64_t rows = 0, cols = 0;  ///< [out, in]
  int64_t bytes = 0;
  const Tensor *weight = nullptr, *scales = nullptr, *global = nullptr, *input_scale = nullptr;
  std::vector<MatrixSlice> slices;  ///< one, or one an expert; none: it can't be read
  std::vector<float> globals;       ///< multipliers as the GEMM has them: one, or one an expert
  std::vector<float> input_scales;  ///< the same; empty where there are none

  bool is_nvfp4() const {
    return !slices.empty() && is_stored_as(slices.front().weight, QuantFormat::kNvfp4);
  }
};

struct LayerSurvey {
  int64_t layer = 0;
  MoeBlock block;
  int64_t experts = 0;                   ///< as the tensors have it
  int64_t hidden = 0, intermediate = 0;  ///< as most matrices have it; 0 where none can be read
  int64_t shared_intermediate = 0;
  bool is_fused = false, is_transposed = false, has_gates = false, has_shared = false, shared_gate = false;
  int64_t lost = 0;  ///< tensors of this layer in files that can't be read
  std::string naming, shared_naming;
  std::vector<SurveyedMatrix> matrices;
  std::vector<Finding> findings;
};

/// Looks at names, types, shapes and scalars of `layer`; reads no codes. `scheme`: how to read codes of four
/// bits, instead of what names and dtypes say. Throws Error where it has no experts.
LayerSurvey survey_layer(const Checkpoint& checkpoint, int64_t layer, std::optional<WeightScheme> scheme);

/// Whether the experts of `survey` have no names one by one in NVFP4: what is stored transposed, interleaved
/// or with biases in one tensor goes on as one.
bool stays_fused(const Checkpoint& checkpoint, const LayerSurvey& survey);

}  // namespace fourfold
