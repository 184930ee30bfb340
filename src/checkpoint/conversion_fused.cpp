// Experts that share a tensor: interleaved, with biases, or transposed. They stay in one.
#include "base/fail.h"
#include "base/mapped_file.h"
#include "checkpoint/conversion_planner.h"
#include "fourfold/model_family.h"

namespace fourfold {

void ConversionPlanner::plan_fused(const LayerSurvey& survey) {
  const std::string prefix = survey.block.prefix + std::string(kExperts);
  const bool is_interleaved = fused_gate_up_order(source_.config()) == GateUpOrder::kInterleaved;
  const bool has_blocks = source_.find(prefix + "gate_up_proj_blocks") != nullptr;
  if (target_scheme() == WeightScheme::kCompressedTensors && request_.to != TargetFormat::kBf16) {
    fail(ErrorCode::kUnsupported,
         "{}: --scheme compressed-tensors: expected experts with tensors of their own, found "
         "'{}gate_up_proj', "
         "for which that scheme has no layout; use --scheme modelopt",
         source_.path().string(), prefix);
  }
  if (!survey.is_transposed && !has_blocks) {
    fail(ErrorCode::kUnsupported,
         "{}: expected '{}gate_up_proj' transposed, as interleaved experts or those with biases are stored, "
         "found it [experts, out, in]",
         source_.path().string(), prefix);
  }
  if (request_.to == TargetFormat::kMxfp4 && !is_interleaved) {
    fail(ErrorCode::kUnsupported,
         "{}: --to mxfp4: expected the layout of gpt-oss, found '{}gate_up_proj' of {}",
         source_.path().string(), prefix, identity(source_.config()));
  }
  for (const bool is_down : {false, true}) {
    plan_fused_matrix(prefix + (is_down ? "down_proj" : "gate_up_proj"), survey);
  }
}

void ConversionPlanner::plan_fused_matrix(const std::string& name, const LayerSurvey& survey) {
  const auto reader = std::make_shared<const FusedReader>(source_, name);
  const bool transposed = survey.is_transposed;
  const auto [rows, cols] = *reader->shape(transposed);
  LayerConversion& layer = result_->layers.back();
  layer.from = reader->scheme() + " (fused)";
  layer.matrices += reader->experts();
  if (reader->scheme() == to_string(request_.to)) {
    layer.unchanged += reader->experts();
    for (const auto& slice : fused_sources(reader, name, survey)) require_sound_fused(slice);
    plan_fused_input_scale(name, *reader);
    return;
  }
  const int block = block_of(request_.to);
  if (block != 0 && cols % block != 0) {
    fail(ErrorCode::kUnsupported, "{}: --to {}: expected rows of whole blocks of {}, found {} columns", name,
         to_string(request_.to), block, cols);
  }
  is_changed_ = true;
  for (const std::string& tensor : reader->tensor_names()) {
    if (!tensor.ends_with("_bias")) replaced_.insert(tensor);
  }
  const ExpertLayout layout =
      request_.to == TargetFormat::kMxfp4 ? ExpertLayout::kFusedBlocks : ExpertLayout::kFusedTransposed;
  auto& tensors = new_tensors_[&reader->tensor()];
  for (TensorSpec& spec : fused_specs(name, request_.to, layout, reader->experts(), rows, cols)) {
    tensors.push_back({std::move(spec), nullptr});
  }
  const std::vector<FusedSource> sources = fused_sources(reader, name, survey);
  const Recoding recoding = fused_recoding(sources, name);
  if (request_.to == TargetFormat::kNvfp4) {
    tensors.push_back(scalar(name + "_weight_scale_2", {}, recoding.global));
    plan_fused_input_scale(name, *reader);
  }
  for (const FusedSource& source : sources) {
    result_->plan.tasks.push_back(fused_task(source, name, layout, recoding));
  }
}

std::vector<FusedSource> ConversionPlanner::fused_sources(const std::shared_ptr<const FusedReader>& reader,
                                                          const std::string& name,
                                                          const LayerSurvey& survey) const {
  const auto [rows, cols] = *reader->shape(survey.is_transposed);
  std::vector<FusedSource> sources;
  for (int64_t expert = 0; expert < reader->experts(); ++expert) {
    FusedSource source{reader, survey.is_transposed, expert, rows, cols, {}};
    for (const char* suffix : {"", "_blocks", "_scales", "_weight_scale"}) {
      const Tensor* tensor = source_.find(name + suffix);
      if (tensor == nullptr) continue;
      const int64_t bytes = tensor->bytes / reader->experts();
      source.reads.emplace_back(tensor->data + expert * bytes, static_cast<size_t>(bytes));
    }
    sources.push_back(std::move(source));
  }
  return sources;
}

void ConversionPlanner::require_sound_fused(const FusedSource& source) {
  RepackedBytes repacked;
  require_sound_scales(source.reader->matrix(source.expert, source.is_transposed, repacked),
                       source.reader->tensor().name);
}

Recoding ConversionPlanner::fused_recoding(const std::vector<FusedSource>& sources, const std::string& name) {
  Recoding recoding{request_.to, request_.scale, 1.0f, kNoExponent, name};
  const bool casts = sources.front().reader->scheme() == "mxfp4";
  quantizes_ |= !casts;
  std::vector<float> amax(sources.size(), 0.0f);
  std::vector<int> kmax(sources.size(), kNoExponent);
  const auto open = [&](size_t index, RepackedBytes& repacked) {
    return sources[index].reader->matrix(sources[index].expert, sources[index].is_transposed, repacked);
  };
  const int64_t repacked_bytes =
      sources.front().is_transposed ? 2 * sources.front().rows * sources.front().cols : 0;
  for_each_index(sources.size(), repacked_bytes, [&](size_t index) {
    RepackedBytes repacked;
    const WeightView view = open(index, repacked);
    require_sound_scales(view, name);
    if (request_.to != TargetFormat::kNvfp4) return;
    casts ? static_cast<void>(kmax[index] = largest_mxfp4_exponent(std::get<BlockScaledView>(view)))
          : static_cast<void>(amax[index] = finite_absolute_maximum(view, name));
    for (const auto& part : sources[index].reads) release_mapped(part);
  });
  if (request_.to != TargetFormat::kNvfp4) return recoding;
  recoding.kmax = *std::max_element(kmax.begin(), kmax.end());
  recoding.global = casts ? cast_global_scale(recoding.kmax)
                          : nvfp4_global_scale(*std::max_element(amax.begin(), amax.end()));
  for (size_t index = 0; casts && index < sources.size(); ++index) {
    RepackedBytes repacked;
    const WeightView view = open(index, repacked);
    count_cast_of(result_->layers.size() - 1, name,
                  count_cast(std::get<BlockScaledView>(view), recoding.kmax));
  }
  return recoding;
}

void ConversionPlanner::plan_fused_input_scale(const std::string& name, const FusedReader& reader) {
  const std::string scale = name + "_input_scale";
  const Tensor* own = source_.find(scale);
  if (request_.to != TargetFormat::kNvfp4) return;
  if (request_.dynamic_inputs || input_scales_) replaced_.insert(scale);
  is_changed_ |= own != nullptr && (request_.dynamic_inputs || input_scales_);
  if (!input_scales_) return;
  is_changed_ = true;
  new_tensors_[&reader.tensor()].push_back(scalar(scale, {}, input_scale_from_file(scale)));
}

}  // namespace fourfold
