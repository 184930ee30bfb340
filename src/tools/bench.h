// fourfold bench: how fast is a layer, beside what the machine can do, and is it right?
//
// A case is a backend, a shape, an activation format, a number of threads and a number of tokens. Every case
// is checked against float64 in the same run, on its own data, before it is timed (bench_check.h); a case
// that is wrong gets no time. The floor of a case is max(bytes / read bandwidth, operations / peak), both
// ceilings measured in the same run. docs/bench.md is the manual.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "fourfold/moe_layer.h"
#include "tools/bench_check.h"
#include "tools/bench_routing.h"
#include "tools/bench_statistics.h"
#include "tools/shape_argument.h"
#include "tools/testbed.h"

namespace fourfold {

/// Weights that rotate are cold when they are at least so many times the last-level cache.
inline constexpr double kColdFactor = 3.0;

struct BenchRequest {
  std::vector<LayerShape> shapes;
  std::vector<int64_t> tokens;
  std::vector<const Backend*> backends;  ///< empty: for each case the best that can run it
  std::vector<ActivationFormat> activations;
  /// For NVFP4 activations.
  ScalePolicy x_scale = ScalePolicy::kStatic, intermediate_scale = ScalePolicy::kStatic;
  ScaleRule activation_rule = ScaleRule::kAmax;
  RoutingSource routing;
  int64_t most_experts = 0;  ///< of a shape's experts; 0: all
  std::vector<int> threads;  ///< for backends of the host; empty: as many as OpenMP takes
  TimingLimits timing;
  bool stages = false;
  bool profile = false;  ///< a call of every case once more, for a profiler (Testbed::profile)
  uint64_t seed = 0;
};

/// What one case is.
struct BenchCase {
  std::string backend, model;
  int64_t experts = 0, hidden = 0, intermediate = 0, top_k = 0, tokens = 0;
  ActivationFormat activations = ActivationFormat::kNvfp4;
  int threads = 0;  ///< 0: the backend computes on a GPU

  std::string name() const;  ///< backend/model/tokens
};

/// What a call moves and computes at least, in the mean over the rotation.
struct BenchWork {
  double experts_hit = 0.0;
  double rows = 0.0;          ///< slots with an expert
  double weight_bytes = 0.0;  ///< of the experts hit
  double bytes = 0.0;         ///< those, x read once and y written once, both bf16
  double operations = 0.0;    ///< 2 x rows x 3 x H x I; nvfp4x2 twice as many: its terms are multiplied apart
};
BenchWork work_of(const BenchCase& bench_case, const RoutingRotation& rotation);

/// Seconds that no implementation beats; without a peak, of the bytes alone.
struct Floor {
  double seconds = 0.0;
  bool by_memory = true;
};
Floor floor_of(const BenchWork& work, double bytes_per_second, std::optional<double> operations_per_second);

struct BenchResult {
  BenchCase bench_case;
  std::string not_run;  ///< why there is nothing below; empty when there is
  std::string kernel;
  BenchWork work;
  CheckReport check;
  std::optional<Spread> seconds;  ///< of a call; absent where the check failed
  std::optional<Ceiling> peak;    ///< which arithmetic peak the floor takes
  Floor floor;
  std::optional<double> peak_between;  ///< operations a second of `peak` right behind calls
  Floor floor_between;                 ///< the floor, were that the peak
  int rotations = 0, layer_copies = 0;
  double rotating_bytes = 0.0;  ///< distinct weight bytes that the rotation touches
  bool cold = false;            ///< they are at least kColdFactor times the last-level cache
  std::vector<StageTime> stages;

  /// The time is below the floor: then a ceiling was measured too low (by a machine that was busy, say), or
  /// weights came from a cache, and the fraction means nothing.
  bool beats_floor() const { return seconds && seconds->median < floor.seconds; }
};

/// Ceilings of one machine with so many threads.
struct MachineReport {
  std::string machine;
  int threads = 0;  ///< 0: a GPU
  int64_t cache_bytes = 0;
  Ceiling read_bandwidth;  ///< bytes a second
  std::vector<Ceiling> peaks;
};

/// Told what is known as soon as it is known: a run may be cut short.
struct BenchListener {
  std::function<void(const MachineReport&)> machine = [](const MachineReport&) {};
  std::function<void(const BenchResult&)> result = [](const BenchResult&) {};
  std::function<void(std::string_view)> progress = [](std::string_view) {};
};

/// Runs every case. Throws Error for what makes the whole request impossible; a single case that can't run
/// says so in its result.
void run_bench(const BenchRequest& request, const BenchListener& listener);

}  // namespace fourfold
