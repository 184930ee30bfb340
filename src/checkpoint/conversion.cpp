#include "checkpoint/conversion.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "base/fail.h"
#include "base/mapped_file.h"
#include "checkpoint/conversion_planner.h"
#include "checkpoint/moe_names.h"

namespace fourfold {
namespace {

/// Of scales, what the system is asked to read ahead while layers are planned.
constexpr int64_t kScalesAheadBytes = int64_t{256} << 20;

std::span<const std::byte> bytes_at(const void* data, int64_t rows, int64_t stride, int64_t width) {
  return {static_cast<const std::byte*>(data), static_cast<size_t>((rows - 1) * stride + width)};
}

/// The bytes of the mapped file behind a view.
std::vector<std::span<const std::byte>> bytes_of(const WeightView& view) {
  if (const auto* dense = std::get_if<DenseView>(&view)) {
    const int64_t width = dense->type == ElementType::kF32 ? 4 * dense->cols : 2 * dense->cols;
    return {bytes_at(dense->data, dense->rows, dense->row_stride_bytes, width)};
  }
  if (const auto* fp8 = std::get_if<Fp8View>(&view)) {
    return {bytes_at(fp8->codes.data, fp8->rows, fp8->codes.stride, fp8->cols)};
  }
  const auto& blocks = std::get<BlockScaledView>(view);
  return {bytes_at(blocks.codes.data, blocks.rows, blocks.codes.stride, blocks.cols / 2),
          bytes_at(blocks.scales, blocks.rows, blocks.scale_stride, blocks.blocks_per_row())};
}

bool is_in(const WeightView& view, TargetFormat format) {
  if (format == TargetFormat::kBf16) {
    const auto* dense = std::get_if<DenseView>(&view);
    return dense != nullptr && dense->type == ElementType::kBf16;
  }
  return is_stored_as(view, format == TargetFormat::kNvfp4 ? QuantFormat::kNvfp4 : QuantFormat::kMxfp4);
}

}  // namespace

void require_sound_scales(const WeightView& view, const std::string& name) {
  const auto* blocks = std::get_if<BlockScaledView>(&view);
  if (blocks == nullptr || blocks->format != QuantFormat::kNvfp4) return;
  for (int64_t row = 0; row < blocks->rows; ++row) {
    for (int64_t block = 0; block < blocks->blocks_per_row(); ++block) {
      if (blocks->scale_code(row, block) < kE4m3NanCode) continue;
      fail(ErrorCode::kBadFile,
           "{}: block scale at row {}, block {}: expected a finite one from 0, found {:#04x}; fourfold "
           "inspect "
           "tells more",
           name, row, block, blocks->scale_code(row, block));
    }
  }
}

ConversionPlanner::ConversionPlanner(std::shared_ptr<const Checkpoint> source,
                                     const ConversionRequest& request)
    : source_(*source), request_(request), result_(std::make_unique<Conversion>()) {
  result_->source = std::move(source);
}

std::unique_ptr<Conversion> ConversionPlanner::run() {
  std::error_code error;
  if (!std::filesystem::is_directory(source_.path(), error)) {
    fail(ErrorCode::kInvalidArgument, "{}: expected a model directory, found a file",
         source_.path().string());
  }
  is_deepseek_v4_ = source_.config().model_type == "deepseek_v4";
  open_input_scales();
  plan_layers(selected_layers());
  if (request_.layers.empty()) plan_other_linears();
  require_something_to_do();
  require_all_input_scales_used();
  place_tensors();
  write_configs();
  return std::move(result_);
}

std::vector<int64_t> ConversionPlanner::selected_layers() const {
  const std::vector<int64_t> all = layers_with_experts(source_);
  if (all.empty()) {
    fail(ErrorCode::kNotFound, "{}: expected layers with experts, found none", source_.path().string());
  }
  for (const int64_t layer : request_.layers) {
    if (std::binary_search(all.begin(), all.end(), layer)) continue;
    fail(ErrorCode::kInvalidArgument, "{}: --layers: expected layers with experts, {}, found {}",
         source_.path().string(), fmt::join(all, ", "), layer);
  }
  return request_.layers.empty() ? all : request_.layers;
}

void ConversionPlanner::open_input_scales() {
  if (request_.input_scales.empty()) return;
  if (request_.to != TargetFormat::kNvfp4) {
    fail(ErrorCode::kInvalidArgument, "--input-scale: expected --to nvfp4, which has input scales, found {}",
         to_string(request_.to));
  }
  input_scales_ = SafetensorsFile::open(request_.input_scales);
}

WeightScheme ConversionPlanner::target_scheme() {
  if (!scheme_) {
    // By the whole model: its first layers may be plain.
    const bool is_compressed =
        std::any_of(source_.tensors().begin(), source_.tensors().end(),
                    [](const auto& entry) { return entry.first.ends_with(".weight_packed"); });
    scheme_ =
        request_.scheme.value_or(is_compressed ? WeightScheme::kCompressedTensors : WeightScheme::kModelOpt);
    names_ = linear_names(request_.to, *scheme_, is_deepseek_v4_);
  }
  return *scheme_;
}

void ConversionPlanner::plan_layers(const std::vector<int64_t>& layers) {
  size_t fetched = 0;
  int64_t bytes_ahead = 0;
  std::vector<int64_t> bytes_of_layer(layers.size());
  for (size_t index = 0; index < layers.size(); ++index) {
    for (; fetched < layers.size() && bytes_ahead < kScalesAheadBytes; ++fetched) {
      bytes_of_layer[fetched] = for_each_scale_tensor(layers[fetched], prefetch_mapped);
      bytes_ahead += bytes_of_layer[fetched];
    }
    plan_layer(layers[index]);
    bytes_ahead -= bytes_of_layer[index];
    for_each_scale_tensor(layers[index], release_mapped);
  }
}

int64_t ConversionPlanner::for_each_scale_tensor(int64_t layer,
                                                 void (*advise)(std::span<const std::byte>)) const {
  int64_t bytes = 0;
  for (const Tensor* tensor :
       tensors_under(source_, find_block(source_, layer).prefix + std::string(kExperts))) {
    if (!tensor->name.ends_with("scale") && !tensor->name.ends_with("scales")) continue;
    advise({tensor->data, static_cast<size_t>(tensor->bytes)});
    bytes += tensor->bytes;
  }
  return bytes;
}

void ConversionPlanner::plan_layer(int64_t layer) {
  request_.progress(fmt::format("looking at layer {}", layer));
  const LayerSurvey survey = survey_layer(source_, layer, {});
  require_clean(survey);
  prefixes_.push_back(survey.block.prefix + std::string(kExperts));
  result_->layers.push_back({layer, "", 0, 0, std::nullopt});
  if (stays_fused(source_, survey)) return plan_fused(survey);
  ExpertLayer experts = load_experts(result_->source, layer);
  result_->layers.back().from = experts.scheme;
  static_cast<void>(target_scheme());
  for (const Expert& expert : experts.weights.experts) plan_expert(expert, survey);
  // A shared expert goes with the routed ones where it is stored as they are; else it is carried over.
  if (experts.weights.shared && shared_is_stored_as_routed(experts.weights)) {
    plan_expert(experts.weights.shared->expert, survey);
  }
  loaded_.push_back(std::move(experts));
  finish_jobs();
  first_job_ = jobs_.size();
}

void ConversionPlanner::require_clean(const LayerSurvey& survey) {
  if (survey.findings.empty()) return;
  const Finding& first = survey.findings.front();
  fail(ErrorCode::kBadFile,
       "layer {}: {}: '{}': {}{}; nothing is converted, fourfold inspect tells all of it", survey.layer,
       to_string(first.kind), first.tensor, first.found,
       survey.findings.size() > 1 ? fmt::format("; and {} more", survey.findings.size() - 1) : "");
}

void ConversionPlanner::plan_expert(const Expert& expert, const LayerSurvey& survey) {
  const BlockNames& names = survey.block.names;
  if (expert.has_gate()) {
    plan_matrix(expert, expert.gate, names.gate, expert.gate_input_scale, survey);
    jobs_.back().joins_next = request_.tie_gate_up;
  }
  plan_matrix(expert, expert.up, names.up, expert.up_input_scale, survey);
  plan_matrix(expert, expert.down, names.down, expert.down_input_scale, survey);
}

void ConversionPlanner::plan_matrix(const Expert& expert, const WeightView& view, std::string_view linear,
                                    std::optional<float> input_scale, const LayerSurvey& survey) {
  Job job;
  job.name = fmt::format("{}.{}", expert.name, linear);
  job.view = view;
  find_anchor(job, linear == survey.block.names.down, survey);
  plan_job(std::move(job), input_scale);
}

void ConversionPlanner::plan_job(Job job, std::optional<float> input_scale) {
  job.layer = result_->layers.size() - 1;
  job.keeps = is_in(job.view, request_.to);
  const int block = block_of(request_.to);
  if (block != 0 && cols_of(job.view) % block != 0) {
    fail(ErrorCode::kUnsupported, "{}: --to {}: expected rows of whole blocks of {}, found {} columns",
         job.name, to_string(request_.to), block, cols_of(job.view));
  }
  LayerConversion& layer = result_->layers.back();
  ++layer.matrices;
  layer.unchanged += job.keeps;
  if (request_.to == TargetFormat::kNvfp4) plan_input_scale(job, input_scale);
  jobs_.push_back(std::move(job));
}

void ConversionPlanner::find_anchor(Job& job, bool is_down, const LayerSurvey& survey) {
  const std::string fused =
      survey.block.prefix + std::string(kExperts) + (is_down ? "down_proj" : "gate_up_proj");
  if (survey.is_fused && job.name.starts_with(survey.block.prefix + std::string(kExperts))) {
    const FusedReader reader(source_, fused);
    job.anchor = &reader.tensor();
    for (const std::string& name : reader.tensor_names()) replaced_.insert(name);
    return;
  }
  replace_linear(job);
}

void ConversionPlanner::replace_linear(Job& job) {
  for (const Tensor* tensor : tensors_under(source_, job.name + ".")) {
    if (!tensor->name.ends_with(".bias")) replaced_.insert(tensor->name);
    if (tensor->name.ends_with(".weight") || tensor->name.ends_with(".weight_packed")) job.anchor = tensor;
  }
}

PlannedTensor ConversionPlanner::scalar(const std::string& name, const std::vector<int64_t>& shape,
                                        float value) {
  result_->scalars.push_back(value);
  return {{name, DType::kF32, shape}, reinterpret_cast<const std::byte*>(&result_->scalars.back())};
}

float ConversionPlanner::inverse(float value, const std::string& name) {
  const float inverted = 1.0f / value;
  if (std::isfinite(inverted) && inverted > 0.0f && std::isfinite(value)) return inverted;
  fail(ErrorCode::kBadFile,
       "'{}': expected a positive finite number, whose reciprocal the other scheme stores, found {}; for an "
       "input scale, --input-scale dynamic leaves it out",
       name, value);
}

float ConversionPlanner::input_scale_from_file(const std::string& name) {
  const Tensor& tensor = input_scales_->at(name);
  if (tensor.dtype != DType::kF32 || tensor.elements() != 1) bad_tensor(tensor, "one F32 number");
  float value = 0.0f;
  std::memcpy(&value, tensor.data, sizeof(value));
  if (!is_usable_input_scale(value)) {
    fail(ErrorCode::kBadFile, "{}: tensor '{}': expected a positive finite scale (amax / 2688), found {}",
         tensor.file, name, value);
  }
  used_scales_.insert(name);
  return value;
}

void ConversionPlanner::plan_input_scale(const Job& job, std::optional<float> own) {
  if (request_.dynamic_inputs) return;
  const std::string name = job.name + std::string(names_.input_scale);
  const bool is_elsewhere = result_->layers[job.layer].layer == LayerConversion::kElsewhere;
  if (input_scales_ && (!is_elsewhere || input_scales_->find(job.name + ".input_scale") != nullptr)) {
    const float value = input_scale_from_file(job.name + ".input_scale");
    add(job, scalar(name, names_.scalar, names_.divides ? inverse(value, name) : value));
    return;
  }
  if (!own || !is_stored_as(job.view, QuantFormat::kNvfp4)) return;  // FP8's scales are of another range
  if (const Tensor* same = source_.find(name)) {
    add(job, {{name, DType::kF32, same->shape}, same->data});
  } else {
    add(job, scalar(name, names_.scalar, names_.divides ? inverse(*own, name) : *own));
  }
}

void ConversionPlanner::add(const Job& job, PlannedTensor tensor) {
  new_tensors_[job.anchor].push_back(std::move(tensor));
}

void ConversionPlanner::finish_jobs() {
  for_each_index(jobs_.size() - first_job_, 0, [&](size_t index) {
    Job& job = jobs_[first_job_ + index];
    require_sound_scales(job.view, job.name);
    if (!job.keeps && is_cast(job.view, request_.to)) {
      job.kmax = largest_mxfp4_exponent(std::get<BlockScaledView>(job.view));
    }
  });
  for (size_t index = first_job_; index < jobs_.size(); ++index) {
    const bool joins = require_joinable(index);
    if (joins) jobs_[index].kmax = jobs_[index + 1].kmax = std::max(jobs_[index].kmax, jobs_[index + 1].kmax);
    place_job(jobs_[index]);
    if (jobs_[index].keeps) continue;
    std::vector<SourceMatrix> matrices = {source_matrix(jobs_[index])};
    if (joins) {
      place_job(jobs_[index + 1]);
      matrices.push_back(source_matrix(jobs_[++index]));
    }
    if (names_.divides && is_cast(jobs_[index].view, request_.to)) {
      // What the task will store has to be a number.
      static_cast<void>(inverse(cast_global_scale(jobs_[index].kmax), jobs_[index].name));
    }
    result_->plan.tasks.push_back(
        separate_task(std::move(matrices), request_.to, names_, request_.scale, jobs_[index].kmax));
  }
  count_casts();
}

SourceMatrix ConversionPlanner::source_matrix(const Job& job) {
  return {job.name, job.view, bytes_of(job.view)};
}

bool ConversionPlanner::require_joinable(size_t index) const {
  if (!jobs_[index].joins_next || request_.to != TargetFormat::kNvfp4) return false;
  const Job &gate = jobs_[index], &up = jobs_[index + 1];
  if (!gate.keeps && !up.keeps && is_cast(gate.view, request_.to) == is_cast(up.view, request_.to))
    return true;
  fail(ErrorCode::kUnsupported,
       "{}: --tie-gate-up: expected weights that are yet to be quantized, found {} and {}; codes of NVFP4 "
       "are never rounded again",
       gate.name, format_name(gate.view), format_name(up.view));
}

void ConversionPlanner::place_job(const Job& job) {
  std::vector<TensorSpec> specs =
      matrix_specs(job.name, request_.to, names_, rows_of(job.view), cols_of(job.view));
  if (!job.keeps) {
    is_changed_ = true;
    quantizes_ |= !is_cast(job.view, request_.to);
    for (TensorSpec& spec : specs) add(job, {std::move(spec), nullptr});
    if (!names_.global.empty()) {
      add(job, {{job.name + std::string(names_.global), DType::kF32, names_.scalar}, nullptr});
    }
    return;
  }
  const auto parts = bytes_of(job.view);
  for (size_t part = 0; part < specs.size(); ++part) {
    if (static_cast<int64_t>(parts[part].size()) != specs[part].bytes()) {
      fail(ErrorCode::kUnsupported, "{}: expected rows side by side, found them apart", job.name);
    }
    const Tensor* same = source_.find(specs[part].name);
    is_changed_ |= same == nullptr;
    add(job, {specs[part], parts[part].data()});
  }
  if (names_.global.empty()) return;
  const GlobalScale global = std::get<BlockScaledView>(job.view).global;
  const bool is_divisor = global.kind == GlobalScaleKind::kDivisor;
  const std::string name = job.name + std::string(names_.global);
  const Tensor* same = is_divisor == names_.divides ? source_.find(name) : nullptr;
  add(job, same != nullptr
               ? PlannedTensor{{name, DType::kF32, same->shape}, same->data}
               : scalar(name, names_.scalar,
                        is_divisor == names_.divides ? global.value : inverse(global.value, name)));
}

void ConversionPlanner::count_casts() {
  std::vector<CastReport> counts(jobs_.size() - first_job_);
  for_each_index(counts.size(), 0, [&](size_t index) {
    const Job& job = jobs_[first_job_ + index];
    if (job.keeps || !is_cast(job.view, request_.to)) return;
    counts[index] = count_cast(std::get<BlockScaledView>(job.view), job.kmax);
  });
  for (size_t index = 0; index < counts.size(); ++index) {
    const Job& job = jobs_[first_job_ + index];
    if (counts[index].blocks > 0) count_cast_of(job.layer, job.name, counts[index]);
  }
}

void ConversionPlanner::count_cast_of(size_t layer, const std::string& name, const CastReport& counts) {
  auto& total = result_->layers[layer].cast;
  if (!total) total.emplace();
  *total += counts;
  if (counts.inexact == 0 || request_.allow_inexact) return;
  fail(ErrorCode::kUnsupported,
       "{}: expected an exact cast to NVFP4, found {} of {} blocks whose values would be rounded: their "
       "scales "
       "are more than 2^17 below the largest; --allow-inexact rounds them",
       name, counts.inexact, counts.blocks);
}

std::unique_ptr<Conversion> plan_conversion(std::shared_ptr<const Checkpoint> source,
                                            const ConversionRequest& request) {
  return ConversionPlanner(std::move(source), request).run();
}

}  // namespace fourfold
