#include "tools/stress.h"

#include <fmt/format.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

#include "base/fail.h"
#include "fourfold/reference.h"
#include "tools/exit_codes.h"
#include "tools/layer_trace.h"
#include "tools/layertest.h"
#include "tools/stress_call.h"
#include "tools/stress_ranks.h"
#include "tools/terminal.h"
#include "tools/testbed.h"

namespace fourfold {
namespace {

constexpr int kRepeats = 20;
constexpr int kSideBySide = 4;
constexpr int kRounds = 5;       // of repeats side by side, their outputs compared after each
constexpr int64_t kPadding = 8;  // 16 bytes of bf16: rows stay aligned

/// Thrown where a case does not apply.
struct LeftOut {
  std::string why;
};

/// "" where two outputs are the same to the last bit; else where they first differ.
std::string difference(const CallOutput& expected, const CallOutput& found, int64_t hidden,
                       int64_t element = 2) {
  if (!found.trespass.empty()) return found.trespass;
  if (expected.status != found.status) {
    return fmt::format("status: expected {}, found {}", expected.status, found.status);
  }
  const auto at = std::mismatch(expected.y.begin(), expected.y.end(), found.y.begin(), found.y.end());
  if (at.first == expected.y.end()) return "";
  const int64_t index = (at.first - expected.y.begin()) / element;
  return fmt::format("token {}, column {}: other bits", index / hidden, index % hidden);
}

double norm(const std::vector<float>& values) {
  double sum = 0.0;
  for (const float value : values) sum += double{value} * double{value};
  return std::sqrt(sum);
}

/// The cases on one layer; each gives what it found wrong, or nothing.
class LayerStress {
 public:
  LayerStress(const StressRequest& request, const StressSubject& subject)
      : backend_(*request.backend), subject_(subject), memory_(backend_.memory()) {}

  using Case = std::string (LayerStress::*)();
  struct Named {
    const char* name;
    Case run;
  };
  static std::span<const Named> cases() {
    static constexpr Named kCases[] = {
        {"against the reference", &LayerStress::as_it_is},
        {"poisoned padding", &LayerStress::poisoned_padding},
        {"poisoned workspace", &LayerStress::poisoned_workspace},
        {"20 repeats", &LayerStress::repeats},
        {"empty experts", &LayerStress::empty_experts},
        {"all to one expert", &LayerStress::all_to_one},
        {"one token", &LayerStress::one_token},
        {"no tokens", &LayerStress::no_tokens},
        {"some ids -1", &LayerStress::some_absent},
        {"all ids -1", &LayerStress::all_absent},
        {"ids out of range", &LayerStress::out_of_range},
        {"int64 ids", &LayerStress::wide_ids},
        {"float32 output", &LayerStress::float_output},
        {"calls side by side", &LayerStress::side_by_side},
        {"graph replay", &LayerStress::graph_replay},
        {"thread counts", &LayerStress::thread_counts},
        {"tensor parallel", &LayerStress::tensor_parallel},
        {"expert parallel", &LayerStress::expert_parallel},
    };
    return kCases;
  }

  StressCase run(const Named& named) {
    StressCase result{named.name, subject_.name, StressCase::State::kOk, ""};
    try {
      if (layer_ == nullptr) prepare();
      result.text = (this->*named.run)();
      if (!result.text.empty()) result.state = StressCase::State::kFailed;
    } catch (const LeftOut& left_out) {
      result.state = StressCase::State::kLeftOut;
      result.text = left_out.why;
    } catch (const Error& error) {
      result.state = StressCase::State::kFailed;
      result.text = error.what();
    }
    return result;
  }

 private:
  void prepare() {
    const std::string why = backend_.why_unsupported(subject_.weights, subject_.config, subject_.options);
    if (!why.empty()) throw LeftOut{"not on this backend: " + why};
    auto layer = backend_.make_layer(subject_.weights, subject_.config, subject_.options);
    plain_ = call_layer(*layer, memory_, subject_.inputs, {});
    layer_ = std::move(layer);  // complete, or else prepared again for the next case
  }

  CallOutput call(const LayerInputs& inputs, const CallSettings& settings = {}) const {
    return call_layer(*layer_, memory_, inputs, settings);
  }
  std::string differs(const CallOutput& expected, const CallOutput& found) const {
    return difference(expected, found, subject_.config.hidden);
  }

  /// The kernel's findings of layertest, stage by stage.
  std::string against_reference(const StressSubject& subject, const LayerInputs& inputs) const {
    LayertestRequest request;
    request.nvfp4 = &subject.weights;
    request.expert_ids = subject.expert_ids;
    request.config = subject.config;
    request.options = subject.options;
    request.backend = &backend_;
    request.inputs = &inputs;
    request.explains = false;
    for (const std::string& finding : run_layertest(request).findings) {
      if (finding.starts_with("kernel: ")) return finding.substr(8);
    }
    return "";
  }

  /// The inputs with their ids replaced.
  template <class Change>
  LayerInputs with_ids(Change change) const {
    LayerInputs inputs = subject_.inputs;
    for (size_t slot = 0; slot < inputs.topk_ids.size(); ++slot) {
      inputs.topk_ids[slot] = change(slot, inputs.topk_ids[slot]);
    }
    return inputs;
  }
  LayerInputs first_tokens(int64_t tokens) const {
    LayerInputs inputs = subject_.inputs;
    inputs.tokens = tokens;
    inputs.x.resize(static_cast<size_t>(tokens * inputs.hidden));
    inputs.topk_ids.resize(static_cast<size_t>(tokens * inputs.top_k));
    inputs.topk_weights.resize(static_cast<size_t>(tokens * inputs.top_k));
    return inputs;
  }

  std::string as_it_is() {
    if (!plain_.trespass.empty()) return plain_.trespass;
    if (plain_.status != 0) return fmt::format("status: expected 0, found {}", plain_.status);
    return against_reference(subject_, subject_.inputs);
  }

  std::string poisoned_padding() { return differs(plain_, call(subject_.inputs, {.padding = kPadding})); }

  std::string poisoned_workspace() {
    for (const uint8_t byte :
         std::initializer_list<uint8_t>{0xFF, 0x7F, 0x3C}) {  // NaN of every format; NaN of e4m3; numbers
      const std::string found = differs(plain_, call(subject_.inputs, {.workspace_byte = byte}));
      if (!found.empty()) return fmt::format("workspace full of {:#04x}: {}", byte, found);
    }
    return "";
  }

  std::string repeats() {
    StressCall again(*layer_, memory_, subject_.inputs.tokens, {});
    for (int repeat = 1; repeat <= kRepeats; ++repeat) {
      again.set(subject_.inputs);
      again.enqueue(nullptr);
      const std::string found = differs(plain_, again.output());
      if (!found.empty()) return fmt::format("repeat {}: {}", repeat, found);
    }
    return "";
  }

  std::string empty_experts() {
    if (subject_.config.experts < 2) throw LeftOut{"the layer has one expert"};
    const auto half = static_cast<int32_t>((subject_.config.experts + 1) / 2);
    return against_reference(subject_, with_ids([&](size_t, int32_t id) { return id < 0 ? id : id % half; }));
  }

  std::string all_to_one() {
    const auto last = static_cast<int32_t>(subject_.config.experts - 1);
    return against_reference(subject_, with_ids([&](size_t, int32_t) { return last; }));
  }

  std::string one_token() { return against_reference(subject_, with_first_id(first_tokens(1))); }

  /// A token that goes somewhere.
  static LayerInputs with_first_id(LayerInputs inputs) {
    inputs.topk_ids.front() = std::max(inputs.topk_ids.front(), 0);
    return inputs;
  }

  std::string no_tokens() { return call(first_tokens(0)).trespass; }

  std::string some_absent() {
    return against_reference(
        subject_, with_ids([](size_t slot, int32_t id) { return slot % 3 == 1 ? -1 : std::max(id, 0); }));
  }

  std::string all_absent() {
    const LayerInputs inputs = with_ids([](size_t, int32_t) { return -1; });
    const CallOutput found = call(inputs);
    if (!found.trespass.empty()) return found.trespass;
    const auto reference =
        reference_backend().make_layer(subject_.weights, subject_.config, subject_.options);
    return compare_values(call_layer(*reference, host_memory(), inputs).values(false), found.values(false),
                          kKernelLimit);
  }

  std::string out_of_range() {
    const auto far = static_cast<int32_t>(subject_.config.experts);
    const auto every_third = [&](int32_t bad) {
      return with_ids([=](size_t slot, int32_t id) { return slot % 3 == 0 ? bad : id; });
    };
    CallOutput expected = call(every_third(-1));
    expected.status |= kStatusExpertOutOfRange;
    return differs(expected, call(every_third(far)));
  }

  std::string wide_ids() { return differs(plain_, call(subject_.inputs, {.wide_ids = true})); }

  /// Rounded, it is the bf16 output.
  std::string float_output() {
    CallOutput found = call(subject_.inputs, {.float_output = true});
    const std::vector<float> values = found.values(true);
    std::vector<Bf16> rounded(values.size());
    std::transform(values.begin(), values.end(), rounded.begin(), encode_bf16);
    const auto bytes = std::as_bytes(std::span(rounded));
    found.y.assign(bytes.begin(), bytes.end());
    return differs(plain_, found);
  }

  /// Calls of different inputs on one layer, each with buffers of its own.
  std::string side_by_side() {
    std::vector<LayerInputs> inputs;
    std::vector<std::unique_ptr<StressCall>> calls;
    std::vector<LayerCall> enqueue;
    for (int i = 0; i < kSideBySide; ++i) {
      const auto experts = static_cast<int32_t>(subject_.config.experts);
      inputs.push_back(with_ids([&](size_t, int32_t id) { return id < 0 ? id : (id + i) % experts; }));
      std::rotate(inputs.back().x.begin(), inputs.back().x.begin() + i, inputs.back().x.end());
      calls.push_back(std::make_unique<StressCall>(*layer_, memory_, subject_.inputs.tokens, CallSettings{}));
      enqueue.emplace_back(
          [call = calls.back().get()](void* stream, StageObserver*) { call->enqueue(stream); });
    }
    std::vector<CallOutput> alone;
    for (const LayerInputs& one : inputs) alone.push_back(call(one));
    const auto testbed = make_testbed(backend_);
    for (int round = 0; round < kRounds; ++round) {
      for (size_t i = 0; i < calls.size(); ++i) calls[i]->set(inputs[i]);
      testbed->run_side_by_side(enqueue, kRepeats / kRounds);
      for (size_t i = 0; i < calls.size(); ++i) {
        const std::string found = differs(alone[i], calls[i]->output());
        if (!found.empty()) return fmt::format("call {} of {}: {}", i + 1, kSideBySide, found);
      }
    }
    return "";
  }

  /// Captured once, replayed with other inputs at the same addresses.
  std::string graph_replay() {
    StressCall captured(*layer_, memory_, subject_.inputs.tokens, {});
    captured.set(subject_.inputs);
    const auto replay =
        make_testbed(backend_)->capture([&](void* stream, StageObserver*) { captured.enqueue(stream); });
    if (!replay) throw LeftOut{"not on this backend: it has no graphs"};
    const LayerInputs others = with_ids([](size_t, int32_t id) { return id > 0 ? id - 1 : id; });
    for (const LayerInputs* inputs : {&subject_.inputs, &others}) {
      captured.set(*inputs);
      replay();
      const std::string found = differs(call(*inputs), captured.output());
      if (!found.empty()) return found;
    }
    return "";
  }

  std::string thread_counts() {
    if (memory_.device() != Device::host()) throw LeftOut{"not on this backend: it computes on a GPU"};
    const struct Restored {
      int threads = omp_get_max_threads();
      ~Restored() { omp_set_num_threads(threads); }
    } before;
    for (const int threads : std::set<int>{1, 2, 3, before.threads + 1}) {
      omp_set_num_threads(threads);
      const std::string found = differs(plain_, call(subject_.inputs));
      if (!found.empty()) return fmt::format("{} threads: {}", threads, found);
    }
    return "";
  }

  std::string tensor_parallel() {
    std::string why_none;
    StressSubject whole = subject_;
    whole.options = tensor_parallel_options();
    bool is_tested = false;
    for (const int64_t degree : {2, 3, 4, 5, 7}) {
      const std::string why = why_not_tensor_parallel(whole, degree);
      if (!why.empty()) {
        if (why_none.empty()) why_none = why;
        continue;
      }
      std::vector<StressSubject> ranks;
      for (int64_t rank = 0; rank < degree; ++rank)
        ranks.push_back(tensor_parallel_rank(whole, rank, degree));
      const std::string found = sum_of_ranks(whole, ranks, {});
      if (!found.empty()) return fmt::format("degree {}: {}", degree, found);
      is_tested = true;
    }
    if (!is_tested) throw LeftOut{why_none};
    return "";
  }

  /// A scale of the intermediate that follows the data would be another one on each rank.
  LayerOptions tensor_parallel_options() const {
    const LayerOptions& options = subject_.options;
    const bool follows_data =
        is_nvfp4(options.activations) && (options.intermediate_scale == ScalePolicy::kDynamicToken ||
                                          options.intermediate_scale == ScalePolicy::kDynamicTensor);
    const bool follows_rows = follows_data || options.activations == ActivationFormat::kFp8;
    return follows_rows ? with_bf16_activations(options) : options;
  }

  std::string expert_parallel() {
    const int64_t experts = subject_.config.experts;
    if (experts < 2) throw LeftOut{"the layer has one expert"};
    StressSubject whole = subject_;
    if (whole.options.x_scale != ScalePolicy::kStatic) whole.options.x_scale = ScalePolicy::kDynamicToken;
    if (whole.options.intermediate_scale != ScalePolicy::kStatic) {
      whole.options.intermediate_scale = ScalePolicy::kDynamicToken;
    }
    const int64_t ranks_wanted = std::min<int64_t>(3, experts);  // of unequal size where they don't divide
    std::vector<StressSubject> ranks;
    std::vector<std::vector<int32_t>> maps;
    for (int64_t rank = 0; rank < ranks_wanted; ++rank) {
      const int64_t first = rank * experts / ranks_wanted, end = (rank + 1) * experts / ranks_wanted;
      ranks.push_back(expert_parallel_rank(whole, first, end - first));
      maps.push_back(local_expert_range(first, end - first, experts));
    }
    return sum_of_ranks(whole, ranks, maps);
  }

  /// Float32 outputs of the ranks, added up, against the whole layer's. Each side rounds z to bf16, at
  /// most 2^-9 of every part; four times that, for sums in another order.
  std::string sum_of_ranks(const StressSubject& whole, const std::vector<StressSubject>& ranks,
                           const std::vector<std::vector<int32_t>>& maps) const {
    const auto run = [&](const StressSubject& subject, const CallSettings& settings) {
      const std::string why = backend_.why_unsupported(subject.weights, subject.config, subject.options);
      if (!why.empty()) throw LeftOut{"not on this backend: " + why};
      const auto layer = backend_.make_layer(subject.weights, subject.config, subject.options);
      return call_layer(*layer, memory_, subject.inputs, settings).values(true);
    };
    const std::vector<float> expected = run(whole, {.float_output = true});
    std::vector<float> sum(expected.size(), 0.0f);
    double norms = norm(expected);
    for (size_t rank = 0; rank < ranks.size(); ++rank) {
      CallSettings settings{.float_output = true};
      if (!maps.empty()) settings.local_experts = maps[rank];
      const std::vector<float> part = run(ranks[rank], settings);
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += part[i];
      norms += norm(part);
    }
    return compare_values(expected, sum, 0x1p-7 * norms / std::max(norm(expected), 1e-30));
  }

  std::string compare_values(const std::vector<float>& expected, const std::vector<float>& found,
                             double limit) const {
    const auto rows = static_cast<int64_t>(expected.size()) / subject_.config.hidden;
    const auto view = [&](const std::vector<float>& values) {
      return MatrixView<const float>(values.data(), rows, subject_.config.hidden);
    };
    const Comparison comparison = compare(view(expected), view(found));
    if (comparison.rel_l2 <= limit) return "";
    return fmt::format("relative L2 {:.3g} above {:.3g}, worst token {}", comparison.rel_l2, limit,
                       comparison.worst_row);
  }

  const Backend& backend_;
  const StressSubject& subject_;
  const Memory& memory_;
  std::unique_ptr<MoeLayer> layer_;
  CallOutput plain_;
};

}  // namespace

StressReport run_stress(const StressRequest& request) {
  StressReport report;
  report.backend = request.backend->name();
  for (const StressSubject& subject : request.subjects) {
    LayerStress stress(request, subject);
    for (const LayerStress::Named& named : LayerStress::cases()) {
      request.progress(fmt::format("{}: {}", subject.name, named.name));
      report.cases.push_back(stress.run(named));
    }
  }
  return report;
}

int exit_code_of(const StressReport& report) {
  const bool failed = std::any_of(
      report.cases.begin(), report.cases.end(),
      [](const StressCase& stress_case) { return stress_case.state == StressCase::State::kFailed; });
  return failed ? kExitFinding : kExitFine;
}

std::string format_stress_table(const StressReport& report) {
  using State = StressCase::State;
  std::string text = fmt::format("backend      {}\n\n", report.backend);
  size_t failures = 0, names = 0;
  std::set<std::string> seen;
  for (const StressCase& first : report.cases) {
    if (!seen.insert(first.name).second) continue;
    ++names;
    size_t fine = 0, failed = 0;
    std::string left_out, lines;
    for (const StressCase& one : report.cases) {
      if (one.name != first.name) continue;
      fine += one.state == State::kOk;
      if (one.state == State::kLeftOut) left_out = one.text;
      if (one.state != State::kFailed) continue;
      ++failed;
      lines += red(fmt::format("  FAILED  {:<22} {}: {}", one.name, one.layer, printable(one.text))) + "\n";
    }
    failures += failed > 0;
    text += lines;
    if (failed > 0) continue;
    text += fine > 0 ? fmt::format("  ok      {:<22} {} layer{}{}\n", first.name, fine, fine == 1 ? "" : "s",
                                   left_out.empty() ? "" : "; not all: " + printable(left_out))
                     : fmt::format("  -       {:<22} {}\n", first.name, printable(left_out));
  }
  return text + "\n" +
         (failures == 0
              ? bold(green("verdict: fine")) + fmt::format(": none of {} cases failed\n", names)
              : bold(red("verdict: kernel")) + fmt::format(": {} of {} cases failed\n", failures, names));
}

std::string format_stress_json(const StressReport& report) {
  nlohmann::ordered_json json = {{"verdict", exit_code_of(report) == kExitFine ? "fine" : "kernel"},
                                 {"backend", report.backend},
                                 {"cases", nlohmann::ordered_json::array()}};
  constexpr const char* kStates[] = {"ok", "failed", "left out"};
  for (const StressCase& one : report.cases) {
    json["cases"].push_back({{"name", one.name},
                             {"layer", one.layer},
                             {"state", kStates[static_cast<size_t>(one.state)]},
                             {"text", one.text}});
  }
  return json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

}  // namespace fourfold
