#include "tools/bench.h"

#include <omp.h>

#include <algorithm>
#include <map>
#include <new>
#include <set>

#include "base/fail.h"
#include "tools/layer_inputs.h"
#include "tools/layer_trace.h"
#include "tools/staged_rows.h"

namespace fourfold {
namespace {

/// More copies of a layer than this are not made to fill a cache.
constexpr int64_t kMostLayerCopies = 32;

/// What one backend makes of a shape: layers that take turns.
struct PreparedLayers {
  LayerConfig config;
  LayerOptions options;
  std::string why_not;    ///< empty: it can run
  ExpertWeights weights;  ///< of the first layer, which is the one that is checked
  std::vector<std::unique_ptr<MoeLayer>> layers;
};

/// A rotation's inputs in a testbed's memory.
struct DeviceInputs {
  TestbedArray<Bf16> x, y;
  std::vector<TestbedArray<int32_t>> topk_ids;
  std::vector<TestbedArray<float>> topk_weights;
  AlignedWorkspace workspace;
  int64_t hidden = 0;

  DeviceInputs(const Memory& memory, MatrixView<const Bf16> host_x, const RoutingRotation& rotation,
               size_t workspace_bytes)
      : x(memory, std::span(host_x.data, static_cast<size_t>(host_x.rows * host_x.cols))),
        y(memory, host_x.rows * host_x.cols),
        workspace(workspace_bytes, memory),
        hidden(host_x.cols) {
    for (const RoutingStep& step : rotation.steps) {
      topk_ids.emplace_back(memory, std::span(step.topk_ids));
      topk_weights.emplace_back(memory, std::span(step.topk_weights));
    }
  }

  ForwardArgs args(const RoutingRotation& rotation, size_t step) const {
    ForwardArgs args;
    args.x = x.matrix(rotation.tokens, hidden);
    args.routing.topk_ids = MatrixView<const int32_t>(topk_ids[step].matrix(rotation.tokens, rotation.top_k));
    args.routing.topk_weights = topk_weights[step].matrix(rotation.tokens, rotation.top_k);
    args.y = y.matrix(rotation.tokens, hidden);
    args.workspace = workspace.span();
    return args;
  }
};

class BenchRun {
 public:
  BenchRun(const BenchRequest& request, const BenchListener& listener)
      : request_(request), listener_(listener), all_threads_(omp_get_max_threads()) {}

  ~BenchRun() { omp_set_num_threads(all_threads_); }

  void run() {
    for (const LayerShape& shape : request_.shapes) {
      const LayerShape limited = limit_experts(shape);
      listener_.progress("making inputs");
      const int64_t most_tokens = *std::max_element(request_.tokens.begin(), request_.tokens.end());
      inputs_ = make_inputs(most_tokens, limited.hidden, request_.seed, false);
      for (const ActivationFormat format : request_.activations) {
        for (const Backend* backend : backends_for(limited, format)) run_backend(limited, format, *backend);
      }
    }
  }

 private:
  LayerShape limit_experts(LayerShape shape) const {
    if (request_.most_experts > 0) shape.experts = std::min(shape.experts, request_.most_experts);
    if (shape.top_k > shape.experts) {
      reject(fmt::format("{}: experts", shape.name), fmt::format("at least top-k, {}", shape.top_k),
             shape.experts);
    }
    return shape;
  }

  LayerConfig config_of(const LayerShape& shape) const {
    return {shape.hidden, shape.intermediate, shape.experts, shape.top_k, {}, false};
  }

  LayerOptions options_for(ActivationFormat format) const {
    LayerOptions options;
    options.activations = format;
    if (is_nvfp4(format)) {
      options.x_scale = request_.x_scale;
      options.intermediate_scale = request_.intermediate_scale;
      options.activation_rule = request_.activation_rule;
    }
    return options;
  }

  std::vector<const Backend*> backends_for(const LayerShape& shape, ActivationFormat format) const {
    if (!request_.backends.empty()) return request_.backends;
    // Shapes and formats decide, not data: there are none yet.
    const ExpertWeights empty = generated_experts({shape.experts, shape.hidden, shape.intermediate, 0},
                                                  nullptr, nullptr, Device::host(), nullptr);
    return {choose_backend("", empty, config_of(shape), options_for(format)).backend};
  }

  Testbed& testbed_of(const Backend& backend) {
    auto& testbed = testbeds_[&backend.memory()];
    if (!testbed) testbed = make_testbed(backend);
    return *testbed;
  }

  /// Ceilings with `threads`, measured at most once.
  const MachineReport& machine_of(const Testbed& testbed, int threads) {
    const auto key = std::pair(&testbed, threads);
    const auto known = machines_.find(key);
    if (known != machines_.end()) return known->second;
    listener_.progress("measuring ceilings");
    const MachineReport machine{testbed.machine(), threads, testbed.cache_bytes(),
                                testbed.read_bandwidth(request_.timing), testbed.peaks(request_.timing)};
    listener_.machine(machine);
    return machines_.emplace(key, machine).first->second;
  }

  /// Thread counts of the backend's cases; 0 where it does not compute on the host.
  std::vector<int> threads_for(const Backend& backend) const {
    if (!backend.why_unavailable().empty() || backend.memory().device().kind != Device::Kind::kHost)
      return {0};
    return request_.threads.empty() ? std::vector<int>{all_threads_} : request_.threads;
  }

  void run_backend(const LayerShape& shape, ActivationFormat format, const Backend& backend) {
    PreparedLayers prepared;
    Testbed* testbed = nullptr;
    try {
      prepared.why_not = backend.why_unavailable();
      if (prepared.why_not.empty()) testbed = &testbed_of(backend);
      if (testbed != nullptr) prepare(shape, format, backend, *testbed, prepared);
    } catch (const std::bad_alloc&) {
      prepared.why_not = "not enough memory for the layer";
    } catch (const Error& error) {
      prepared.why_not = error.what();
    }
    for (const int threads : threads_for(backend)) {
      if (threads > 0) omp_set_num_threads(threads);
      for (const int64_t tokens : request_.tokens) {
        BenchResult result;
        result.bench_case = {std::string(backend.name()),
                             shape.name,
                             shape.experts,
                             shape.hidden,
                             shape.intermediate,
                             shape.top_k,
                             tokens,
                             format,
                             threads};
        result.not_run = prepared.why_not;
        if (result.not_run.empty()) run_case(*testbed, prepared, result);
        listener_.result(result);
      }
    }
  }

  void prepare(const LayerShape& shape, ActivationFormat format, const Backend& backend,
               const Testbed& testbed, PreparedLayers& prepared) const {
    prepared.config = config_of(shape);
    prepared.options = options_for(format);
    GeneratedLayer layer{shape.experts, shape.hidden, shape.intermediate, request_.seed};
    const int64_t layer_bytes = weight_bytes_of(shape.experts, shape.hidden, shape.intermediate);
    const auto wanted = static_cast<int64_t>(kColdFactor * static_cast<double>(testbed.cache_bytes()));
    const int64_t copies = std::clamp<int64_t>((wanted + layer_bytes - 1) / layer_bytes, 1, kMostLayerCopies);
    for (int64_t copy = 0; copy < copies; ++copy) {
      if (testbed.free_bytes() < 3 * layer_bytes) {
        if (copy > 0) break;
        fail(ErrorCode::kInvalidArgument,
             "the layer: expected {:.1f} GB of free memory, found {:.1f} GB; --experts takes fewer",
             3e-9 * static_cast<double>(layer_bytes), 1e-9 * static_cast<double>(testbed.free_bytes()));
      }
      listener_.progress(fmt::format("making layer {} of {} of {}", copy + 1, copies, shape.name));
      layer.seed = request_.seed + static_cast<uint64_t>(copy);
      ExpertWeights weights = testbed.generate(layer);
      prepared.why_not = backend.why_unsupported(weights, prepared.config, prepared.options);
      if (!prepared.why_not.empty()) return;
      prepared.layers.push_back(backend.make_layer(weights, prepared.config, prepared.options));
      if (copy == 0) prepared.weights = std::move(weights);
    }
  }

  void run_case(const Testbed& testbed, const PreparedLayers& prepared, BenchResult& result) {
    try {
      measure_case(testbed, prepared, result);
    } catch (const std::bad_alloc&) {
      result.not_run = "not enough memory; fewer --tokens take less";
    } catch (const Error& error) {
      result.not_run = error.what();
    }
  }

  void measure_case(const Testbed& testbed, const PreparedLayers& prepared, BenchResult& result) {
    const BenchCase& bench_case = result.bench_case;
    const int64_t expert_bytes = weight_bytes_of(1, bench_case.hidden, bench_case.intermediate);
    const auto cold_bytes =
        static_cast<int64_t>(kColdFactor * static_cast<double>(testbed.cache_bytes())) + expert_bytes;
    listener_.progress(result.bench_case.name() + ": routing");
    const RoutingRotation rotation =
        make_rotation(request_.routing, bench_case.tokens, bench_case.experts, bench_case.top_k,
                      cold_bytes / expert_bytes + bench_case.experts, request_.seed);
    describe_rotation(rotation, prepared, expert_bytes, testbed.cache_bytes(), result);
    // Seconds of measuring, so not before it is known that the routing fits.
    const MachineReport& machine = machine_of(testbed, bench_case.threads);

    std::vector<LayerPlan> plans;
    size_t workspace_bytes = 0;
    for (const auto& layer : prepared.layers) {
      plans.push_back(layer->plan(bench_case.tokens));
      workspace_bytes = std::max(workspace_bytes, plans.back().workspace_bytes);
    }
    result.kernel = plans.front().kernel;
    const MatrixView<const Bf16> x(inputs_.x.data(), bench_case.tokens, bench_case.hidden);
    const DeviceInputs inputs(testbed.memory(), x, rotation, workspace_bytes);
    listener_.progress(result.bench_case.name() + ": checking");
    result.check = check(testbed, prepared, plans.front(), x, rotation, inputs);
    if (!result.check.passed()) return;

    std::vector<LayerCall> calls;
    for (size_t step = 0; step < rotation.steps.size(); ++step) {
      const size_t copy = step % prepared.layers.size();
      calls.emplace_back([&layer = *prepared.layers[copy], &plan = plans[copy],
                          args = inputs.args(rotation, step)](void* stream, StageObserver* observer) mutable {
        args.stream = stream;
        args.observer = observer;
        layer.forward(plan, args);
      });
    }
    if (request_.profile) testbed.profile(calls.front());
    listener_.progress(result.bench_case.name() + ": timing");
    const std::vector<double> samples = testbed.time(calls, request_.timing);
    result.peak = peak_for(testbed, prepared, plans.front(), machine, bench_case);
    const double bandwidth = machine.read_bandwidth.per_second.value_or(0.0);
    result.floor = floor_of(result.work, bandwidth, result.peak ? result.peak->per_second : std::nullopt);
    if (result.peak) result.peak_between = testbed.peak_between(calls, *result.peak);
    if (result.peak_between) result.floor_between = floor_of(result.work, bandwidth, result.peak_between);
    if (request_.stages) result.stages = testbed.time_stages(calls);
    result.seconds = spread_of(samples);
  }

  static void describe_rotation(const RoutingRotation& rotation, const PreparedLayers& prepared,
                                int64_t expert_bytes, int64_t cache_bytes, BenchResult& result) {
    std::set<std::pair<size_t, size_t>> touched;  // layer, expert
    for (size_t step = 0; step < rotation.steps.size(); ++step) {
      const std::vector<int32_t>& rows = rotation.steps[step].rows_of_expert;
      for (size_t expert = 0; expert < rows.size(); ++expert) {
        if (rows[expert] > 0) touched.emplace(step % prepared.layers.size(), expert);
      }
    }
    result.work = work_of(result.bench_case, rotation);
    result.rotations = static_cast<int>(rotation.steps.size());
    result.layer_copies = static_cast<int>(prepared.layers.size());
    result.rotating_bytes = static_cast<double>(touched.size()) * static_cast<double>(expert_bytes);
    result.cold = result.rotating_bytes >= kColdFactor * static_cast<double>(cache_bytes);
  }

  CheckReport check(const Testbed& testbed, const PreparedLayers& prepared, const LayerPlan& plan,
                    MatrixView<const Bf16> x, const RoutingRotation& rotation,
                    const DeviceInputs& inputs) const {
    CheckSubject subject;
    subject.testbed = &testbed;
    subject.weights = &prepared.weights;
    subject.layer = prepared.layers.front().get();
    subject.plan = &plan;
    subject.x = x;
    subject.routing = rotation.view(0);
    subject.args = inputs.args(rotation, 0);
    subject.seed = request_.seed;
    const int64_t taps = tap_bytes(prepared.config, prepared.options.activations, x.rows);
    std::string why_end_to_end = "the taps of all stages do not fit the memory";
    if (taps <= testbed.free_bytes() / 10 * 9) {
      try {
        return check_layer(subject, CheckDepth::kStageByStage);
      } catch (const Error& error) {
        // Backends that cut many tokens into parts have no taps of them all.
        if (error.code() != ErrorCode::kUnsupported && error.code() != ErrorCode::kInvalidArgument) throw;
        why_end_to_end = error.what();
      }
    }
    CheckReport report = check_layer(subject, CheckDepth::kEndToEnd);
    report.why_end_to_end = why_end_to_end;
    return report;
  }

  /// The arithmetic peak of a case: that of its own operands, or of what its plan says that it uses; else the
  /// best float32 peak.
  std::optional<Ceiling> peak_for(const Testbed& testbed, const PreparedLayers& prepared,
                                  const LayerPlan& plan, const MachineReport& machine,
                                  const BenchCase& bench_case) {
    const auto key = std::tuple(&testbed, bench_case.model, bench_case.activations);
    auto known = operand_peaks_.find(key);
    if (known == operand_peaks_.end()) {
      constexpr int64_t kRows = 256;
      const std::vector<Bf16> decoded = stage_and_decode(
          bench_case.activations, inputs_.x_view().rows_from(0, std::min(kRows, inputs_.tokens)));
      known = operand_peaks_.emplace(key, testbed.operand_peak({&prepared.weights, decoded})).first;
    }
    if (known->second) return known->second;
    std::optional<Ceiling> best;
    for (const Ceiling& peak : machine.peaks) {
      if (!peak.per_second) continue;
      if (peak.name == plan.arithmetic) return peak;
      if (peak.name.starts_with("f32") && (!best || *peak.per_second > *best->per_second)) best = peak;
    }
    return best;
  }

  const BenchRequest& request_;
  const BenchListener& listener_;
  int all_threads_;
  LayerInputs inputs_;
  std::map<const Memory*, std::unique_ptr<Testbed>> testbeds_;
  std::map<std::pair<const Testbed*, int>, MachineReport> machines_;
  std::map<std::tuple<const Testbed*, std::string, ActivationFormat>, std::optional<Ceiling>> operand_peaks_;
};

}  // namespace

std::string BenchCase::name() const {
  return fmt::format("{}/{}/{}", backend, model, tokens);
}

BenchWork work_of(const BenchCase& bench_case, const RoutingRotation& rotation) {
  BenchWork work;
  const auto steps = static_cast<double>(rotation.steps.size());
  const auto hidden = static_cast<double>(bench_case.hidden),
             intermediate = static_cast<double>(bench_case.intermediate);
  for (const RoutingStep& step : rotation.steps) {
    work.experts_hit += static_cast<double>(step.experts_hit()) / steps;
    work.rows += static_cast<double>(step.rows()) / steps;
  }
  work.weight_bytes =
      work.experts_hit * static_cast<double>(weight_bytes_of(1, bench_case.hidden, bench_case.intermediate));
  work.bytes = work.weight_bytes + 2.0 * 2.0 * static_cast<double>(bench_case.tokens) * hidden;
  const double terms = bench_case.activations == ActivationFormat::kNvfp4x2 ? 2.0 : 1.0;
  work.operations = 2.0 * terms * work.rows * 3.0 * hidden * intermediate;
  return work;
}

Floor floor_of(const BenchWork& work, double bytes_per_second, std::optional<double> operations_per_second) {
  const double memory = bytes_per_second > 0.0 ? work.bytes / bytes_per_second : 0.0;
  const double arithmetic = operations_per_second ? work.operations / *operations_per_second : 0.0;
  return {std::max(memory, arithmetic), memory >= arithmetic};
}

void run_bench(const BenchRequest& request, const BenchListener& listener) {
  BenchRun(request, listener).run();
}

}  // namespace fourfold
