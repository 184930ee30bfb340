// `fourfold synthesize`.
#include <fmt/format.h>

#include <memory>

#include "tools/commands.h"
#include "tools/shape_argument.h"
#include "tools/synthesize.h"
#include "tools/terminal.h"

namespace fourfold {
namespace {

void set_shape(SynthesizeRequest& request, const std::string& text) {
  const LayerShape shape = parse_shape(text);
  request.experts = shape.experts;
  request.hidden = shape.hidden;
  request.intermediate = shape.intermediate;
  request.top_k = shape.top_k;
}

int execute(const SynthesizeRequest& request) {
  const SynthesizeResult result = synthesize(request);
  request.progress("");
  fmt::print("{}: {} experts, hidden {}, intermediate {}, top-{}, {} layer{}\n", request.directory.string(),
             request.experts, request.hidden, request.intermediate, request.top_k, request.layers,
             request.layers == 1 ? "" : "s");
  fmt::print(
      "  original/            {:>8.1f} MB  {}\n", static_cast<double>(result.original_bytes) / 1e6,
      request.original == OriginalFormat::kMxfp4 ? "MXFP4, DeepSeek-V4 names" : "bf16, Qwen3-MoE names");
  fmt::print("  nvfp4/               {:>8.1f} MB  ", static_cast<double>(result.nvfp4_bytes) / 1e6);
  if (request.original == OriginalFormat::kMxfp4) {
    fmt::print("by the exact cast: {} of {} blocks inexact\n", result.cast.inexact, result.cast.blocks);
  } else {
    fmt::print("by ModelOpt's rule\n");
  }
  fmt::print("  inputs.safetensors   {} tokens: x, topk_ids, topk_weights\n", request.tokens);
  fmt::print(
      "try: fourfold layertest --original {0}/original --nvfp4 {0}/nvfp4 --input {0}/inputs.safetensors\n",
      request.directory.string());
  return kExitFine;
}

}  // namespace

void add_synthesize(CLI::App& app, int& exit_code) {
  struct Arguments {
    SynthesizeRequest request;
    std::string directory, shape, original, profile = "realistic";
  };
  auto arguments = std::make_shared<Arguments>();
  CLI::App* command = app.add_subcommand(
      "synthesize", "Write a checkpoint and its NVFP4 conversion, in the layouts of real models");
  command->add_option("DIR", arguments->directory, "where original/, nvfp4/ and inputs.safetensors go")
      ->required();
  command
      ->add_option("--shape", arguments->shape,
                   fmt::format("E,H,I,K (experts, hidden, intermediate, top-k), or {}", shape_names()))
      ->required();
  command->add_option("--original", arguments->original, "format of the original")
      ->required()
      ->check(CLI::IsMember({"mxfp4", "bf16"}));
  command
      ->add_option("--profile", arguments->profile,
                   "distribution of weights and inputs; realistic: outlier channels and heavy tails")
      ->capture_default_str()
      ->check(CLI::IsMember({"gaussian", "realistic"}));
  command->add_option("--layers", arguments->request.layers, "number of layers")
      ->capture_default_str()
      ->check(whole_number<int64_t>())
      ->check(CLI::Range(1, 1000));
  command
      ->add_option("--tokens", arguments->request.tokens,
                   "tokens in inputs.safetensors; input_scale is calibrated on them and more of their kind")
      ->capture_default_str()
      ->check(whole_number<int64_t>())
      ->check(CLI::Range(1, 1 << 20));
  command->add_option("--seed", arguments->request.seed, "seed of everything")
      ->capture_default_str()
      ->check(whole_number<uint64_t>());
  command->add_flag("--force", arguments->request.force, "replace what is there");
  command->callback([arguments, &exit_code] {
    const Progress progress;
    SynthesizeRequest& request = arguments->request;
    request.directory = arguments->directory;
    set_shape(request, arguments->shape);
    request.original = arguments->original == "mxfp4" ? OriginalFormat::kMxfp4 : OriginalFormat::kBf16;
    request.profile = arguments->profile == "gaussian" ? WeightProfile::kGaussian : WeightProfile::kRealistic;
    request.progress = [&](std::string_view what) { what.empty() ? progress.clear() : progress.show(what); };
    exit_code = execute(request);
  });
}

}  // namespace fourfold
