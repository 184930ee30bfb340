// `fourfold synthesize`.
#include <fmt/format.h>

#include <array>
#include <memory>
#include <utility>

#include "tools/commands.h"
#include "tools/shape_argument.h"
#include "tools/synthesize.h"
#include "tools/synthetic_layout.h"
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

constexpr std::array<std::pair<const char*, OriginalFormat>, 3> kOriginals = {
    {{"mxfp4", OriginalFormat::kMxfp4}, {"bf16", OriginalFormat::kBf16}, {"fp8", OriginalFormat::kFp8}}};

const char* name_of(OriginalFormat format) {
  for (const auto& [name, value] : kOriginals) {
    if (value == format) return name;
  }
  return "?";
}

OriginalFormat parse_original(const std::string& text) {
  for (const auto& [name, value] : kOriginals) {
    if (name == text) return value;
  }
  return OriginalFormat::kBf16;
}

OriginalFormat original_of(const SyntheticFamily& family) {
  if (family.original == StoredAs::kMxfp4) return OriginalFormat::kMxfp4;
  return family.original == StoredAs::kFp8 ? OriginalFormat::kFp8 : OriginalFormat::kBf16;
}

/// Family and original: each follows from the other where one is left out.
void set_family(SynthesizeRequest& request, const std::string& family, const std::string& original) {
  if (family.empty() && original.empty())
    throw CLI::ValidationError("expected --original or --family, found neither");
  request.whole_family = !family.empty();
  const char* const of_original = original == "mxfp4" ? "deepseek-v4"
                                  : original == "fp8" ? "deepseek-v3"
                                                      : "qwen3-moe";
  request.family = family.empty() ? of_original : family;
  request.original =
      original.empty() ? original_of(*find_synthetic_family(family)) : parse_original(original);
}

int execute(const SynthesizeRequest& request) {
  const SynthesizeResult result = synthesize(request);
  request.progress("");
  fmt::print("{}: {} experts, hidden {}, intermediate {}, top-{}, {} layer{}\n", request.directory.string(),
             request.experts, request.hidden, request.intermediate, request.top_k, request.layers,
             request.layers == 1 ? "" : "s");
  fmt::print("  original/            {:>8.1f} MB  {}, names and config of {}\n",
             static_cast<double>(result.original_bytes) / 1e6, name_of(request.original), request.family);
  fmt::print("  nvfp4/               {:>8.1f} MB  ", static_cast<double>(result.nvfp4_bytes) / 1e6);
  if (request.original == OriginalFormat::kMxfp4) {
    fmt::print("by the exact cast: {} of {} blocks inexact\n", result.cast.inexact, result.cast.blocks);
  } else {
    fmt::print("by ModelOpt's rule\n");
  }
  fmt::print("  inputs.safetensors   {} tokens: {}\n", request.tokens,
             request.whole_family ? "x, for the model's own router" : "x, topk_ids, topk_weights");
  fmt::print(
      "try: fourfold layertest --original {0}/original --nvfp4 {0}/nvfp4 --input {0}/inputs.safetensors\n",
      request.directory.string());
  return kExitFine;
}

}  // namespace

void add_synthesize(CLI::App& app, int& exit_code) {
  struct SynthesizeArguments {
    SynthesizeRequest request;
    std::string directory, shape, original, family, profile = "realistic";
  };
  auto arguments = std::make_shared<SynthesizeArguments>();
  CLI::App* command = app.add_subcommand(
      "synthesize", "Write a checkpoint and its NVFP4 conversion, in the layouts of real models");
  command->add_option("DIR", arguments->directory, "where original/, nvfp4/ and inputs.safetensors go")
      ->required();
  command
      ->add_option("--shape", arguments->shape,
                   fmt::format("E,H,I,K (experts, hidden, intermediate, top-k), or {}", shape_names()))
      ->required();
  command
      ->add_option(
          "--original", arguments->original,
          "format of the original: names of DeepSeek-V4 with mxfp4, Qwen3-MoE with bf16, DeepSeek-V3 "
          "with fp8 (default: the family's)")
      ->check(CLI::IsMember({"mxfp4", "bf16", "fp8"}));
  command
      ->add_option("--family", arguments->family,
                   "a whole MoE layer of this family: its names, config, router, biases and shared expert")
      ->check(CLI::IsMember(synthetic_family_names()));
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
    set_family(request, arguments->family, arguments->original);
    request.profile = arguments->profile == "gaussian" ? WeightProfile::kGaussian : WeightProfile::kRealistic;
    request.progress = [&](std::string_view what) { what.empty() ? progress.clear() : progress.show(what); };
    exit_code = execute(request);
  });
}

}  // namespace fourfold
