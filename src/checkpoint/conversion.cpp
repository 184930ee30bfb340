#include "checkpoint/conversion.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "base/fail.h"
#include "checkpoint/conversion_config.h"
#include "checkpoint/conversion_names.h"
#include "checkpoint/conversion_tasks.h"
#include "checkpoint/layer_survey.h"
#include "checkpoint/linear_reader.h"
#include "checkpoint/moe_names.h"
#include "fourfold/model_family.h"

namespace fourfold {
namespace {

/// One matrix of an expert that is stored on its own in the model to be.
struct Job {
  std::string name;  ///< of the linear
  WeightView view;
  const Tensor* anchor = nullptr;  ///< source tensor in whose place the new ones go
  size_t layer = 0;                ///< index of its LayerConversion
  int kmax = kNoExponent;          ///< where it is cast
  bool joins_next = false;         ///< shares its global scale with the job after it
  bool keeps = false;              ///< codes and scales stay
};

/// Runs `work` for 0 to count - 1 on all cores; the first exception comes out.
template <class Work>
void for_each_index(size_t count, const Work& work) {
  std::atomic<bool> failed = false;
  std::exception_ptr error;
  std::mutex mutex;
#pragma omp parallel for schedule(dynamic, 1)
  for (size_t index = 0; index < count; ++index) {
    if (failed) continue;
    try {
      work(index);
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

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

/// NaN and negative block scales: what inspect objects to.
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

class ConversionPlanner {
 public:
  ConversionPlanner(std::shared_ptr<const Checkpoint> source, const ConversionRequest& request)
      : source_(*source), request_(request), result_(std::make_unique<Conversion>()) {
    result_->source = std::move(source);
  }

  std::unique_ptr<Conversion> run() {
    std::error_code error;
    if (!std::filesystem::is_directory(source_.path(), error)) {
      fail(ErrorCode::kInvalidArgument, "{}: expected a model directory, found a file",
           source_.path().string());
    }
    is_deepseek_v4_ = source_.config().model_type == "deepseek_v4";
    open_input_scales();
    for (const int64_t layer : selected_layers()) plan_layer(layer);
    finish_jobs();
    require_something_to_do();
    require_all_input_scales_used();
    place_tensors();
    write_configs();
    return std::move(result_);
  }

 private:
  // ---- what is asked ----

  std::vector<int64_t> selected_layers() const {
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

  void open_input_scales() {
    if (request_.input_scales.empty()) return;
    if (request_.to != TargetFormat::kNvfp4) {
      fail(ErrorCode::kInvalidArgument,
           "--input-scale: expected --to nvfp4, which has input scales, found {}", to_string(request_.to));
    }
    input_scales_ = SafetensorsFile::open(request_.input_scales);
  }

  /// The source's own scheme where nobody asks for one.
  WeightScheme scheme_for(const std::string& layer_scheme) {
    if (!scheme_) {
      const bool is_compressed = layer_scheme.find("compressed-tensors") != std::string::npos;
      scheme_ = request_.scheme.value_or(is_compressed ? WeightScheme::kCompressedTensors
                                                       : WeightScheme::kModelOpt);
      names_ = linear_names(request_.to, *scheme_, is_deepseek_v4_);
    }
    return *scheme_;
  }

  // ---- layers ----

  void plan_layer(int64_t layer) {
    request_.progress(fmt::format("looking at layer {}", layer));
    const LayerSurvey survey = survey_layer(source_, layer, {});
    require_clean(survey);
    prefixes_.push_back(survey.block.prefix + std::string(kExperts));
    result_->layers.push_back({layer, "", 0, 0, std::nullopt});
    if (stays_fused(source_, survey)) return plan_fused(survey);
    ExpertLayer experts = load_experts(result_->source, layer);
    result_->layers.back().from = experts.scheme;
    scheme_for(experts.scheme);
    for (const Expert& expert : experts.weights.experts) plan_expert(expert, survey);
    if (experts.weights.shared) plan_shared(experts.weights, survey);
    loaded_.push_back(std::move(experts));
  }

  static void require_clean(const LayerSurvey& survey) {
    if (survey.findings.empty()) return;
    const Finding& first = survey.findings.front();
    fail(ErrorCode::kBadFile,
         "layer {}: {}: '{}': {}{}; nothing is converted, fourfold inspect tells all of it", survey.layer,
         to_string(first.kind), first.tensor, first.found,
         survey.findings.size() > 1 ? fmt::format("; and {} more", survey.findings.size() - 1) : "");
  }

  void plan_expert(const Expert& expert, const LayerSurvey& survey) {
    const BlockNames& names = survey.block.names;
    if (expert.has_gate()) {
      plan_matrix(expert, expert.gate, names.gate, expert.gate_input_scale, survey);
      jobs_.back().joins_next = request_.tie_gate_up;
    }
    plan_matrix(expert, expert.up, names.up, expert.up_input_scale, survey);
    plan_matrix(expert, expert.down, names.down, expert.down_input_scale, survey);
  }

  /// A shared expert goes with the routed ones where it is stored as they are; else it is carried over.
  void plan_shared(const ExpertWeights& weights, const LayerSurvey& survey) {
    const Expert& shared = weights.shared->expert;
    const std::string_view routed = format_name(weights.experts.front().up);
    for (const WeightView* view : {&shared.up, &shared.down}) {
      if (format_name(*view) != routed) return;
    }
    if (shared.has_gate() && format_name(shared.gate) != routed) return;
    plan_expert(shared, survey);
  }

  void plan_matrix(const Expert& expert, const WeightView& view, std::string_view linear,
                   std::optional<float> input_scale, const LayerSurvey& survey) {
    Job job;
    job.name = fmt::format("{}.{}", expert.name, linear);
    job.view = view;
    job.layer = result_->layers.size() - 1;
    job.keeps = is_in(view, request_.to);
    const int block = block_of(request_.to);
    if (block != 0 && cols_of(view) % block != 0) {
      fail(ErrorCode::kUnsupported, "{}: --to {}: expected rows of whole blocks of {}, found {} columns",
           job.name, to_string(request_.to), block, cols_of(view));
    }
    find_anchor(job, linear == survey.block.names.down, survey);
    LayerConversion& layer = result_->layers.back();
    ++layer.matrices;
    layer.unchanged += job.keeps;
    if (request_.to == TargetFormat::kNvfp4) plan_input_scale(job, input_scale);
    jobs_.push_back(std::move(job));
  }

  /// Also marks the source tensors that the new ones replace. A bias stays where it is.
  void find_anchor(Job& job, bool is_down, const LayerSurvey& survey) {
    const std::string fused =
        survey.block.prefix + std::string(kExperts) + (is_down ? "down_proj" : "gate_up_proj");
    if (survey.is_fused && job.name.starts_with(survey.block.prefix + std::string(kExperts))) {
      const FusedReader reader(source_, fused);
      job.anchor = &reader.tensor();
      for (const std::string& name : reader.tensor_names()) replaced_.insert(name);
      return;
    }
    for (const Tensor* tensor : tensors_under(source_, job.name + ".")) {
      if (!tensor->name.ends_with(".bias")) replaced_.insert(tensor->name);
      if (tensor->name.ends_with(".weight") || tensor->name.ends_with(".weight_packed")) job.anchor = tensor;
    }
  }

  // ---- scalars ----

  /// A number that the model to be has; kept where tensors can point to it.
  PlannedTensor scalar(const std::string& name, const std::vector<int64_t>& shape, float value) {
    result_->scalars.push_back(value);
    return {{name, DType::kF32, shape}, reinterpret_cast<const std::byte*>(&result_->scalars.back())};
  }

  static float inverse(float value, const std::string& name) {
    const float inverted = 1.0f / value;
    if (std::isfinite(inverted) && inverted > 0.0f && std::isfinite(value)) return inverted;
    fail(
        ErrorCode::kBadFile,
        "'{}': expected a positive finite number, whose reciprocal the other scheme stores, found {}; for an "
        "input scale, --input-scale dynamic leaves it out",
        name, value);
  }

  /// From the file of input scales; names are those of ModelOpt, multipliers.
  float input_scale_from_file(const std::string& name) {
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

  void plan_input_scale(const Job& job, std::optional<float> own) {
    if (request_.dynamic_inputs) return;
    const std::string name = job.name + std::string(names_.input_scale);
    if (input_scales_) {
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

  void require_all_input_scales_used() const {
    if (!input_scales_) return;
    for (const auto& [name, tensor] : input_scales_->tensors()) {
      if (used_scales_.contains(name)) continue;
      fail(ErrorCode::kInvalidArgument,
           "{}: tensor '{}': expected input scales of converted matrices alone, such as '{}', found another",
           input_scales_->path().string(), name, used_scales_.empty() ? "?" : *used_scales_.begin());
    }
  }

  void add(const Job& job, PlannedTensor tensor) {
    has_input_scales_ |= !names_.input_scale.empty() && tensor.spec.name.ends_with(names_.input_scale);
    new_tensors_[job.anchor].push_back(std::move(tensor));
  }

  // ---- experts stored one by one ----

  void finish_jobs() {
    request_.progress("looking at scales");
    for_each_index(jobs_.size(), [&](size_t index) {
      Job& job = jobs_[index];
      require_sound_scales(job.view, job.name);
      if (!job.keeps && is_cast(job.view, request_.to)) {
        job.kmax = largest_mxfp4_exponent(std::get<BlockScaledView>(job.view));
      }
    });
    for (size_t index = 0; index < jobs_.size(); ++index) {
      const bool joins = require_joinable(index);
      if (joins)
        jobs_[index].kmax = jobs_[index + 1].kmax = std::max(jobs_[index].kmax, jobs_[index + 1].kmax);
      place_job(jobs_[index]);
      if (jobs_[index].keeps) continue;
      std::vector<SourceMatrix> matrices = {source_matrix(jobs_[index])};
      if (joins) {
        place_job(jobs_[index + 1]);
        matrices.push_back(source_matrix(jobs_[++index]));
      }
      result_->plan.tasks.push_back(
          separate_task(std::move(matrices), request_.to, names_, request_.scale, jobs_[index].kmax));
    }
    count_casts();
  }

  static SourceMatrix source_matrix(const Job& job) { return {job.name, job.view, bytes_of(job.view)}; }

  /// Whether gate and up are to share a global scale; refuses what could not without rounding anew.
  bool require_joinable(size_t index) const {
    if (!jobs_[index].joins_next || request_.to != TargetFormat::kNvfp4) return false;
    const Job &gate = jobs_[index], &up = jobs_[index + 1];
    if (!gate.keeps && !up.keeps && is_cast(gate.view, request_.to) == is_cast(up.view, request_.to))
      return true;
    fail(ErrorCode::kUnsupported,
         "{}: --tie-gate-up: expected weights that are yet to be quantized, found {} and {}; codes of NVFP4 "
         "are never rounded again",
         gate.name, format_name(gate.view), format_name(up.view));
  }

  /// Declares the tensors of a matrix; of one that keeps its codes, says where they are.
  void place_job(const Job& job) {
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

  void count_casts() {
    std::vector<CastReport> counts(jobs_.size());
    for_each_index(jobs_.size(), [&](size_t index) {
      const Job& job = jobs_[index];
      if (job.keeps || !is_cast(job.view, request_.to)) return;
      counts[index] = count_cast(std::get<BlockScaledView>(job.view), job.kmax);
    });
    for (size_t index = 0; index < jobs_.size(); ++index) {
      if (counts[index].blocks > 0) count_cast_of(jobs_[index].layer, jobs_[index].name, counts[index]);
    }
  }

  void count_cast_of(size_t layer, const std::string& name, const CastReport& counts) {
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

  // ---- experts in one tensor ----

  void plan_fused(const LayerSurvey& survey) {
    const std::string prefix = survey.block.prefix + std::string(kExperts);
    const bool is_interleaved = fused_gate_up_order(source_.config()) == GateUpOrder::kInterleaved;
    const bool has_blocks = source_.find(prefix + "gate_up_proj_blocks") != nullptr;
    if (scheme_for("") == WeightScheme::kCompressedTensors) {
      fail(ErrorCode::kUnsupported,
           "{}: --scheme compressed-tensors: expected experts with tensors of their own, found "
           "'{}gate_up_proj', "
           "for which that scheme has no layout; use --scheme modelopt",
           source_.path().string(), prefix);
    }
    if (!survey.is_transposed && !has_blocks) {
      fail(
          ErrorCode::kUnsupported,
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

  void plan_fused_matrix(const std::string& name, const LayerSurvey& survey) {
    const auto reader = std::make_shared<const FusedReader>(source_, name);
    const bool transposed = survey.is_transposed;
    const auto [rows, cols] = *reader->shape(transposed);
    LayerConversion& layer = result_->layers.back();
    layer.from = reader->scheme() + " (fused)";
    layer.matrices += reader->experts();
    if (reader->scheme() == to_string(request_.to)) {
      layer.unchanged += reader->experts();
      for (const auto& slice : fused_sources(reader, name, survey)) require_sound_fused(slice);
      plan_fused_input_scale(name, reader);
      return;
    }
    const int block = block_of(request_.to);
    if (block != 0 && cols % block != 0) {
      fail(ErrorCode::kUnsupported, "{}: --to {}: expected rows of whole blocks of {}, found {} columns",
           name, to_string(request_.to), block, cols);
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
      plan_fused_input_scale(name, reader);
    }
    for (const FusedSource& source : sources) {
      result_->plan.tasks.push_back(fused_task(source, name, layout, recoding));
    }
  }

  std::vector<FusedSource> fused_sources(const std::shared_ptr<const FusedReader>& reader,
                                         const std::string& name, const LayerSurvey& survey) const {
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

  static void require_sound_fused(const FusedSource& source) {
    RepackedBytes repacked;
    require_sound_scales(source.reader->matrix(source.expert, source.is_transposed, repacked),
                         source.reader->tensor().name);
  }

  /// One global scale for all experts, as exports of this layout have it: their values are looked at first.
  Recoding fused_recoding(const std::vector<FusedSource>& sources, const std::string& name) {
    Recoding recoding{request_.to, request_.scale, 1.0f, kNoExponent, name};
    const bool casts = sources.front().reader->scheme() == "mxfp4";
    quantizes_ |= !casts;
    std::vector<float> amax(sources.size(), 0.0f);
    std::vector<int> kmax(sources.size(), kNoExponent);
    const auto open = [&](size_t index, RepackedBytes& repacked) {
      return sources[index].reader->matrix(sources[index].expert, sources[index].is_transposed, repacked);
    };
    for_each_index(sources.size(), [&](size_t index) {
      RepackedBytes repacked;
      const WeightView view = open(index, repacked);
      require_sound_scales(view, name);
      if (request_.to != TargetFormat::kNvfp4) return;
      casts ? static_cast<void>(kmax[index] = largest_mxfp4_exponent(std::get<BlockScaledView>(view)))
            : static_cast<void>(amax[index] = finite_absolute_maximum(view, name));
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

  void plan_fused_input_scale(const std::string& name, const std::shared_ptr<const FusedReader>& reader) {
    const std::string scale = name + "_input_scale";
    const Tensor* own = source_.find(scale);
    if (request_.to != TargetFormat::kNvfp4) return;
    if (request_.dynamic_inputs || input_scales_) replaced_.insert(scale);
    is_changed_ |= own != nullptr && (request_.dynamic_inputs || input_scales_);
    has_input_scales_ |=
        (own != nullptr && !request_.dynamic_inputs && reader->scheme() == "nvfp4") || input_scales_;
    if (!input_scales_) return;
    is_changed_ = true;
    new_tensors_[&reader->tensor()].push_back(scalar(scale, {}, input_scale_from_file(scale)));
  }

  // ---- the rest ----

  void require_something_to_do() const {
    if (request_.scale != ScaleRule::kAmax && !quantizes_) {
      fail(ErrorCode::kInvalidArgument,
           "--scale {}: expected weights to quantize, found none: codes and scales of this source stay as "
           "they "
           "are",
           to_string(request_.scale));
    }
    if (is_changed_ || request_.dynamic_inputs || input_scales_) return;
    fail(ErrorCode::kInvalidArgument, "{}: expected experts to convert, found that they are {} already",
         source_.path().string(), to_string(request_.to));
  }

  /// Tensors in the order of the source's files. NVFP4 layers that are no experts follow a change of scheme.
  void place_tensors() {
    for (const int64_t layer : layers_with_experts(source_)) {
      const std::string prefix = find_block(source_, layer).prefix + std::string(kExperts);
      if (std::find(prefixes_.begin(), prefixes_.end(), prefix) == prefixes_.end()) note_left(layer, prefix);
    }
    std::vector<const Tensor*> order;
    for (const auto& [name, tensor] : source_.tensors()) order.push_back(tensor);
    std::sort(order.begin(), order.end(), [](const Tensor* a, const Tensor* b) {
      return std::tie(a->file, a->data) < std::tie(b->file, b->data);
    });
    auto& tensors = result_->plan.tensors;
    for (const Tensor* tensor : order) {
      if (const auto planned = new_tensors_.find(tensor); planned != new_tensors_.end()) {
        tensors.insert(tensors.end(), planned->second.begin(), planned->second.end());
      }
      if (!replaced_.contains(tensor->name)) tensors.push_back(carried(*tensor));
    }
  }

  /// Experts of a layer that was not asked for: named in the config unless they are in the format anyway.
  void note_left(int64_t layer, const std::string& prefix) {
    const std::string scheme = load_one(layer);
    const bool is_same = scheme.starts_with(to_string(request_.to)) &&
                         (scheme.find("compressed-tensors") != std::string::npos) == names_.divides;
    left_prefixes_.push_back(prefix);
    if (!is_same) left_experts_.push_back(prefix);
  }

  std::string load_one(int64_t layer) const { return load_experts(result_->source, layer, {0}).scheme; }

  PlannedTensor carried(const Tensor& tensor) {
    PlannedTensor same{{tensor.name, tensor.dtype, tensor.shape}, tensor.data};
    const auto is_left = [&](const std::string& prefix) { return tensor.name.starts_with(prefix); };
    if (request_.to != TargetFormat::kNvfp4 ||
        std::any_of(left_prefixes_.begin(), left_prefixes_.end(), is_left)) {
      return same;
    }
    const size_t dot = tensor.name.rfind('.');
    const std::string linear = tensor.name.substr(0, dot);
    const bool divides = names_.divides;
    const char* global = divides ? ".weight_scale_2" : ".weight_global_scale";  // as the source has it
    if (dot == std::string::npos || source_.find(linear + global) == nullptr) return same;
    const std::string suffix = tensor.name.substr(dot);
    if (suffix == (divides ? ".weight" : ".weight_packed")) {
      same.spec.name = linear + std::string(names_.weight);
    } else if (suffix == global || suffix == (divides ? ".input_scale" : ".input_global_scale")) {
      if (tensor.dtype != DType::kF32 || tensor.elements() != 1) bad_tensor(tensor, "one F32 number");
      float value = 0.0f;
      std::memcpy(&value, tensor.data, sizeof(value));
      return scalar(linear + std::string(suffix == global ? names_.global : names_.input_scale),
                    names_.scalar, inverse(value, tensor.name));
    }
    return same;
  }

  void write_configs() {
    ConvertedModel model;
    model.source = source_.path();
    model.to = request_.to;
    model.scheme = *scheme_;
    model.is_deepseek_v4 = is_deepseek_v4_;
    model.has_input_scales = has_input_scales_;
    model.left_experts = left_experts_;
    for (const PlannedTensor& tensor : result_->plan.tensors) {
      model.tensors.push_back(tensor.spec);
      model.has_blocks |= tensor.spec.name.ends_with("gate_up_proj_blocks");
    }
    result_->plan.files = converted_configs(model);
    for (PlannedFile& file : other_files(source_.path(), result_->notes)) {
      result_->plan.files.push_back(std::move(file));
    }
    if (!left_experts_.empty()) {
      result_->notes.push_back(
          fmt::format("{} layers keep their experts in another format; loaders that want one format for all "
                      "experts refuse such a model",
                      left_experts_.size()));
    }
  }

  const Checkpoint& source_;
  const ConversionRequest& request_;
  std::unique_ptr<Conversion> result_;
  bool is_deepseek_v4_ = false, is_changed_ = false, quantizes_ = false, has_input_scales_ = false;
  std::optional<WeightScheme> scheme_;
  LinearNames names_;
  std::shared_ptr<const SafetensorsFile> input_scales_;
  std::set<std::string> used_scales_;
  std::vector<Job> jobs_;
  std::vector<ExpertLayer> loaded_;  // whose views the jobs have
  std::vector<std::string> prefixes_, left_prefixes_, left_experts_;
  std::set<std::string> replaced_;  // source tensors
  std::map<const Tensor*, std::vector<PlannedTensor>> new_tensors_;
};

}  // namespace

std::unique_ptr<Conversion> plan_conversion(std::shared_ptr<const Checkpoint> source,
                                            const ConversionRequest& request) {
  return ConversionPlanner(std::move(source), request).run();
}

}  // namespace fourfold
