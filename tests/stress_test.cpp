// layertest --stress catches backends that break a promise, by the name of the case, and no others.
#include "tools/stress.h"

#include <gtest/gtest.h>
#include <malloc.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <ostream>
#include <set>
#include <thread>

namespace fourfold {
namespace {

enum class Broken : uint8_t {
  kNothing,
  kReadsPadding,        ///< adds what lies behind a row of x
  kReadsWorkspace,      ///< adds what the workspace held
  kIsNotDeterministic,  ///< now and then other bits
  kSharesScratch,       ///< keeps y in the layer while it computes
  kWritesBehindRows,    ///< the first element behind a row of y
  kWritesBehindWorkspace,
  kIgnoresAbsentIds,  ///< -1 is expert 0
  kIgnoresStatus,
  kIgnoresLocalExperts,  ///< ids are taken for the rank's
  kDependsOnThreads,
};

/// The reference, with one promise broken.
class BrokenLayer final : public MoeLayer {
 public:
  BrokenLayer(Broken broken, std::unique_ptr<MoeLayer> sound) : broken_(broken), sound_(std::move(sound)) {}

  const LayerConfig& config() const override { return sound_->config(); }
  const LayerOptions& options() const override { return sound_->options(); }
  LayerPlan plan(int64_t max_tokens) const override {
    LayerPlan plan = sound_->plan(max_tokens);
    plan.workspace_bytes += kWorkspaceAlignment;
    return plan;
  }
  void experts(const LayerPlan& plan, const ExpertsArgs& args) const override { sound_->experts(plan, args); }
  void update_weights(const ExpertWeights& weights) override { sound_->update_weights(weights); }

  void forward(const LayerPlan& plan, const ForwardArgs& caller) const override {
    ForwardArgs args = caller;
    std::vector<int32_t> ids;
    const auto* narrow = std::get_if<MatrixView<const int32_t>>(&caller.routing.topk_ids);
    if (broken_ == Broken::kIgnoresAbsentIds && narrow != nullptr) {
      for (int64_t row = 0; row < narrow->rows; ++row) {
        for (int64_t k = 0; k < narrow->cols; ++k) ids.push_back(std::max((*narrow)(row, k), 0));
      }
      args.routing.topk_ids = MatrixView<const int32_t>(ids.data(), narrow->rows, narrow->cols);
    }
    if (broken_ == Broken::kIgnoresStatus) args.status = nullptr;
    if (broken_ == Broken::kIgnoresLocalExperts) args.routing.local_experts = {};
    const auto workspace = static_cast<uint8_t>(*caller.workspace.data());
    const struct UnderWay {
      std::atomic<int>& calls;
      explicit UnderWay(std::atomic<int>& counted) : calls(counted) { ++calls; }
      ~UnderWay() { --calls; }
    } under_way(under_way_);
    sound_->forward(plan, args);
    if (caller.x.rows > 0) spoil(caller, workspace);
  }

 private:
  void spoil(const ForwardArgs& args, uint8_t workspace) const {
    auto* const y = std::get_if<MatrixView<Bf16>>(&args.y);
    if (y == nullptr) return;
    const bool has_padding = args.x.stride > args.x.cols;
    uint16_t& bits = y->row(0)->bits;
    switch (broken_) {
      case Broken::kReadsPadding:
        if (has_padding) *y->row(0) = *(args.x.row(0) + args.x.cols);
        break;
      case Broken::kReadsWorkspace:
        bits = static_cast<uint16_t>(bits ^ workspace);
        break;
      case Broken::kIsNotDeterministic:
        if (++calls_ % 7 == 0) bits ^= 1;
        break;
      case Broken::kSharesScratch:
        bits = through_shared_scratch(bits);
        break;
      case Broken::kWritesBehindRows:
        if (y->stride > y->cols) *(y->row(0) + y->cols) = Bf16{};
        break;
      case Broken::kWritesBehindWorkspace:
        // Only where the caller's memory goes on: the test must not damage its own heap.
        if (malloc_usable_size(args.workspace.data()) > args.workspace.size()) {
          args.workspace.data()[args.workspace.size()] = std::byte{0};
        }
        break;
      case Broken::kDependsOnThreads:
        bits = static_cast<uint16_t>(bits ^ omp_threads());
        break;
      default:
        break;
    }
  }
  /// What the scratch holds once every other call under way has written there: on a busy machine, where
  /// threads stop anywhere, as on an idle one.
  uint16_t through_shared_scratch(uint16_t bits) const {
    scratch_ = bits;
    const int written = ++writes_;
    while (under_way_ > 1 && writes_ == written) std::this_thread::yield();
    return scratch_;
  }
  static int omp_threads();

  Broken broken_;
  std::unique_ptr<MoeLayer> sound_;
  mutable std::atomic<uint16_t> scratch_ = 0;
  mutable std::atomic<int> writes_ = 0;
  mutable std::atomic<int> under_way_ = 0;
  mutable std::atomic<int> calls_ = 0;
};

int BrokenLayer::omp_threads() {
  int threads = 0;
#pragma omp parallel reduction(+ : threads)
  threads += 1;
  return threads;
}

class BrokenBackend final : public Backend {
 public:
  explicit BrokenBackend(Broken broken) : broken_(broken) {}
  std::string_view name() const override { return "broken"; }
  std::string_view description() const override { return "the reference with a promise broken"; }
  std::string why_unavailable() const override { return ""; }
  std::string why_unsupported(const ExpertWeights&, const LayerConfig&, const LayerOptions&) const override {
    return "";
  }
  std::unique_ptr<MoeLayer> make_layer(const ExpertWeights& weights, const LayerConfig& config,
                                       const LayerOptions& options) const override {
    return std::make_unique<BrokenLayer>(broken_, reference_backend().make_layer(weights, config, options));
  }
  void gemm(const GemmArgs& args) const override { reference_backend().gemm(args); }
  void grouped_gemm(const GroupedGemmArgs& args) const override { reference_backend().grouped_gemm(args); }

 private:
  Broken broken_;
};

StressReport stress(Broken broken) {
  const BrokenBackend backend(broken);
  StressRequest request;
  request.backend = &backend;
  request.subjects = stress_layers(ActivationFormat::kNvfp4, 1);
  request.subjects.resize(2);
  return run_stress(request);
}

std::set<std::string> failures(const StressReport& report) {
  std::set<std::string> names;
  for (const StressCase& one : report.cases) {
    if (one.state == StressCase::State::kFailed) names.insert(one.name);
  }
  return names;
}

TEST(Stress, FindsNothingWrongWithASoundBackend) {
  const StressReport report = stress(Broken::kNothing);
  EXPECT_EQ(failures(report), std::set<std::string>()) << format_stress_table(report);
  EXPECT_EQ(exit_code_of(report), 0);
}

struct Promise {
  Broken broken;
  const char* caught_by;
};

/// The test's name in CTest: without it the bytes of the struct, pointer and all, another name in each run.
void PrintTo(const Promise& promise, std::ostream* out) {
  *out << promise.caught_by;
}

class BrokenPromise : public testing::TestWithParam<Promise> {};

TEST_P(BrokenPromise, IsCaughtByName) {
  const StressReport report = stress(GetParam().broken);
  EXPECT_TRUE(failures(report).contains(GetParam().caught_by)) << format_stress_table(report);
  EXPECT_EQ(exit_code_of(report), 3);
  EXPECT_NE(format_stress_table(report).find(std::string("FAILED  ") + GetParam().caught_by),
            std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(All, BrokenPromise,
                         testing::Values(Promise{Broken::kReadsPadding, "poisoned padding"},
                                         Promise{Broken::kReadsWorkspace, "poisoned workspace"},
                                         Promise{Broken::kIsNotDeterministic, "20 repeats"},
                                         Promise{Broken::kSharesScratch, "calls side by side"},
                                         Promise{Broken::kWritesBehindRows, "poisoned padding"},
                                         Promise{Broken::kWritesBehindWorkspace, "20 repeats"},
                                         Promise{Broken::kIgnoresAbsentIds, "all ids -1"},
                                         Promise{Broken::kIgnoresStatus, "ids out of range"},
                                         Promise{Broken::kIgnoresLocalExperts, "expert parallel"},
                                         Promise{Broken::kDependsOnThreads, "thread counts"}));

TEST(Stress, NamesWhereAnOutputDiffers) {
  const StressReport report = stress(Broken::kReadsPadding);
  const auto at = std::find_if(report.cases.begin(), report.cases.end(),
                               [](const StressCase& one) { return one.name == "poisoned padding"; });
  EXPECT_EQ(at->text, "token 0, column 0: other bits");
}

}  // namespace
}  // namespace fourfold
