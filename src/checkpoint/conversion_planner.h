// How a conversion is planned: for plan_conversion alone. conversion.cpp has the experts that are stored one
// by one, conversion_fused.cpp those that share a tensor, conversion_rest.cpp everything else.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/conversion.h"
#include "checkpoint/conversion_names.h"
#include "checkpoint/conversion_tasks.h"
#include "checkpoint/layer_survey.h"
#include "checkpoint/linear_reader.h"

namespace fourfold {

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

/// Runs `work` for 0 to count - 1 on all cores, or as many as can have `scratch_bytes` each; the first
/// exception comes out.
template <class Work>
void for_each_index(size_t count, int64_t scratch_bytes, const Work& work) {
  const auto threads =
      std::clamp<int64_t>(kTaskMemoryBytes / std::max<int64_t>(1, scratch_bytes), 1, omp_get_max_threads());
  std::atomic<bool> failed = false;
  std::exception_ptr error;
  std::mutex mutex;
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast <int>(threads))
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

/// NaN and negative block scales are what inspect objects to: throws Error naming the first.
void require_sound_scales(const WeightView& view, const std::string& name);

/// Holds what is known while a conversion is planned.
class ConversionPlanner {
 public:
  ConversionPlanner(std::shared_ptr<const Checkpoint> source, const ConversionRequest& request);
  std::unique_ptr<Conversion> run();

 private:
  // ---- what is asked ----
  std::vector<int64_t> selected_layers() const;
  void open_input_scales();
  /// The source's own scheme where nobody asks for one.
  WeightScheme target_scheme();

  // ---- layers ----
  /// Scales are all that planning reads: they are fetched some layers ahead, and given back.
  void plan_layers(const std::vector<int64_t>& layers);
  /// Returns their bytes.
  int64_t for_each_scale_tensor(int64_t layer, void (*advise)(std::span<const std::byte>)) const;
  void plan_layer(int64_t layer);
  static void require_clean(const LayerSurvey& survey);
  void plan_expert(const Expert& expert, const LayerSurvey& survey);
  void plan_matrix(const Expert& expert, const WeightView& view, std::string_view linear,
                   std::optional<float> input_scale, const LayerSurvey& survey);
  void plan_job(Job job, std::optional<float> input_scale);
  /// Also marks the source tensors that the new ones replace. A bias stays where it is.
  void find_anchor(Job& job, bool is_down, const LayerSurvey& survey);
  void replace_linear(Job& job);

  // ---- scalars ----
  /// A number that the model to be has; kept where tensors can point to it.
  PlannedTensor scalar(const std::string& name, const std::vector<int64_t>& shape, float value);
  static float inverse(float value, const std::string& name);
  /// From the file of input scales; names are those of ModelOpt, multipliers.
  float input_scale_from_file(const std::string& name);
  void plan_input_scale(const Job& job, std::optional<float> own);
  void require_all_input_scales_used() const;
  void add(const Job& job, PlannedTensor tensor);

  // ---- experts stored one by one ----
  /// Of one layer, while its scales are in memory.
  void finish_jobs();
  static SourceMatrix source_matrix(const Job& job);
  /// Whether gate and up are to share a global scale; refuses what could not without rounding anew.
  bool require_joinable(size_t index) const;
  /// Declares the tensors of a matrix; of one that keeps its codes, says where they are.
  void place_job(const Job& job);
  void count_casts();
  void count_cast_of(size_t layer, const std::string& name, const CastReport& counts);

  // ---- experts in one tensor ----
  void plan_fused(const LayerSurvey& survey);
  void plan_fused_matrix(const std::string& name, const LayerSurvey& survey);
  std::vector<FusedSource> fused_sources(const std::shared_ptr<const FusedReader>& reader,
                                         const std::string& name, const LayerSurvey& survey) const;
  static void require_sound_fused(const FusedSource& source);
  /// One global scale for all experts, as exports of this layout have it: their values are looked at first.
  Recoding fused_recoding(const std::vector<FusedSource>& sources, const std::string& name);
  void plan_fused_input_scale(const std::string& name, const FusedReader& reader);

  // ---- the rest ----
  /// Layers of four bits elsewhere, attention for one: loaders read one format and one scheme in a model.
  void plan_other_linears();
  void require_something_to_do() const;
  /// Tensors in the order of the source's files.
  void place_tensors();
  /// Experts of a layer that was not asked for: named in the config unless they are in the format anyway.
  void note_left(int64_t layer, const std::string& prefix);
  std::string load_one(int64_t layer) const;
  void write_configs();

  const Checkpoint& source_;
  const ConversionRequest& request_;
  std::unique_ptr<Conversion> result_;
  bool is_deepseek_v4_ = false, is_changed_ = false, quantizes_ = false;
  std::optional<WeightScheme> scheme_;
  LinearNames names_;
  std::shared_ptr<const SafetensorsFile> input_scales_;
  std::set<std::string> used_scales_;
  std::vector<Job> jobs_;
  size_t first_job_ = 0;             // of the layer that is being planned
  std::vector<ExpertLayer> loaded_;  // whose views the jobs have
  std::vector<std::string> prefixes_, left_experts_;
  std::set<std::string> replaced_;  // source tensors
  std::map<const Tensor*, std::vector<PlannedTensor>> new_tensors_;
};

}  // namespace fourfold
