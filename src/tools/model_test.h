// layertest over the layers of a whole model: one at a time, so that memory is bounded by one layer.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "fourfold/checkpoint.h"
#include "fourfold/error.h"
#include "tools/layertest_report.h"

namespace fourfold {

/// What a layer whose experts are left in another format throws: of a whole model, it is skipped by name.
class LayerIsNotNvfp4 : public Error {
 public:
  explicit LayerIsNotNvfp4(const std::string& message) : Error(ErrorCode::kInvalidArgument, message) {}
};

/// One tested layer: a report, or why there is none.
struct ModelRow {
  int64_t layer = 0;
  std::optional<LayerResult> result;
  std::string error;  ///< empty where there is a result
  double seconds = 0.0;
};

struct SkippedLayer {
  int64_t layer = 0;
  std::string reason;
};

struct ModelReport {
  std::string model, directory;
  std::vector<ModelRow> rows;         ///< ascending layers
  std::vector<SkippedLayer> skipped;  ///< ascending layers
  std::vector<std::string> damage;    ///< files of the checkpoint that can't be read
};

/// Which layers to test.
struct ModelTask {
  std::vector<int64_t> layers;      ///< ascending; empty: all that hold experts
  std::vector<std::string> damage;  ///< what opening the checkpoint found
  std::function<LayerResult(int64_t layer, const std::function<void(std::string_view)>& progress)> test_layer;
  std::function<void()> after_layer;  ///< gives memory back
  std::function<void(std::string_view)> progress = [](std::string_view) {};
};

/// Runs `task.test_layer` for each layer; an Error of a layer becomes its row. Dense layers and those that
/// are not NVFP4 are skipped. Throws Error for a layer that the model does not have, and where nothing is
/// left to test.
ModelReport test_model(const Checkpoint& checkpoint, const ModelTask& task);

/// 1 where something could not be read, else 3 where a layer has a finding, else 0.
int exit_code_of(const ModelReport& report);

/// "fine", "finding" or "error", as the exit code.
std::string verdict_of(const ModelReport& report);

/// The largest of what has a limit, measured in it: how near a layer is to a finding.
struct WorstFigure {
  std::string name;  ///< e.g. "kernel l1" or "input scale of x"
  double value = 0.0, limit = 0.0;
  double share() const { return value / limit; }
};
/// nullopt where nothing has a limit.
std::optional<WorstFigure> worst_figure(const LayertestReport& report);

/// Rows that could not be read, then findings, then the rest; by worst_figure within, largest first.
std::vector<const ModelRow*> worst_first(const ModelReport& report);

std::string format_model_table(const ModelReport& report);
/// The schema of docs/layertest.md, section "Whole models".
std::string format_model_json(const ModelReport& report);

}  // namespace fourfold
