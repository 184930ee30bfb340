#include "tools/candidate_test.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/fail.h"
#include "diagnosis/replay.h"
#include "fourfold/scale_layout.h"
#include "tools/candidate_file.h"
#include "tools/explanation.h"

namespace fourfold {
namespace {

using diagnosis::Candidate;
using diagnosis::Subject;
using diagnosis::Verdict;

/// Of the first look at where the error sits.
constexpr double kMapWork = 4e9;
constexpr int64_t kMappedTokens = 256;
constexpr int64_t kScatterPoints = 1024;

[[noreturn]] void bad_tensor(const DumpedTensor& tensor, const std::string& name,
                             const std::string& expected) {
  fail(ErrorCode::kBadFile, "{}: tensor '{}': expected {}, found {}", tensor.file, name, expected,
       tensor.describe());
}

/// Rows of a tensor whose last dimension is `width`: leading dimensions (batch, sequence) count as one.
int64_t rows_of_width(const DumpedTensor& tensor, const std::string& name, int64_t width,
                      const std::string& shape) {
  if (tensor.shape.empty() || tensor.shape.back() != width) bad_tensor(tensor, name, shape);
  return std::accumulate(tensor.shape.begin(), tensor.shape.end() - 1, int64_t{1}, std::multiplies<>());
}

class CandidateTest {
 public:
  explicit CandidateTest(const CandidateRequest& request) : request_(request) {}

  CandidateReport run() {
    read_files();
    LayerInputs inputs = make_layer_inputs();
    loaded_.emplace(request_.source, std::move(inputs));
    report_.model = loaded_->model().empty() ? "unknown" : loaded_->model();
    report_.layer = request_.source.layer;
    report_.notes = loaded_->layer().notes;
    for (const std::string& note : loaded_->notes()) report_.notes.push_back(note);
    const Candidate candidate = make_candidate();
    add_facts();
    look_at_staging(candidate);
    look_at_routing();
    diagnosis::MatcherOptions options;
    options.stagings = stagings();
    options.progress = request_.progress;
    report_.experts = diagnose(subject(), candidate, options);
    map_error(candidate);
    report_.explanations = reported_explanations(report_.experts);
    judge(candidate);
    return std::move(report_);
  }

 private:
  const Subject& subject() const { return loaded_->subject(); }
  void fact(const std::string& label, const std::string& text) { report_.facts.emplace_back(label, text); }

  void read_files() {
    for (const std::string& file : request_.candidate) {
      std::vector<std::string> names;
      for (auto& [name, tensor] : read_dumped_tensors(file)) {
        names.push_back(name);
        if (!tensors_.try_emplace(name, std::move(tensor)).second) {
          fail(ErrorCode::kBadFile,
               "{}: expected tensors that the files before it have not, found '{}' again", file, name);
        }
      }
      fact("candidate", fmt::format("{}: {}", file, fmt::join(names, ", ")));
    }
    if (!request_.input.empty()) {
      for (auto& [name, tensor] : read_dumped_tensors(request_.input))
        tensors_.try_emplace(name, std::move(tensor));
    }
    for (const auto& [name, tensor] : tensors_) {
      static const std::vector<std::string> kKnown = {
          "x",          "output",  "topk_ids", "topk_weights",     "token_ids",        "h",
          "activation", "x_codes", "x_scales", "activation_codes", "activation_scales"};
      if (std::find(kKnown.begin(), kKnown.end(), name) == kKnown.end()) {
        report_.notes.push_back(
            fmt::format("tensor '{}' is not looked at; known are {}", name, fmt::join(kKnown, ", ")));
      }
    }
  }

  const DumpedTensor* find(const std::string& name) const {
    const auto found = tensors_.find(name);
    return found == tensors_.end() ? nullptr : &found->second;
  }

  const DumpedTensor& need(const std::string& name, const std::string& why) const {
    if (const DumpedTensor* tensor = find(name)) return *tensor;
    fail(ErrorCode::kNotFound, "{}: expected a tensor '{}' ({}), found none{}",
         fmt::join(request_.candidate, ", "), name, why,
         name == "x" && request_.input.empty() ? "; give --input if it lies in another file" : "");
  }

  LayerInputs make_layer_inputs() {
    const DumpedTensor& x = need("x", "what goes into the MoE layer, [T, H]");
    LayerInputs inputs;
    if (x.shape.empty()) bad_tensor(x, "x", "[T, H]");
    inputs.hidden = x.shape.back();
    inputs.tokens = rows_of_width(x, "x", inputs.hidden, "[T, H]");
    if (inputs.tokens < 1 || inputs.hidden < 1) bad_tensor(x, "x", "at least one token");
    for (const float value : x.floats("x")) {
      if (!std::isfinite(value))
        fail(ErrorCode::kBadFile,
             "{}: tensor 'x': expected finite numbers, found {}: look at what comes before this layer",
             x.file, value);
      inputs.x.push_back(encode_bf16(value));
    }
    inputs.x_origin = x.file;
    read_routing(inputs);
    if (const DumpedTensor* ids = find("token_ids")) {
      inputs.token_ids = ids->integers("token_ids");
      if (static_cast<int64_t>(inputs.token_ids.size()) != inputs.tokens)
        bad_tensor(*ids, "token_ids", fmt::format("[{}]", inputs.tokens));
    }
    return inputs;
  }

  void read_routing(LayerInputs& inputs) const {
    const DumpedTensor *ids = find("topk_ids"), *weights = find("topk_weights");
    if (!ids && !weights) return;
    if (!ids || !weights) {
      fail(ErrorCode::kBadFile, "{}: expected topk_ids and topk_weights together, found {} alone",
           fmt::join(request_.candidate, ", "), ids ? "topk_ids" : "topk_weights");
    }
    const std::string shape = fmt::format("[{}, K]", inputs.tokens);
    if (ids->shape.size() < 2 || ids->shape.back() < 1) bad_tensor(*ids, "topk_ids", shape);
    inputs.top_k = ids->shape.back();
    if (rows_of_width(*ids, "topk_ids", inputs.top_k, shape) != inputs.tokens)
      bad_tensor(*ids, "topk_ids", shape);
    if (weights->shape != ids->shape)
      bad_tensor(*weights, "topk_weights", fmt::format("the shape of topk_ids, {}", ids->describe()));
    for (const int64_t id : ids->integers("topk_ids")) {
      if (id < kAbsentExpert || id > INT32_MAX)
        fail(ErrorCode::kBadFile, "{}: tensor 'topk_ids': expected expert numbers (or -1), found {}",
             ids->file, id);
      inputs.topk_ids.push_back(static_cast<int32_t>(id));
    }
    inputs.topk_weights = weights->floats("topk_weights");
    for (const float weight : inputs.topk_weights) {
      if (!std::isfinite(weight))
        fail(ErrorCode::kBadFile,
             "{}: tensor 'topk_weights': expected finite numbers, found {}: the router is at fault",
             weights->file, weight);
    }
    inputs.routing_origin = ids->file;
  }

  Candidate make_candidate() const {
    const int64_t tokens = subject().tokens, slots = tokens * subject().top_k;
    const DumpedTensor& output = need("output", "what the MoE layer gave, [T, H]");
    const std::string shape = fmt::format("[{}, {}] as x", tokens, subject().hidden());
    if (rows_of_width(output, "output", subject().hidden(), shape) != tokens)
      bad_tensor(output, "output", shape);
    Candidate candidate;
    candidate.output = output.floats("output");
    const auto read_stage = [&](const char* name, int64_t width, std::vector<float>& to) {
      const DumpedTensor* stage = find(name);
      if (!stage) return;
      const std::string due =
          fmt::format("[{}, {}]: a row a (token, k), in the order of topk_ids", slots, width);
      if (rows_of_width(*stage, name, width, due) != slots) bad_tensor(*stage, name, due);
      to = stage->floats(name);
    };
    read_stage("h", subject().config.h_columns(), candidate.h);
    read_stage("activation", subject().intermediate(), candidate.activation);
    return candidate;
  }

  void add_facts() {
    fact("model",
         fmt::format("{}, layer {}: {} experts, hidden {}, intermediate {}", report_.model, report_.layer,
                     subject().experts(), subject().hidden(), subject().intermediate()));
    fact("weights", fmt::format("{}: {}, {}", request_.source.checkpoint, loaded_->layer().scheme,
                                loaded_->layer().naming));
    fact("activation", describe(subject().config.activation));
    fact("input", fmt::format("{} tokens, x: {}; routing: {}", subject().tokens, loaded_->inputs().x_origin,
                              loaded_->inputs().routing_origin));
  }

  std::vector<diagnosis::Staging> stagings() const {
    std::vector<diagnosis::Staging> all = plausible_stagings(subject());
    if (request_.activation_format == "auto") return all;
    diagnosis::Staging asked;
    if (request_.activation_format == "fp8") asked.format = ActivationFormat::kFp8;
    if (request_.activation_format.starts_with("nvfp4-")) {
      asked = {ActivationFormat::kNvfp4, *parse_scale_policy(request_.activation_format.substr(6))};
    }
    if (std::find(all.begin(), all.end(), asked) == all.end()) {
      reject(fmt::format("--activation-format {}", request_.activation_format),
             "an input_scale for every expert, and sizes in blocks of 16", "a layer without them");
    }
    return {asked};
  }

  void look_at_routing() {
    if (!subject().routing_given) {
      report_.routing_left_out =
          "the candidate has no topk_ids and topk_weights: the checkpoint's router is taken for the engine's";
    } else if (!subject().router) {
      report_.routing_left_out = fmt::format("no router to compare with: {}", loaded_->why_no_router());
    } else {
      report_.routing = diagnose_routing(subject());
    }
  }

  void look_at_staging(const Candidate& candidate) {
    const auto look = [&](const std::string& what, const std::vector<float>& values, int64_t width) {
      const DumpedTensor *codes = find(what + "_codes"), *scales = find(what + "_scales");
      if (!codes && !scales) return;
      need(what + "_codes", "beside its scales");
      need(what + "_scales", "beside its codes");
      report_.staged.push_back(compare_staged(what, values, width, *codes, *scales));
    };
    look("x", {subject().x.begin(), subject().x.end()}, subject().hidden());
    if (candidate.activation.empty() && find("activation_codes"))
      need("activation", "what activation_codes were quantized from");
    look("activation", candidate.activation, subject().intermediate());
  }

  void map_error(const Candidate& candidate) {
    for (const float value : candidate.output) report_.not_finite += !std::isfinite(value);
    const double work = 3.0 * static_cast<double>(subject().top_k) * static_cast<double>(subject().hidden()) *
                        static_cast<double>(subject().intermediate());
    const int64_t count = std::clamp(static_cast<int64_t>(kMapWork / work), int64_t{1},
                                     std::min(kMappedTokens, subject().tokens));
    std::vector<int64_t> tokens;
    for (int64_t i = 0; i < count; ++i) tokens.push_back(i * subject().tokens / count);
    diagnosis::Replay replay(subject(), tokens);
    const diagnosis::Stages found = sample(candidate, subject(), tokens);
    const diagnosis::Staging staging = likely_staging(replay, found);
    const diagnosis::Stages due = replay.run({}, staging);
    report_.mapped_tokens = count;
    report_.map = map_errors(subject(), tokens, found.output, due.output, report_.experts.sound.limit);
    compare_stages(replay, found, staging);
    draw(replay, found.output, due.output);
  }

  /// How the engine stages, where a fault makes it hard to tell: as explained, else as the first stage that
  /// it gave fits best.
  diagnosis::Staging likely_staging(diagnosis::Replay& replay, const diagnosis::Stages& found) {
    const diagnosis::Diagnosis& experts = report_.experts;
    if (experts.verdict == Verdict::kExplained) return experts.best->staging;
    diagnosis::Staging likely = experts.sound.staging;
    if (found.h.empty()) return likely;
    double least = INFINITY;
    for (const diagnosis::Staging& staging : stagings()) {
      const double distance =
          fit({found.h, {}, {}}, replay.run({}, staging), static_cast<int64_t>(replay.tokens().size()))
              .distance;
      if (distance < least) likely = staging;
      least = std::min(least, distance);
    }
    return likely;
  }

  void compare_stages(diagnosis::Replay& replay, const diagnosis::Stages& found,
                      const diagnosis::Staging& staging) {
    const diagnosis::Stages due = replay.run_after(found, staging);
    const diagnosis::Stages other = replay.run({}, staging, diagnosis::Rounding::kFused);
    const diagnosis::Stages specified = replay.run({}, staging);
    const auto compare = [&](const char* name, std::vector<float> diagnosis::Stages::*stage) {
      if ((found.*stage).empty()) return;
      const auto alone = [&](const diagnosis::Stages& stages) {
        diagnosis::Stages one;
        one.output = stages.*stage;
        return one;
      };
      const auto count = static_cast<int64_t>(replay.tokens().size());
      report_.stages.push_back(
          {name, fit(alone(found), alone(due), count).distance,
           diagnosis::kNoiseMargin * fit(alone(specified), alone(other), count).distance});
    };
    compare("h", &diagnosis::Stages::h);
    compare("activation", &diagnosis::Stages::activation);
    compare("output", &diagnosis::Stages::output);
  }

  /// Errors by token, and the worst one's columns, against the layer as it should be and as it is explained.
  void draw(diagnosis::Replay& replay, const std::vector<float>& found, const std::vector<float>& due) {
    const diagnosis::Diagnosis& experts = report_.experts;
    report_.charts.block_scales = block_scale_histograms(*subject().weights);
    report_.charts.errors.push_back(error_histogram("no fault", found, due));
    const int64_t worst = worst_row(found, due);
    report_.charts.worst_token = scatter(replay.tokens(), worst, found, due, "reference");
    if (experts.verdict != Verdict::kExplained) return;
    diagnosis::Deviation deviation;
    for (const diagnosis::Fault& fault : experts.best->faults) fault.apply_to(deviation);
    const std::vector<float> explained = replay.run(deviation, experts.best->staging).output;
    report_.charts.errors.push_back(error_histogram("best explanation", found, explained));
    report_.explained_token = scatter(replay.tokens(), worst, found, explained, "reference with the fault");
  }

  double row_distance(const std::vector<float>& found, const std::vector<float>& due, int64_t row) const {
    double difference = 0.0, norm = 0.0;
    for (int64_t i = row * subject().hidden(); i < (row + 1) * subject().hidden(); ++i) {
      const double a = found[static_cast<size_t>(i)], b = due[static_cast<size_t>(i)];
      difference += (a - b) * (a - b);
      norm += b * b;
    }
    return difference == 0.0 ? 0.0 : std::sqrt(difference / norm);
  }

  Histogram error_histogram(const std::string& name, const std::vector<float>& found,
                            const std::vector<float>& due) const {
    Histogram histogram{name, 10.0, -6.0, 0.25, std::vector<int64_t>(28)};
    for (int64_t row = 0; row < report_.mapped_tokens; ++row) histogram.add(row_distance(found, due, row));
    return histogram;
  }

  int64_t worst_row(const std::vector<float>& found, const std::vector<float>& due) const {
    int64_t worst = 0;
    for (int64_t row = 1; row < report_.mapped_tokens; ++row) {
      if (!(row_distance(found, due, row) <= row_distance(found, due, worst))) worst = row;
    }
    return worst;
  }

  TokenScatter scatter(const std::vector<int64_t>& tokens, int64_t row, const std::vector<float>& found,
                       const std::vector<float>& due, const std::string& reference) const {
    const int64_t hidden = subject().hidden(), step = (hidden + kScatterPoints - 1) / kScatterPoints;
    TokenScatter points{reference, "candidate", tokens[static_cast<size_t>(row)], hidden, {}, {}};
    for (int64_t i = row * hidden; i < (row + 1) * hidden; i += step) {
      points.reference.push_back(due[static_cast<size_t>(i)]);
      points.candidate.push_back(found[static_cast<size_t>(i)]);
    }
    return points;
  }

  /// An output of zeros alone, and no stage before it: whatever underflows does that, and so does nothing.
  static bool is_nothing(const Candidate& candidate) {
    return candidate.h.empty() && candidate.activation.empty() &&
           std::all_of(candidate.output.begin(), candidate.output.end(), [](float v) { return v == 0.0f; });
  }

  void judge(const Candidate& candidate) {
    const diagnosis::Diagnosis& experts = report_.experts;
    const bool is_routed_well = !report_.routing || report_.routing->verdict == Verdict::kFine;
    const auto wrongly_staged = std::find_if(report_.staged.begin(), report_.staged.end(),
                                             [](const StagedReport& staged) { return !staged.is_right(); });
    if (experts.verdict != Verdict::kFine && is_nothing(candidate)) {
      say("unexplained",
          "the output is zero everywhere: nothing was written to it, or everything underflowed; "
          "zeros can't tell one fault from another",
          "whether the hook ran after the layer, and whether any expert was computed; "
          "a dump of h tells more");
    } else if (experts.verdict == Verdict::kExplained && !is_routed_well && factor_cancels()) {
      say("fine",
          "the routed scaling factor is applied after the experts instead of in the routing weights: the "
          "same",
          "");
    } else if (experts.verdict == Verdict::kExplained) {
      std::string remedy;
      for (const diagnosis::Fault& fault : experts.best->faults)
        remedy += (remedy.empty() ? "" : "; ") + fault.remedy;
      say(std::string(to_string(experts.best->faults.front().place)), experts.best->sentence(), remedy);
    } else if (!is_routed_well) {
      const auto& routing = *report_.routing;
      const bool explained = routing.verdict == Verdict::kExplained;
      say("routing",
          explained ? routing.best->sentence
                    : "ids and weights are not the router's, and none of the known faults explains them",
          explained ? routing.best->remedy : "the router's weight, bias, score function and parameters");
    } else if (wrongly_staged != report_.staged.end()) {
      say("staging",
          fmt::format("codes and scales of {} are not those of its values, whichever way scales are laid out",
                      wrongly_staged->what),
          "the quantizer of activations, and which tensors were dumped");
    } else if (experts.verdict == Verdict::kUnexplained) {
      say("unexplained", "none of the known faults explains this", "");
    } else {
      say("fine", "the engine computes what is specified", "");
    }
    add_not_finite();
  }

  void say(const std::string& verdict, const std::string& explanation, const std::string& remedy) {
    report_.verdict = verdict;
    report_.explanation = explanation;
    report_.remedy = remedy;
  }

  /// NaN and infinity are a finding of their own, whatever else there is.
  void add_not_finite() {
    if (report_.not_finite == 0) return;
    const std::string count = fmt::format("{} of {} elements of the output are NaN or infinite",
                                          report_.not_finite, subject().tokens * subject().hidden());
    if (report_.verdict == "fine") {
      say("unexplained", count + "; what is finite is as it should be",
          "scales that are missing, zero or infinite, and padding that was never written");
    } else {
      report_.explanation += "; besides, " + count;
    }
  }

  /// The engine's weights lack the factor, and its output has it.
  bool factor_cancels() const {
    const auto& routing = *report_.routing;
    return routing.verdict == Verdict::kExplained && routing.best->id == "scaling-factor-missing" &&
           report_.experts.best->id() == "scaling-factor-twice";
  }

  const CandidateRequest& request_;
  DumpedTensors tensors_;
  std::optional<LoadedSubject> loaded_;
  CandidateReport report_;
};

}  // namespace

CandidateReport run_candidate_test(const CandidateRequest& request) {
  return CandidateTest(request).run();
}

}  // namespace fourfold
