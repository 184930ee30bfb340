#include "tools/calibrate.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <set>

#include "base/fail.h"
#include "base/files.h"
#include "checkpoint/layer_survey.h"
#include "fourfold/moe_layer.h"
#include "fourfold/quantize.h"
#include "tools/input_routing.h"
#include "tools/layer_inputs.h"
#include "tools/number_list.h"

namespace fourfold {
namespace {

/// Of the stages of one piece of the tokens. Large enough for GEMMs that are bound by arithmetic.
constexpr int64_t kPieceBytes = int64_t{512} << 20;

/// Names of linears, as they are where each is stored on its own.
struct ExpertLinears {
  std::string gate, up, down;
};

ExpertLinears names_of(const Expert& expert, const BlockNames& block) {
  return {fmt::format("{}.{}", expert.name, block.gate), fmt::format("{}.{}", expert.name, block.up),
          fmt::format("{}.{}", expert.name, block.down)};
}

/// One layer: loaded, run on all inputs, judged.
class LayerRun {
 public:
  LayerRun(const std::shared_ptr<const Checkpoint>& checkpoint, const CalibrateRequest& request,
           int64_t layer)
      : checkpoint_(*checkpoint),
        request_(request),
        experts_(load_experts(checkpoint, layer, {}, request.gate_up_order, request.scheme)),
        rules_(rules_of(checkpoint->config(), request.overrides)),
        config_(layer_config(experts_, rules_)),
        amax_(experts_.weights.count()) {
    options_.activations = ActivationFormat::kBf16;
    result_.layer = layer;
    result_.naming = experts_.naming;
  }

  void run(const InputFile& file) {
    const int64_t tokens = file.tokens(result_.layer);
    if (tokens == 0) {
      reject(fmt::format("{}: x of layer {}", file.path().string(), result_.layer), "at least one token",
             "none");
    }
    for (int64_t first = 0, count = 0; first < tokens; first += count) {
      request_.progress(
          fmt::format("layer {}: {}, token {} of {}", result_.layer, file.path().string(), first, tokens));
      count = std::min(tokens - first, piece_tokens());
      LayerInputs inputs = file.read(result_.layer, config_.hidden, first, count);
      route_inputs({.checkpoint = checkpoint_,
                    .layer = result_.layer,
                    .experts = experts_,
                    .rules = rules_,
                    .router_given = request_.overrides.router.has_value(),
                    .may_be_random = false},
                   inputs);
      use_layer_for(inputs.top_k);
      const auto& shared = experts_.weights.shared;
      amax_.add(trace(*moe_layer_, inputs, shared ? &*shared : nullptr, backend_->memory()));
      result_.tokens += count;
    }
  }

  /// Adds what was seen to `amax`.
  LayerCalibration finish(InputAmax& amax) {
    result_.experts = amax_.experts();
    result_.shared = amax_.shared();
    require_finite();
    const BlockNames block = find_block(checkpoint_, result_.layer).names;
    const ExpertAmax layer_wide = largest();
    for (size_t expert = 0; expert < result_.experts.size(); ++expert) {
      const ExpertAmax& seen = result_.experts[expert];
      if (seen.rows == 0) {
        result_.unreached.push_back(static_cast<int64_t>(expert));
      } else if (seen.x == 0.0f || seen.intermediate == 0.0f) {
        result_.zero.push_back(static_cast<int64_t>(expert));
      }
      add(experts_.weights.experts[expert], block, seen, layer_wide, amax);
    }
    // One in another format than the routed ones has bf16 activations, and is not converted.
    if (result_.shared && shared_is_stored_as_routed(experts_.weights))
      add(experts_.weights.shared->expert, block, *result_.shared, *result_.shared, amax);
    return std::move(result_);
  }

 private:
  /// Tokens that go through the layer at a time: x and all stages, and as much again for a workspace.
  int64_t piece_tokens() const {
    // Where the config does not tell, a file may route to every expert.
    const int64_t top_k = config_.top_k > 0 ? config_.top_k : experts_.weights.count();
    const int64_t routed = top_k * (2 * config_.hidden + config_.h_columns() + 2 * config_.intermediate);
    const int64_t shared = 2 * config_.hidden + 4 * config_.shared_intermediate;
    const auto bytes = 2 * 2 * static_cast<int64_t>(sizeof(Bf16)) * (routed + shared + 2 * config_.hidden);
    return std::max<int64_t>(1, kPieceBytes / bytes);
  }

  /// Files may bring routings of different top-k; the layer is made for one.
  void use_layer_for(int64_t top_k) {
    if (moe_layer_ && config_.top_k == top_k) return;
    config_.top_k = top_k;
    const BackendChoice choice = choose_backend(request_.backend, experts_.weights, config_, options_);
    backend_ = choice.backend;
    moe_layer_ = backend_->make_layer(experts_.weights, config_, options_);
    result_.backend = fmt::format("{} ({}); kernel: {}", backend_->name(), choice.reason,
                                  moe_layer_->plan(piece_tokens()).kernel);
  }

  /// x was checked when it was read, and products with routing weights and weights may still overflow.
  void require_finite() const {
    const auto require = [&](const std::string& name, const ExpertAmax& seen) {
      for (const auto& [what, value] :
           {std::pair("x", seen.x), std::pair("intermediate", seen.intermediate)}) {
        if (std::isfinite(value)) continue;
        fail(ErrorCode::kBadFile,
             "{}: {}: expected a finite {}, found {} among {} rows; fourfold inspect {} tells whether its "
             "weights are damaged",
             checkpoint_.path().string(), name, what, value, seen.rows, checkpoint_.path().string());
      }
    };
    for (size_t expert = 0; expert < result_.experts.size(); ++expert) {
      require(experts_.weights.experts[expert].name, result_.experts[expert]);
    }
    if (result_.shared) require(experts_.weights.shared->expert.name, *result_.shared);
  }

  ExpertAmax largest() const {
    ExpertAmax all;
    for (const ExpertAmax& seen : result_.experts) {
      all.rows += seen.rows;
      all.x = std::max(all.x, seen.x);
      all.intermediate = std::max(all.intermediate, seen.intermediate);
    }
    return all;
  }

  void add(const Expert& expert, const BlockNames& block, const ExpertAmax& seen, const ExpertAmax& fallback,
           InputAmax& amax) const {
    const ExpertLinears names = names_of(expert, block);
    const auto add_one = [&](const std::string& name, float own, float other) {
      const float value = own > 0.0f || request_.unreached != UnreachedPolicy::kMax ? own : other;
      if (value > 0.0f) amax[name] = value;
    };
    if (expert.has_gate()) add_one(names.gate, seen.x, fallback.x);
    add_one(names.up, seen.x, fallback.x);
    add_one(names.down, seen.intermediate, fallback.intermediate);
  }

  const Checkpoint& checkpoint_;
  const CalibrateRequest& request_;
  ExpertLayer experts_;
  LayerRules rules_;
  LayerConfig config_;
  LayerOptions options_;
  LayerAmax amax_;
  const Backend* backend_ = nullptr;
  std::unique_ptr<MoeLayer> moe_layer_;
  LayerCalibration result_;
};

/// Which layers of `checkpoint` are calibrated, on which files.
class Plan {
 public:
  Plan(const Checkpoint& checkpoint, const CalibrateRequest& request) : request_(request) {
    for (const auto& path : request.inputs) files_.emplace_back(path);
    const std::vector<int64_t> there = layers_with_experts(checkpoint);
    layers_ = request.layers.empty() ? layers_of_files(there) : request.layers;
    require_layer_names();
    for (const int64_t layer : layers_) {
      find_block(checkpoint, layer);  // names those that there are
      if (files_of(layer).empty()) {
        reject(fmt::format("--input for layer {}", layer),
               fmt::format("'layers.{}.x' in one of the files", layer), "none");
      }
    }
    std::vector<int64_t> left;
    std::set_difference(there.begin(), there.end(), layers_.begin(), layers_.end(), std::back_inserter(left));
    if (!left.empty())
      notes_.push_back(fmt::format("layers without input, or not asked for: {}", format_list(left)));
  }

  const std::vector<int64_t>& layers() const { return layers_; }
  std::vector<std::string>& notes() { return notes_; }

  std::vector<const InputFile*> files_of(int64_t layer) const {
    std::vector<const InputFile*> files;
    for (const InputFile& file : files_) {
      if (file.layers().empty() || file.layers().contains(layer)) files.push_back(&file);
    }
    return files;
  }

 private:
  /// `x` alone is of a single layer: there must be no doubt which.
  void require_layer_names() const {
    for (const InputFile& file : files_) {
      if (!file.layers().empty() || layers_.size() == 1) continue;
      reject(file.path().string(),
             fmt::format("'layers.L.x' for {} layers with experts, or --layers with the one that it is of",
                         layers_.size()),
             "'x'");
    }
  }

  /// `there`: the model's layers with experts. Inputs of others, which are dense, are passed over.
  std::vector<int64_t> layers_of_files(const std::vector<int64_t>& there) {
    std::set<int64_t> named;
    for (const InputFile& file : files_) {
      named.insert(file.layers().begin(), file.layers().end());
    }
    if (named.empty()) return there;
    std::vector<int64_t> both, dense;
    std::set_intersection(named.begin(), named.end(), there.begin(), there.end(), std::back_inserter(both));
    std::set_difference(named.begin(), named.end(), there.begin(), there.end(), std::back_inserter(dense));
    if (!dense.empty())
      notes_.push_back(
          fmt::format("inputs of layers {} were passed over: no experts there", format_list(dense)));
    if (both.empty()) {
      reject("--input", fmt::format("inputs of a layer with experts ({})", format_list(there)),
             format_list({named.begin(), named.end()}));
    }
    return both;
  }

  const CalibrateRequest& request_;
  std::vector<InputFile> files_;
  std::vector<int64_t> layers_;
  std::vector<std::string> notes_;
};

/// Throws Error naming the experts without a scale.
void require_all_reached(const std::vector<LayerCalibration>& layers) {
  constexpr size_t kMostNamed = 1000;  // characters
  std::string text;
  int64_t missing = 0, total = 0;
  for (const LayerCalibration& layer : layers) {
    std::vector<int64_t> bad = layer.unreached;
    bad.insert(bad.end(), layer.zero.begin(), layer.zero.end());
    std::sort(bad.begin(), bad.end());
    missing += static_cast<int64_t>(bad.size());
    total += static_cast<int64_t>(layer.experts.size());
    if (bad.empty() || text.size() > kMostNamed) continue;
    text += fmt::format("{}layer {}: {}", text.empty() ? "" : "; ", layer.layer, format_list(bad));
  }
  if (missing == 0) return;
  if (text.size() > kMostNamed) text = text.substr(0, kMostNamed) + " ...";
  reject("--unreached error", fmt::format("tokens for all {} experts", total),
         fmt::format("none, or nothing but zeros, for {} of them ({}); give more --input, or --unreached max "
                     "or skip",
                     missing, text));
}

}  // namespace

CalibrateResult calibrate(const std::shared_ptr<const Checkpoint>& checkpoint,
                          const CalibrateRequest& request) {
  Plan plan(*checkpoint, request);
  CalibrateResult result;
  result.notes = std::move(plan.notes());
  for (const int64_t layer : plan.layers()) {
    LayerRun run(checkpoint, request, layer);
    for (const InputFile* file : plan.files_of(layer)) run.run(*file);
    result.layers.push_back(run.finish(result.amax));
    checkpoint->drop_pages();
  }
  checkpoint->require_intact();
  if (request.unreached == UnreachedPolicy::kError) require_all_reached(result.layers);
  if (result.amax.empty()) reject("--input", "activations that are not all zero", "zeros alone");
  return result;
}

int64_t write_input_scales(const std::filesystem::path& path, const Checkpoint& checkpoint,
                           const CalibrateResult& result) {
  InputAmax by_tensor;
  for (const LayerCalibration& layer : result.layers) {
    const LayerSurvey survey = survey_layer(checkpoint, layer.layer, {});
    const std::string experts = survey.block.prefix + std::string(kExperts);
    const bool fused = stays_fused(checkpoint, survey);
    for (auto it = result.amax.lower_bound(survey.block.prefix);
         it != result.amax.end() && it->first.starts_with(survey.block.prefix); ++it) {
      std::string tensor = it->first + ".input_scale";
      if (fused && it->first.starts_with(experts)) {
        const bool is_down = it->first.ends_with(survey.block.names.down);
        tensor = experts + (is_down ? "down_proj_input_scale" : "gate_up_proj_input_scale");
      }
      by_tensor[tensor] = std::max(by_tensor[tensor], it->second);
    }
  }
  std::vector<float> scales;
  for (const auto& [tensor, amax] : by_tensor) scales.push_back(nvfp4_global_scale(amax));
  std::vector<TensorData> tensors;
  for (const auto& [tensor, amax] : by_tensor) {
    tensors.push_back({{tensor, DType::kF32, {}}, std::as_bytes(std::span(&scales[tensors.size()], 1))});
  }
  write_safetensors(path, tensors);
  return static_cast<int64_t>(tensors.size());
}

}  // namespace fourfold
