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

namespace fourfold {
namespace {

using diagnosis::Candidate;
using diagnosis::Subject;
using diagnosis::Verdict;

/// Of the first look at where the error sits.
constexpr double kMapWork = 4e9;
constexpr int64_t kMappedTokens = 256;

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
    look_at_staged_x();
    look_at_routing();
    diagnosis::MatcherOptions options;
    options.stagings = stagings();
    options.progress = request_.progress;
    report_.experts = diagnose(subject(), candidate, options);
    map_error(candidate);
    judge();
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
          "x", "output", "topk_ids", "topk_weights", "token_ids", "h", "activation", "x_codes", "x_scales"};
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
    if (loaded_->inputs().hidden != subject().hidden()) {
      bad_tensor(need("x", ""), "x",
                 fmt::format("[T, {}], the checkpoint's hidden size", subject().hidden()));
    }
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

  /// Codes and scales of x, [T, H/2] and [T, H/16] or as many bytes as the 128x4 layout has.
  void look_at_staged_x() {
    const DumpedTensor *codes = find("x_codes"), *scales = find("x_scales");
    if (!codes || !scales) return;
    const int64_t tokens = subject().tokens, hidden = subject().hidden(), blocks = hidden / 16;
    const auto code_bytes = static_cast<int64_t>(codes->bytes.size()),
               scale_bytes = static_cast<int64_t>(scales->bytes.size());
    if (code_bytes != tokens * hidden / 2)
      bad_tensor(*codes, "x_codes", fmt::format("U8 [{}, {}]", tokens, hidden / 2));
    std::vector<std::pair<double, std::string>> ranked;
    const auto try_layout = [&](const std::string& layout, auto offset) {
      ranked.emplace_back(staged_distance(*codes, *scales, offset), layout);
    };
    if (scale_bytes == tokens * blocks) {
      try_layout("row-major", [&](int64_t row, int64_t block) { return row * blocks + block; });
      try_layout("transposed", [&](int64_t row, int64_t block) { return block * tokens + row; });
    }
    if (scale_bytes == swizzled_scale_bytes(tokens, blocks)) {
      const int64_t across = round_up(blocks, kScaleTileCols);
      try_layout("swizzled 128x4",
                 [&](int64_t row, int64_t block) { return swizzled_scale_offset(row, block, blocks); });
      try_layout("row-major, padded", [&](int64_t row, int64_t block) { return row * across + block; });
    }
    if (ranked.empty()) {
      bad_tensor(*scales, "x_scales",
                 fmt::format("{} bytes, or {} in the 128x4 layout", tokens * blocks,
                             swizzled_scale_bytes(tokens, blocks)));
    }
    std::sort(ranked.begin(), ranked.end());
    report_.staged_x = StagedXReport{ranked[0].second, ranked[0].first, ranked[1].first, ranked[1].second};
  }

  template <class Offset>
  double staged_distance(const DumpedTensor& codes, const DumpedTensor& scales, Offset offset) const {
    const int64_t tokens = subject().tokens, hidden = subject().hidden();
    double norm = 0.0, found = 0.0, product = 0.0;
    for (int64_t row = 0; row < tokens; ++row) {
      for (int64_t k = 0; k < hidden; ++k) {
        const auto pair = static_cast<uint8_t>(codes.bytes[static_cast<size_t>((row * hidden + k) / 2)]);
        const auto scale = static_cast<uint8_t>(scales.bytes[static_cast<size_t>(offset(row, k / 16))]);
        const double value = double{decode_e2m1(k % 2 == 0 ? pair & 15 : pair >> 4)} * decode_e4m3(scale);
        const double x = static_cast<float>(subject().x[static_cast<size_t>(row * hidden + k)]);
        if (!std::isfinite(value)) return INFINITY;
        norm += x * x;
        found += value * value;
        product += x * value;
      }
    }
    return norm * found == 0.0 ? 1.0 : std::sqrt(std::max(0.0, 1.0 - product * product / (norm * found)));
  }

  void map_error(const Candidate& candidate) {
    const double work = 3.0 * static_cast<double>(subject().top_k) * static_cast<double>(subject().hidden()) *
                        static_cast<double>(subject().intermediate());
    const int64_t count = std::clamp(static_cast<int64_t>(kMapWork / work), int64_t{1},
                                     std::min(kMappedTokens, subject().tokens));
    std::vector<int64_t> tokens;
    for (int64_t i = 0; i < count; ++i) tokens.push_back(i * subject().tokens / count);
    diagnosis::Replay replay(subject(), tokens);
    const std::vector<float> due = replay.run({}, report_.experts.sound.staging).output;
    std::vector<float> found;
    for (const int64_t token : tokens) {
      const auto row = candidate.output.begin() + token * subject().hidden();
      found.insert(found.end(), row, row + subject().hidden());
    }
    report_.mapped_tokens = count;
    report_.map = map_errors(subject(), tokens, found, due, report_.experts.sound.limit);
  }

  void judge() {
    const diagnosis::Diagnosis& experts = report_.experts;
    const bool is_routed_well = !report_.routing || report_.routing->verdict == Verdict::kFine;
    if (experts.verdict == Verdict::kExplained && !is_routed_well && factor_cancels()) {
      report_.verdict = "fine";
      report_.explanation =
          "the routed scaling factor is applied after the experts instead of in the routing weights: the "
          "same";
    } else if (experts.verdict == Verdict::kExplained) {
      report_.verdict = to_string(experts.best->faults.front().place);
      report_.explanation = experts.best->sentence();
      report_.remedy = experts.best->faults.front().remedy;
      for (size_t i = 1; i < experts.best->faults.size(); ++i)
        report_.remedy += "; " + experts.best->faults[i].remedy;
    } else if (!is_routed_well) {
      const auto& routing = *report_.routing;
      report_.verdict = "routing";
      const bool explained = routing.verdict == Verdict::kExplained;
      report_.explanation =
          explained ? routing.best->sentence
                    : "ids and weights are not the router's, and none of the known faults explains them";
      report_.remedy =
          explained ? routing.best->remedy : "the router's weight, bias, score function and parameters";
    } else if (experts.verdict == Verdict::kUnexplained || report_.map.not_finite > 0) {
      report_.verdict = "unexplained";
      report_.explanation = report_.map.not_finite > 0 && experts.verdict == Verdict::kFine
                                ? "NaN or infinity in the output; what is finite is as it should be"
                                : "none of the known faults explains this";
    } else {
      report_.verdict = "fine";
      report_.explanation = "the engine computes what is specified";
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
