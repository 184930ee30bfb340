// `fourfold layertest`: opens checkpoints and inputs, runs the test, prints the report.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <memory>
#include <set>

#include "base/fail.h"
#include "base/files.h"
#include "base/mapped_file.h"
#include "fourfold/checkpoint.h"
#include "fourfold/model_family.h"
#include "tools/commands.h"
#include "tools/input_routing.h"
#include "tools/layertest.h"
#include "tools/layertest_report.h"
#include "tools/self_test.h"
#include "tools/terminal.h"
#include "tools/weight_comparison.h"

namespace fourfold {
namespace {

struct Arguments {
  std::string original, nvfp4;
  int64_t layer = 0;
  std::string experts, input;
  int64_t tokens = 0;
  uint64_t seed = 0;
  std::string activations = "nvfp4", activation_scale, gate_up = "exact", backend, accumulate = "f32", json;
  std::string activation, router, gate_up_order, scheme;
  bool double_quantize = false, weight_on_input = false, self_test = false;
  std::string candidate, activation_format;
};

constexpr int64_t kDefaultTokens = 64;

int64_t parse_index(std::string_view text, const std::string& option) {
  int64_t value = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0) {
    throw CLI::ValidationError(option,
                               fmt::format("expected numbers and ranges such as 0,3,8-11, found '{}'", text));
  }
  return value;
}

/// "0,3,8-11" -> ascending numbers, each once.
std::vector<int64_t> parse_list(const std::string& text, const std::string& option) {
  constexpr int64_t kMost = 1 << 20;
  std::set<int64_t> numbers;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const std::string_view part = std::string_view(text).substr(begin, end - begin);
    const size_t dash = part.find('-');
    const int64_t first = parse_index(part.substr(0, dash), option);
    const int64_t last = dash == std::string_view::npos ? first : parse_index(part.substr(dash + 1), option);
    if (last < first || last > kMost) {
      throw CLI::ValidationError(option,
                                 fmt::format("expected ascending ranges below {}, found '{}'", kMost, part));
    }
    for (int64_t number = first; number <= last; ++number) numbers.insert(number);
    begin = end + 1;
  }
  return {numbers.begin(), numbers.end()};
}

/// What the command line says of the layer's rules.
RuleOverrides overrides_in(const Arguments& arguments) {
  RuleOverrides overrides;
  overrides.weight_on_input = arguments.weight_on_input;
  try {
    if (!arguments.activation.empty()) overrides.activation = parse_activation(arguments.activation);
    if (!arguments.router.empty()) overrides.router = parse_router(arguments.router);
  } catch (const Error& error) {
    throw CLI::ValidationError(error.what());
  }
  return overrides;
}

/// Policies for x and for the intermediate: given ("P" or "P,P"), or the default.
DefaultPolicies policies_for(const Arguments& arguments, const ExpertWeights& weights,
                             ActivationFormat format) {
  if (arguments.activation_scale.empty()) return default_scale_policies(weights, format);
  if (!is_nvfp4(format)) {
    throw CLI::ValidationError(
        "--activation-scale",
        fmt::format("expected --activations nvfp4 or nvfp4x2 beside it, found {}, which has {}",
                    to_string(format), format == ActivationFormat::kFp8 ? "one scale a token" : "no scales"));
  }
  return parse_scale_policies(arguments.activation_scale);
}

/// One run of the command; members in the order in which they come to be known.
class Run {
 public:
  explicit Run(const Arguments& arguments) : arguments_(arguments) {}

  int execute() {
    load_checkpoints();
    apply_named_steps();
    configure();
    load_inputs();
    choose();
    const Progress progress;
    LayertestRequest request;
    request.original = original_ ? &original_->weights : nullptr;
    request.nvfp4 = &weights_;
    request.expert_ids = nvfp4_.expert_ids;
    request.config = config_;
    request.options = options_;
    request.backend = choice_.backend;
    request.inputs = &inputs_;
    request.progress = [&](std::string_view what) { progress.show(what); };
    const LayertestReport report = run_layertest(request);
    progress.clear();
    require_mapped_files_intact();

    fact("backend", fmt::format("{} ({}); kernel: {}", report.backend, choice_.reason, report.kernel));
    fmt::print("{}", format_table(subject_, report));
    if (!arguments_.json.empty()) write_file(arguments_.json, format_json(subject_, report));
    return exit_code_of(report);
  }

 private:
  void fact(const std::string& label, const std::string& text) { subject_.facts.emplace_back(label, text); }

  void load_checkpoints() {
    const std::vector<int64_t> experts = parse_list(arguments_.experts, "--experts");
    const auto order = parse_gate_up_order(arguments_.gate_up_order);
    checkpoint_ = Checkpoint::open(arguments_.nvfp4);
    nvfp4_ =
        load_experts(checkpoint_, arguments_.layer, experts, order, parse_weight_scheme(arguments_.scheme));
    if (nvfp4_.scheme.find("nvfp4") == std::string::npos) {
      reject(fmt::format("--nvfp4 {}", arguments_.nvfp4), "NVFP4 experts",
             fmt::format("{}; is it the original? pass it as --original", nvfp4_.scheme));
    }
    weights_ = nvfp4_.weights;
    const ModelConfig& config = checkpoint_->config();
    subject_.model = config.model_type.empty() ? "unknown" : config.model_type;
    subject_.layer = arguments_.layer;
    subject_.notes = nvfp4_.notes;
    fact("model", fmt::format("{}, layer {}: {} of {} experts, hidden {}, intermediate {}", subject_.model,
                              arguments_.layer, nvfp4_.weights.count(), nvfp4_.experts_in_checkpoint,
                              weights_.hidden, weights_.intermediate));
    fact("nvfp4", fmt::format("{}: {}{}, {}", arguments_.nvfp4, nvfp4_.scheme,
                              arguments_.scheme.empty() ? "" : " (--scheme)", nvfp4_.naming));
    if (arguments_.original.empty()) return require_fused_for_order();

    const auto original = Checkpoint::open(arguments_.original);
    original_ = load_experts(original, arguments_.layer, experts, order);
    original_config_ = original->config();
    require_fused_for_order();
    require_alike();
    fact("original", fmt::format("{}: {}, {}", arguments_.original, original_->scheme, original_->naming));
    for (const std::string& note : original_->notes) subject_.notes.push_back("original: " + note);
  }

  /// An order that nothing is read by was meant for something.
  void require_fused_for_order() const {
    const auto is_fused = [](const ExpertLayer& layer) {
      return layer.scheme.find("(fused") != std::string::npos;
    };
    if (arguments_.gate_up_order.empty() || is_fused(nvfp4_) || (original_ && is_fused(*original_))) return;
    reject("--gate-up-order", "gate and up in one tensor",
           fmt::format("experts one by one: {}", nvfp4_.naming));
  }

  /// Original and NVFP4 are the same layer.
  void require_alike() const {
    const ExpertWeights& before = original_->weights;
    if (before.count() != weights_.count() || before.hidden != weights_.hidden ||
        before.intermediate != weights_.intermediate) {
      reject(fmt::format("--original {}", arguments_.original),
             fmt::format("{} experts, hidden {}, intermediate {}, as in {}", weights_.count(),
                         weights_.hidden, weights_.intermediate, arguments_.nvfp4),
             fmt::format("{} experts, hidden {}, intermediate {}", before.count(), before.hidden,
                         before.intermediate));
    }
    const auto shared_text = [](const ExpertWeights& weights) {
      return weights.shared ? fmt::format("a shared expert of intermediate {}{}",
                                          weights.shared->intermediate, weights.shared->gate ? ", gated" : "")
                            : std::string("no shared expert");
    };
    if (shared_text(before) != shared_text(weights_)) {
      reject(fmt::format("--original {}", arguments_.original),
             fmt::format("{}, as in {}", shared_text(weights_), arguments_.nvfp4), shared_text(before));
    }
  }

  void apply_named_steps() {
    if (arguments_.double_quantize) {
      weights_ = quantize_again(weights_);
      fact("weights",
           fmt::format("quantized again through bf16, gate and up as one tensor: moved by {:.3g} relative L2 "
                       "(--double-quantize)",
                       distance_from_stored()));
    }
    if (arguments_.gate_up == "fold") {
      FoldReport fold;
      weights_ = fold_gate_up(weights_, &fold);
      fact("gate/up",
           fmt::format("folded into one global scale: {} of {} rescaled blocks changed, by up to {:.2f}%, {} "
                       "became zero; weights moved by {:.3g} relative L2",
                       fold.changed, fold.blocks, 100.0 * fold.largest_relative_change, fold.underflowed,
                       distance_from_stored()));
    } else {
      fact("gate/up", "exact: a global scale each");
    }
  }

  /// How far the named steps took the weights from what the checkpoint stores.
  double distance_from_stored() const { return compare_values(nvfp4_.weights, weights_).relative_l2(); }

  void configure() {
    const RuleOverrides overrides = overrides_in(arguments_);
    rules_ = rules_of(checkpoint_->config(), overrides);
    config_ = config_of_layer();
    fact("family", rules_.family == "given" ? "unknown: the command line says how the layer is computed"
                                            : rules_.family);
    fact("activation",
         fmt::format("{}{}", describe(config_.activation), overrides.activation ? " (--activation)" : ""));
    if (original_config_) note_other_rules(overrides);
    describe_shared();
    options_.activations = *parse_activation_format(arguments_.activations);
    const DefaultPolicies policies = policies_for(arguments_, weights_, options_.activations);
    options_.x_scale = policies.x;
    options_.intermediate_scale = policies.intermediate;
    set_scales_over_all_experts();
    options_.accumulation = arguments_.accumulate == "f64" ? Accumulation::kFloat64 : Accumulation::kFloat32;
    const std::string origin = arguments_.activation_scale.empty() ? "default" : "--activation-scale";
    fact("staging",
         is_nvfp4(options_.activations)
             ? fmt::format("{}, scale of x {}, of the intermediate {} ({})", arguments_.activations,
                           to_string(policies.x), to_string(policies.intermediate), origin)
             : arguments_.activations);
  }

  /// Errors name the checkpoint whose tensors and rules don't fit each other.
  LayerConfig config_of_layer() const {
    try {
      return layer_config(nvfp4_, rules_);
    } catch (const Error& error) {
      fail(error.code(), "{}: {}", arguments_.nvfp4, error.what());
    }
  }

  /// The original's config should describe the same layer.
  void note_other_rules(const RuleOverrides& overrides) {
    if (family_name(*original_config_).empty()) return;
    const LayerRules original = rules_of(*original_config_, overrides);
    if (describe(original.activation) != describe(config_.activation)) {
      subject_.notes.push_back(
          fmt::format("the original's config says another activation: {}", describe(original.activation)));
    }
    if (original.router && rules_.router && describe_router(original) != describe_router(rules_)) {
      subject_.notes.push_back(
          fmt::format("the original's config says another router: {}", describe_router(original)));
    }
  }

  void describe_shared() {
    if (!weights_.shared) return;
    const SharedExpert& shared = *weights_.shared;
    std::string original;
    if (original_) original = fmt::format("; original: {}", original_->shared_scheme);
    fact("shared",
         fmt::format(
             "{}: {}, intermediate {}{}{}; activations {}, {}", nvfp4_.shared_naming, nvfp4_.shared_scheme,
             shared.intermediate, shared.gate ? ", x sigmoid of its gate" : "", original,
             is_all_nvfp4(shared.expert) ? arguments_.activations : "bf16 (its weights are not NVFP4)",
             describe(config_.shared_activation)));
  }

  /// max-over-experts is over the checkpoint's experts, whichever of them are under test.
  void set_scales_over_all_experts() {
    if (static_cast<int64_t>(nvfp4_.expert_ids.size()) == nvfp4_.experts_in_checkpoint) return;
    if (options_.x_scale != ScalePolicy::kMaxOverExperts &&
        options_.intermediate_scale != ScalePolicy::kMaxOverExperts) {
      return;
    }
    const ExpertWeights all =
        load_experts(checkpoint_, arguments_.layer, {}, parse_gate_up_order(arguments_.gate_up_order),
                     parse_weight_scheme(arguments_.scheme))
            .weights;
    const std::vector<float> x = x_input_scales(all), intermediate = intermediate_input_scales(all);
    options_.x_max_scale = *std::max_element(x.begin(), x.end());
    options_.intermediate_max_scale = *std::max_element(intermediate.begin(), intermediate.end());
  }

  void load_inputs() {
    const int64_t tokens = arguments_.tokens;
    if (arguments_.input.empty()) require_run_memory(tokens > 0 ? tokens : kDefaultTokens);
    inputs_ = arguments_.input.empty()
                  ? make_inputs(tokens > 0 ? tokens : kDefaultTokens, config_.hidden, arguments_.seed, false)
                  : read_inputs(arguments_.input, config_.hidden, tokens);
    if (!arguments_.input.empty()) require_run_memory(inputs_.tokens);
    const RoutingTask task{*checkpoint_, arguments_.layer,           nvfp4_,
                           rules_,       !arguments_.router.empty(), arguments_.seed};
    for (std::string& note : route_inputs(task, inputs_)) subject_.notes.push_back(std::move(note));
    config_.top_k = inputs_.top_k;
    fact("input", fmt::format("{} tokens, x: {}; routing: {}", inputs_.tokens, inputs_.x_origin,
                              inputs_.routing_origin));
  }

  /// x, a workspace, and the stages of three runs at a time, at about 2 bytes a value and a half beside for
  /// staging.
  void require_run_memory(int64_t tokens) const {
    const int64_t top_k = std::min(checkpoint_->config().top_k.value_or(1), config_.experts);
    const int64_t row_bytes = 3 * (2 * weights_.hidden + 4 * weights_.intermediate);
    int64_t bytes = 0;
    if (__builtin_mul_overflow(tokens * top_k, 4 * row_bytes, &bytes)) bytes = INT64_MAX;
    require_memory(bytes, fmt::format("layertest with {} tokens (--tokens takes fewer)", tokens));
  }

  void choose() { choice_ = choose_backend(arguments_.backend, weights_, config_, options_); }

  const Arguments& arguments_;
  LayertestSubject subject_;
  std::shared_ptr<const Checkpoint> checkpoint_;
  ExpertLayer nvfp4_;
  std::optional<ExpertLayer> original_;
  std::optional<ModelConfig> original_config_;
  ExpertWeights weights_;
  LayerRules rules_;
  LayerConfig config_;
  LayerOptions options_;
  LayerInputs inputs_;
  BackendChoice choice_;
};

int run_self_test_command(const Arguments& arguments) {
  const Progress progress;
  SelfTestRequest request;
  request.seed = arguments.seed;
  request.progress = [&](std::string_view what) { progress.show(what); };
  const SelfTestReport report = run_self_test(request);
  progress.clear();
  fmt::print("{}", format_self_test(report));
  if (!arguments.json.empty()) write_file(arguments.json, self_test_json(report));
  return report.passes() ? kExitFine : kExitFinding;
}

int run_command(const Arguments& arguments) {
  if (arguments.self_test) return run_self_test_command(arguments);
  if (arguments.nvfp4.empty()) throw CLI::RequiredError("--nvfp4");
  return Run(arguments).execute();
}

void add_diagnosis_options(CLI::App& command, Arguments& arguments) {
  command.add_flag("--self-test", arguments.self_test,
                   "plant every known fault and show that the diagnosis names it (docs/diagnosis.md)");
}

}  // namespace

void add_layertest(CLI::App& app, int& exit_code) {
  auto arguments = std::make_shared<Arguments>();
  CLI::App* command = app.add_subcommand(
      "layertest", "Run one MoE layer stage by stage against a bf16 reference, and say what is at fault");
  command
      ->add_option("--nvfp4", arguments->nvfp4,
                   "NVFP4 checkpoint: a model directory (required, but for --self-test)")
      ->check(nonempty());
  command
      ->add_option(
          "--original", arguments->original,
          "the checkpoint it was made from (MXFP4 or bf16); without it, what the checkpoint lost is not told")
      ->check(nonempty());
  command->add_option("--layer", arguments->layer, "layer number")
      ->capture_default_str()
      ->check(whole_number<int64_t>());
  command->add_option("--experts", arguments->experts, "experts to test, e.g. 0,3,8-11 (default: all)");
  command
      ->add_option("--tokens", arguments->tokens,
                   fmt::format("number of tokens (default: {}, or all of --input)", kDefaultTokens))
      ->check(whole_number<int64_t>())
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24));
  command
      ->add_option(
          "--input", arguments->input,
          "safetensors with x [T, H], and optionally topk_ids and topk_weights [T, K], or token_ids [T]")
      ->check(nonempty());
  command->add_option("--seed", arguments->seed, "seed of generated inputs and routing")
      ->capture_default_str()
      ->check(whole_number<uint64_t>());
  command->add_option("--activations", arguments->activations, "what activations become before a GEMM")
      ->capture_default_str()
      ->check(CLI::IsMember({"nvfp4", "nvfp4x2", "fp8", "bf16"}));
  command->add_option(
      "--activation-scale", arguments->activation_scale,
      "global scale of NVFP4 activations: static, max-over-experts, dynamic-tensor or dynamic-token; two, "
      "with a comma, for x and the intermediate (default: static where every expert has input_scale, "
      "dynamic-token where none has)");
  command
      ->add_option("--activation", arguments->activation,
                   "the function between the GEMMs, instead of the config's: swiglu, swiglu-step, geglu, "
                   "geglu-tanh, relu2, silu or gelu, with ,alpha=A ,beta=B ,limit=L, e.g. swiglu,limit=10")
      ->check(nonempty("an activation"));
  command
      ->add_option("--router", arguments->router,
                   "how the checkpoint's router is computed, instead of the config's: softmax, "
                   "softmax-of-top-k, sigmoid or sqrt-softplus, with ,top-k=K ,renormalise=yes|no ,scale=F "
                   ",groups=G ,top-groups=N")
      ->check(nonempty("a router"));
  command->add_flag("--weight-on-input", arguments->weight_on_input,
                    "routing weights multiply an expert's input instead of its output (Llama-4)");
  command
      ->add_option("--gate-up-order", arguments->gate_up_order,
                   "order of gate and up in fused tensors (default: the family's)")
      ->check(CLI::IsMember({"gate-first", "up-first", "interleaved"}));
  command
      ->add_option("--scheme", arguments->scheme,
                   "how to read the four-bit weights of --nvfp4, instead of what tensor names and types say: "
                   "modelopt (global scales multiply), compressed-tensors (they divide) or mxfp4")
      ->check(CLI::IsMember({"modelopt", "compressed-tensors", "mxfp4"}));
  command
      ->add_option("--gate-up", arguments->gate_up,
                   "global scales of gate and up: one each, or folded into one")
      ->capture_default_str()
      ->check(CLI::IsMember({"exact", "fold"}));
  command->add_option("--accumulate", arguments->accumulate, "sums of the reference")
      ->capture_default_str()
      ->check(CLI::IsMember({"f32", "f64"}));
  command->add_option(
      "--backend", arguments->backend,
      fmt::format("backend to test (default: the best that can run the layer, or {})", kBackendVariable));
  add_isa_option(*command);
  command->add_flag("--double-quantize", arguments->double_quantize,
                    "dequantize to bf16 and quantize again, gate and up as one tensor, to see the loss");
  command->add_option("--json", arguments->json, "write the report as JSON too (docs/layertest.md)")
      ->check(nonempty());
  command->footer("Exit code: 0 fine, 1 error, 2 usage, 3 a finding.");
  add_diagnosis_options(*command, *arguments);
  command->callback([arguments, &exit_code] { exit_code = run_command(*arguments); });
}

}  // namespace fourfold
