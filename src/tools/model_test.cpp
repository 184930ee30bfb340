#include "tools/model_test.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <tuple>

#include "base/fail.h"
#include "tools/exit_codes.h"
#include "tools/number_list.h"

namespace fourfold {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// "7 s", "3:05 min" or "2:07 h".
std::string duration_text(double seconds) {
  const auto whole = static_cast<int64_t>(std::llround(seconds));
  if (whole < 60) return fmt::format("{} s", whole);
  if (whole < 3600) return fmt::format("{}:{:02} min", whole / 60, whole % 60);
  return fmt::format("{}:{:02} h", whole / 3600, whole / 60 % 60);
}

/// Says which layer is being tested, how long the rest may take, and what the layer does.
class LayerProgress {
 public:
  LayerProgress(const ModelTask& task, size_t layers) : task_(task), layers_(layers) {}

  void start(int64_t layer, size_t done) {
    head_ = fmt::format("layer {} ({} of {}", layer, done + 1, layers_);
    if (done > 0) {
      const double rest =
          seconds_since(start_) / static_cast<double>(done) * static_cast<double>(layers_ - done);
      head_ += fmt::format(", about {} left", duration_text(rest));
    }
    head_ += ")";
  }
  void show(std::string_view what) const { task_.progress(fmt::format("{}: {}", head_, what)); }

 private:
  const ModelTask& task_;
  size_t layers_;
  Clock::time_point start_ = Clock::now();
  std::string head_;
};

/// The layers to test, and those that were asked for and have no experts.
std::vector<int64_t> choose_layers(const Checkpoint& checkpoint, const ModelTask& task,
                                   std::vector<SkippedLayer>& skipped) {
  const CheckpointLayers there = list_layers(checkpoint);
  const auto is_in = [](const std::vector<int64_t>& sorted, int64_t layer) {
    return std::binary_search(sorted.begin(), sorted.end(), layer);
  };
  std::vector<int64_t> chosen;
  if (task.layers.empty()) {
    for (const int64_t layer : there.dense) skipped.push_back({layer, "dense: it has no experts"});
    return there.with_experts;
  }
  for (const int64_t layer : task.layers) {
    if (is_in(there.with_experts, layer)) {
      chosen.push_back(layer);
    } else if (is_in(there.dense, layer)) {
      skipped.push_back({layer, "dense: it has no experts"});
    } else {
      fail(ErrorCode::kNotFound, "{}: --layers: expected layers of the model, found {}; with experts: {}",
           checkpoint.path().string(), layer, format_list(there.with_experts));
    }
  }
  return chosen;
}

}  // namespace

ModelReport test_model(const Checkpoint& checkpoint, const ModelTask& task) {
  ModelReport report;
  const ModelConfig& config = checkpoint.config();
  report.model = config.model_type.empty() ? "unknown" : config.model_type;
  report.directory = checkpoint.path().string();
  report.damage = task.damage;
  const std::vector<int64_t> layers = choose_layers(checkpoint, task, report.skipped);
  LayerProgress progress(task, layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    ModelRow row;
    row.layer = layers[i];
    progress.start(row.layer, i);
    const auto start = Clock::now();
    try {
      row.result = task.test_layer(row.layer, [&](std::string_view what) { progress.show(what); });
    } catch (const LayerIsNotNvfp4& error) {
      report.skipped.push_back({row.layer, error.what()});
      task.after_layer();
      continue;
    } catch (const Error& error) {
      row.error = error.what();
      if (!task.damage.empty()) row.error += "; is it in a file that can't be read?";
    } catch (const std::bad_alloc&) {
      row.error = "out of memory";
    }
    task.after_layer();
    row.seconds = seconds_since(start);
    report.rows.push_back(std::move(row));
  }
  std::sort(report.skipped.begin(), report.skipped.end(),
            [](const SkippedLayer& a, const SkippedLayer& b) { return a.layer < b.layer; });
  if (report.rows.empty()) {
    fail(ErrorCode::kNotFound, "{}: expected layers with NVFP4 experts, found none{}", report.directory,
         report.skipped.empty() ? ""
                                : "; layer " + std::to_string(report.skipped.front().layer) + " is " +
                                      report.skipped.front().reason);
  }
  return report;
}

int exit_code_of(const ModelReport& report) {
  int code = report.damage.empty() ? kExitFine : kExitError;
  for (const ModelRow& row : report.rows) {
    if (!row.result) return kExitError;
    if (code == kExitFine) code = exit_code_of(row.result->report);
  }
  return code;
}

std::optional<WorstFigure> worst_figure(const LayertestReport& report) {
  std::optional<WorstFigure> worst;
  const auto offer = [&](const WorstFigure& figure) {
    // Not a number is worse than any.
    if (!worst || (!std::isnan(worst->share()) && !(figure.share() <= worst->share()))) worst = figure;
  };
  for (const auto& [comparison, stages] : {std::pair("checkpoint", &report.checkpoint.stages),
                                           std::pair("activations", &report.activations.stages),
                                           std::pair("kernel", &report.kernel_stages.stages)}) {
    for (const StageReport& stage : *stages) {
      if (!stage.limit) continue;
      offer({fmt::format("{} {}", comparison, kStageNames[static_cast<size_t>(stage.stage)]), stage.rel_l2,
             *stage.limit});
    }
  }
  for (const auto& [what, scale] : input_scales_of(report)) {
    offer({fmt::format("input scale of {}", what), scale.ratio, scale.limit});
  }
  return worst;
}

std::vector<const ModelRow*> worst_first(const ModelReport& report) {
  std::vector<const ModelRow*> rows;
  for (const ModelRow& row : report.rows) rows.push_back(&row);
  const auto rank = [](const ModelRow* row) {
    if (!row->result) return std::tuple(0, 0.0);
    const auto worst = worst_figure(row->result->report);
    const double share = worst ? worst->share() : 0.0;
    return std::tuple(row->result->report.findings.empty() ? 2 : 1,
                      std::isnan(share) ? -std::numeric_limits<double>::infinity() : -share);
  };
  std::stable_sort(rows.begin(), rows.end(),
                   [&](const ModelRow* a, const ModelRow* b) { return rank(a) < rank(b); });
  return rows;
}

}  // namespace fourfold
