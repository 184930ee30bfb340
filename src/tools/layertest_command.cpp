// `fourfold layertest`: opens checkpoints and inputs, runs the test, prints the report.
#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <memory>

#include "base/fail.h"
#include "base/files.h"
#include "fourfold/checkpoint.h"
#include "fourfold/model_family.h"
#include "tools/commands.h"
#include "tools/diagnosis_command.h"
#include "tools/input_routing.h"
#include "tools/layertest.h"
#include "tools/layertest_report.h"
#include "tools/model_test.h"
#include "tools/number_list.h"
#include "tools/report_page.h"
#include "tools/rule_options.h"
#include "tools/stress.h"
#include "tools/terminal.h"
#include "tools/weight_comparison.h"

namespace fourfold {
namespace {

struct LayertestArguments : RuleArguments {
  std::string original, nvfp4;
  int64_t layer = 0;
  std::string experts, input;
  int64_t tokens = 0;
  uint64_t seed = 0;
  std::string activations = "nvfp4", activation_scale, activation_rule = "amax", gate_up = "exact", backend,
              accumulate = "f32", json;
  std::string layers, html;
  bool double_quantize = false, all_layers = false, stress = false;
  DiagnosisArguments diagnosis;

  bool wants_many_layers() const { return all_layers || !layers.empty(); }
};

constexpr int64_t kDefaultTokens = 64;

/// Policies for x and for the intermediate: given ("P" or "P,P"), or the default.
DefaultPolicies policies_for(const LayertestArguments& arguments, const ExpertWeights& weights,
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

/// The checkpoints of a run, opened.
struct Opened {
  std::shared_ptr<const Checkpoint> nvfp4, original;  ///< original: null where there is none

  void drop_pages() const {
    nvfp4->drop_pages();
    if (original) original->drop_pages();
  }
};

using ShowProgress = std::function<void(std::string_view)>;

/// One layer's test; members in the order in which they come to be known.
class Run {
 public:
  Run(const LayertestArguments& arguments, const Opened& opened, int64_t layer)
      : arguments_(arguments), opened_(opened), layer_(layer) {}

  LayerResult test(const ShowProgress& progress) {
    prepare();
    LayertestRequest request;
    request.original = original_ ? &original_->weights : nullptr;
    request.nvfp4 = &weights_;
    request.expert_ids = nvfp4_.expert_ids;
    request.config = config_;
    request.options = options_;
    request.backend = choice_.backend;
    request.inputs = &inputs_;
    request.progress = progress;
    LayertestReport report = run_layertest(request);
    opened_.nvfp4->require_intact();
    if (opened_.original) opened_.original->require_intact();
    fact("backend", fmt::format("{} ({}); kernel: {}", report.backend, choice_.reason, report.kernel));
    return {std::move(subject_), std::move(report)};
  }

  /// What --stress runs, and on which backend.
  std::pair<StressSubject, const Backend*> stress_subject() {
    prepare();
    return {{fmt::format("layer {} of {}", layer_, arguments_.nvfp4), weights_, nvfp4_.expert_ids, config_,
             options_, inputs_},
            choice_.backend};
  }

 private:
  void prepare() {
    load_checkpoints();
    apply_named_steps();
    configure();
    load_inputs();
    choose();
  }

  void fact(const std::string& label, const std::string& text) { subject_.facts.emplace_back(label, text); }

  void load_checkpoints() {
    const std::vector<int64_t> experts = parse_list(arguments_.experts, "--experts");
    const auto order = parse_gate_up_order(arguments_.gate_up_order);
    nvfp4_ = load_experts(opened_.nvfp4, layer_, experts, order, parse_weight_scheme(arguments_.scheme));
    if (nvfp4_.scheme.find("nvfp4") == std::string::npos) {
      throw LayerIsNotNvfp4(fmt::format(
          "--nvfp4 {}: expected NVFP4 experts, found {}; is it the original? pass it as --original",
          arguments_.nvfp4, nvfp4_.scheme));
    }
    weights_ = nvfp4_.weights;
    const ModelConfig& config = opened_.nvfp4->config();
    subject_.model = config.model_type.empty() ? "unknown" : config.model_type;
    subject_.layer = layer_;
    subject_.notes = nvfp4_.notes;
    fact("model", fmt::format("{}, layer {}: {} of {} experts, hidden {}, intermediate {}", subject_.model,
                              layer_, nvfp4_.weights.count(), nvfp4_.experts_in_checkpoint, weights_.hidden,
                              weights_.intermediate));
    fact("nvfp4", fmt::format("{}: {}{}, {}", arguments_.nvfp4, nvfp4_.scheme,
                              arguments_.scheme.empty() ? "" : " (--scheme)", nvfp4_.naming));
    if (arguments_.original.empty()) return require_fused_for_order();

    original_ = load_experts(opened_.original, layer_, experts, order);
    original_config_ = opened_.original->config();
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
    const auto gate_text = [](const ExpertWeights& weights) {
      return weights.experts.front().has_gate() ? "experts with a gate" : "experts without a gate";
    };
    if (before.experts.front().has_gate() != weights_.experts.front().has_gate()) {
      reject(fmt::format("--original {}", arguments_.original),
             fmt::format("{}, as in {}", gate_text(weights_), arguments_.nvfp4), gate_text(before));
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
    rules_ = rules_of(opened_.nvfp4->config(), overrides);
    config_ = config_of_layer();
    fact("family", rules_.family == "given" ? "unknown: the command line says how the layer is computed"
                                            : rules_.family);
    fact("activation",
         fmt::format("{}{}", describe(config_.activation), overrides.activation ? " (--activation)" : ""));
    if (original_config_) note_other_rules(overrides);
    describe_shared();
    options_.activations = *parse_activation_format(arguments_.activations);
    options_.activation_rule = activation_rule_in(arguments_.activation_rule, {&options_.activations, 1});
    const DefaultPolicies policies = policies_for(arguments_, weights_, options_.activations);
    options_.x_scale = policies.x;
    options_.intermediate_scale = policies.intermediate;
    set_scales_over_all_experts();
    options_.accumulation = arguments_.accumulate == "f64" ? Accumulation::kFloat64 : Accumulation::kFloat32;
    const std::string origin = arguments_.activation_scale.empty() ? "default" : "--activation-scale";
    fact("staging",
         is_nvfp4(options_.activations)
             ? fmt::format("{}, scale of x {}, of the intermediate {} ({}){}", arguments_.activations,
                           to_string(policies.x), to_string(policies.intermediate), origin,
                           options_.activation_rule == ScaleRule::kAmax
                               ? ""
                               : fmt::format("; block scales by {}", arguments_.activation_rule))
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
        load_experts(opened_.nvfp4, layer_, {}, parse_gate_up_order(arguments_.gate_up_order),
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
                  : read_inputs(arguments_.input, layer_, config_.hidden, tokens);
    if (!arguments_.input.empty()) require_run_memory(inputs_.tokens);
    const RoutingTask task{*opened_.nvfp4, layer_, nvfp4_, rules_, !arguments_.router.empty(),
                           arguments_.seed};
    for (std::string& note : route_inputs(task, inputs_)) subject_.notes.push_back(std::move(note));
    config_.top_k = inputs_.top_k;
    fact("input", fmt::format("{} tokens, x: {}; routing: {}", inputs_.tokens, inputs_.x_origin,
                              inputs_.routing_origin));
  }

  /// x, a workspace, and the stages of three runs at a time, at about 2 bytes a value and a half beside for
  /// staging.
  void require_run_memory(int64_t tokens) const {
    const int64_t top_k = std::min(opened_.nvfp4->config().top_k.value_or(1), config_.experts);
    const int64_t row_bytes = 3 * (2 * weights_.hidden + 4 * weights_.intermediate);
    int64_t bytes = 0;
    if (__builtin_mul_overflow(tokens * top_k, 4 * row_bytes, &bytes)) bytes = INT64_MAX;
    require_memory(bytes, fmt::format("layertest with {} tokens (--tokens takes fewer)", tokens));
  }

  void choose() { choice_ = choose_backend(arguments_.backend, weights_, config_, options_); }

  const LayertestArguments& arguments_;
  const Opened& opened_;
  int64_t layer_;
  LayertestSubject subject_;
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

/// `damage`: filled, and what can be read is tested; null: damage is an Error.
Opened open_checkpoints(const LayertestArguments& arguments, std::vector<std::string>* damage) {
  const auto open = [&](const std::string& path) {
    if (path.empty()) return std::shared_ptr<const Checkpoint>();
    if (damage == nullptr) return Checkpoint::open(path);
    std::vector<CheckpointDamage> found;
    auto checkpoint = Checkpoint::open(path, found);
    for (const CheckpointDamage& part : found) damage->push_back(part.message);
    return checkpoint;
  };
  Opened opened;
  opened.nvfp4 = open(arguments.nvfp4);
  opened.original = open(arguments.original);
  return opened;
}

int test_one_layer(const LayertestArguments& arguments) {
  const Opened opened = open_checkpoints(arguments, nullptr);
  const Progress progress;
  const LayerResult result =
      Run(arguments, opened, arguments.layer).test([&](std::string_view what) { progress.show(what); });
  progress.clear();
  fmt::print("{}", format_table(result));
  if (!arguments.json.empty()) write_file(arguments.json, format_json(result));
  if (!arguments.html.empty()) write_file(arguments.html, format_html(result));
  return exit_code_of(result.report);
}

int test_many_layers(const LayertestArguments& arguments) {
  ModelTask task;
  if (!arguments.all_layers) task.layers = parse_list(arguments.layers, "--layers");
  const Opened opened = open_checkpoints(arguments, &task.damage);
  const Progress progress;
  task.test_layer = [&](int64_t layer, const ShowProgress& show) {
    return Run(arguments, opened, layer).test(show);
  };
  task.after_layer = [&] { opened.drop_pages(); };
  task.progress = [&](std::string_view what) { progress.show(what); };
  const ModelReport report = test_model(*opened.nvfp4, task);
  progress.clear();
  fmt::print("{}", format_model_table(report));
  if (!arguments.json.empty()) write_file(arguments.json, format_model_json(report));
  if (!arguments.html.empty()) write_file(arguments.html, format_model_html(report));
  return exit_code_of(report);
}

/// Made-up layers, and the checkpoint's where there is one.
int stress(const LayertestArguments& arguments) {
  StressRequest request;
  request.subjects = stress_layers(*parse_activation_format(arguments.activations), arguments.seed);
  const Progress progress;
  request.progress = [&](std::string_view what) { progress.show(what); };
  Opened opened;
  if (arguments.nvfp4.empty()) {
    const StressSubject& first = request.subjects.front();
    request.backend = choose_backend(arguments.backend, first.weights, first.config, first.options).backend;
  } else {
    opened = open_checkpoints(arguments, nullptr);
    auto [subject, backend] = Run(arguments, opened, arguments.layer).stress_subject();
    request.subjects.push_back(std::move(subject));
    request.backend = backend;
  }
  const StressReport report = run_stress(request);
  progress.clear();
  if (opened.nvfp4) opened.nvfp4->require_intact();
  fmt::print("{}", format_stress_table(report));
  if (!arguments.json.empty()) write_file(arguments.json, format_stress_json(report));
  return exit_code_of(report);
}

int execute(const LayertestArguments& arguments) {
  // Before the work, of which whole models have much.
  for (const std::string& file : {arguments.json, arguments.html}) {
    if (!file.empty()) require_creatable(file);
  }
  if (arguments.stress) return stress(arguments);
  const DiagnosisTask diagnosis{arguments.diagnosis, arguments,      arguments.nvfp4, arguments.input,
                                arguments.json,      arguments.html, arguments.layer, arguments.seed};
  if (arguments.diagnosis.self_test) return test_itself(diagnosis);
  if (arguments.nvfp4.empty()) throw CLI::RequiredError("--nvfp4");
  if (!arguments.diagnosis.candidate.empty()) return diagnose_candidate(diagnosis);
  return arguments.wants_many_layers() ? test_many_layers(arguments) : test_one_layer(arguments);
}

}  // namespace

void add_layertest(CLI::App& app, int& exit_code) {
  auto arguments = std::make_shared<LayertestArguments>();
  CLI::App* command = app.add_subcommand(
      "layertest", "Run one MoE layer stage by stage against a bf16 reference, and say what is at fault");
  command->add_option("--nvfp4", arguments->nvfp4, "NVFP4 checkpoint: a model directory")->check(nonempty());
  command
      ->add_option(
          "--original", arguments->original,
          "the checkpoint it was made from (MXFP4 or bf16); without it, what the checkpoint lost is not told")
      ->check(nonempty());
  CLI::Option* layer = command->add_option("--layer", arguments->layer, "layer number")
                           ->capture_default_str()
                           ->check(whole_number<int64_t>());
  CLI::Option* layers =
      command
          ->add_option("--layers", arguments->layers,
                       "several layers, e.g. 0-60,3, one at a time, and a table sorted by the worst")
          ->check(nonempty("layers"))
          ->excludes(layer);
  command
      ->add_flag(
          "--stress", arguments->stress,
          "lean on the backend's promises: NaN in padding and workspace, odd sizes, repeats, calls side "
          "by side, splits over ranks; on made-up layers, and that of --nvfp4 where it is given")
      ->excludes(layers);
  command->add_flag("--all-layers", arguments->all_layers, "the same for every layer with NVFP4 experts")
      ->excludes("--stress")
      ->excludes(layer)
      ->excludes(layers);
  command->add_option("--experts", arguments->experts, "experts to test, e.g. 0,3,8-11 (default: all)");
  command
      ->add_option("--tokens", arguments->tokens,
                   fmt::format("number of tokens (default: {}, or all of --input)", kDefaultTokens))
      ->check(whole_number<int64_t>())
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24));
  command
      ->add_option(
          "--input", arguments->input,
          "safetensors with x [T, H], and optionally topk_ids and topk_weights [T, K], or token_ids [T]; or "
          "the same of several layers, named layers.L.x ...")
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
  add_activation_rule(*command, arguments->activation_rule);
  add_rule_options(*command, *arguments, "--nvfp4");
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
  command
      ->add_option("--html", arguments->html,
                   "write the report as a page to look at: verdict, stages, charts; it loads nothing")
      ->check(nonempty())
      ->excludes("--stress");
  add_diagnosis_options(*command, arguments->diagnosis);
  command->footer(
      "Exit code: 0 fine, 1 error, 2 usage, 3 a finding. Of several layers: 1 if one can't be read, else 3 "
      "if one has "
      "a finding.");
  command->callback([arguments, &exit_code] { exit_code = execute(*arguments); });
}

}  // namespace fourfold
