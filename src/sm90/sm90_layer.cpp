#include "sm90/sm90_layer.h"

#include "cuda/expert_layer.h"
#include "sm90/expert_stages.h"

namespace fourfold::sm90 {

std::unique_ptr<MoeLayer> make_layer(const ExpertWeights& weights, const LayerConfig& config,
                                     const LayerOptions& options) {
  return std::make_unique<cuda::ExpertLayer<ExpertStages>>(weights, config, options);
}

}  // namespace fourfold::sm90
