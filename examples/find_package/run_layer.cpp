// Runs layer 0 of the model named on the command line on one token of ones: run_layer MODEL
#include <fourfold/checkpoint.h>
#include <fourfold/model_family.h>
#include <fourfold/moe_layer.h>

#include <cstdio>
#include <numeric>

using namespace fourfold;

int main(int, char** argv) try {
  const auto checkpoint = Checkpoint::open(argv[1]);
  const ExpertLayer experts = load_experts(checkpoint, /*layer=*/0);
  const LayerConfig config = layer_config(experts, rules_of(checkpoint->config()));
  const auto policies = default_scale_policies(experts.weights, ActivationFormat::kNvfp4);
  const LayerOptions options{.x_scale = policies.x, .intermediate_scale = policies.intermediate};
  const BackendChoice choice = choose_backend("cpu", experts.weights, config, options);
  const auto layer = choice.backend->make_layer(experts.weights, config, options);
  const LayerPlan plan = layer->plan(/*max_tokens=*/1);
  const Buffer workspace = host_memory().allocate(plan.workspace_bytes);

  const std::vector<Bf16> x(static_cast<size_t>(config.hidden), encode_bf16(1.0f));
  std::vector<Bf16> y(x.size());
  std::vector<int32_t> topk_ids(static_cast<size_t>(config.top_k));
  std::iota(topk_ids.begin(), topk_ids.end(), 0);
  const std::vector<float> topk_weights(topk_ids.size(), 0.5f);
  layer->forward(plan, {.x = {x.data(), 1, config.hidden},
                        .routing = {MatrixView<const int32_t>(topk_ids.data(), 1, config.top_k),
                                    {topk_weights.data(), 1, config.top_k}},
                        .y = MatrixView<Bf16>(y.data(), 1, config.hidden),
                        .workspace = {workspace.data(), workspace.bytes()}});
  std::printf("y[0..3] = %04x %04x %04x %04x\n", y[0].bits, y[1].bits, y[2].bits, y[3].bits);
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 1;
}
