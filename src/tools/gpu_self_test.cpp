#include "tools/gpu_self_test.h"

#include <fmt/format.h>

#include <chrono>

#include "fourfold/comparison.h"
#include "fourfold/error.h"
#include "fourfold/quantize.h"
#include "fourfold/scale_layout.h"
#include "tools/gemmtest.h"
#include "tools/layer_trace.h"
#include "tools/mirror.h"
#include "tools/random.h"
#if FOURFOLD_HAS_BLACKWELL
#include "cuda/cublaslt_nvfp4.h"
#endif

namespace fourfold {
namespace {

/// Runs `body`, which says what is wrong; an Error is wrong, too.
template <class Body>
SelfTest timed(const std::string& name, const std::string& kernel, const Body& body) {
  SelfTest test;
  test.backend = name;
  test.kernel = kernel;
  const auto start = std::chrono::steady_clock::now();
  try {
    test.trouble = body();
  } catch (const Error& error) {
    test.trouble = error.what();
  }
  test.is_fine = test.trouble.empty();
  test.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return test;
}

std::string gemm_trouble(const GemmtestReport& report) {
  std::string trouble;
  for (const GemmtestRow& row : report.rows) {
    if (!row.exceeds()) continue;
    trouble += fmt::format("{}{}, {} scales, against {}: relative L2 {:.2e} above {:.2e}",
                           trouble.empty() ? "" : "; ", row.operation, row.scales, row.against,
                           row.comparison.rel_l2, row.limit);
  }
  if (report.different_elements > 0) {
    trouble += fmt::format("{}{} elements differ between row-major and swizzled scales",
                           trouble.empty() ? "" : "; ", report.different_elements);
  }
  return trouble;
}

#if FOURFOLD_HAS_BLACKWELL
// One ulp of bf16 an element at most where sums in another order round differently, 2.8e-3 in the mean.
constexpr double kRoundingLimit = 3e-3;

BlockScaledMatrix random_matrix(int64_t rows, int64_t cols, uint64_t stream) {
  std::vector<float> values(static_cast<size_t>(rows * cols));
  Random random(1, Random::Purpose::kOperand, stream);
  for (float& value : values) value = static_cast<float>(random.normal());
  const MatrixView<const float> view(values.data(), rows, cols);
  return quantize_nvfp4(view, nvfp4_global_scale(absolute_maximum(view)));
}

/// The backend's dense GEMM against cuBLASLt's, from the same codes and scales. `note`: why there was nothing
/// to compare.
std::string compare_with_cublaslt(const Backend& backend, int64_t rows, int64_t columns, int64_t depth,
                                  std::string& note) {
  const BlockScaledMatrix a = random_matrix(rows, depth, 1), b = random_matrix(columns, depth, 2);
  const std::vector<uint8_t> a_scales = swizzle_scales({a.scales.data(), rows, depth / 16}),
                             b_scales = swizzle_scales({b.scales.data(), columns, depth / 16});
  std::vector<Bf16> theirs(static_cast<size_t>(rows * columns)), ours(theirs.size());
  Mirror mirror(backend.memory());
  GemmArgs args;
  args.a.format = ActivationFormat::kNvfp4;
  args.a.rows = rows;
  args.a.cols = depth;
  args.a.codes = mirror.bring(MatrixView<const uint8_t>(a.codes.data(), rows, depth / 2));
  args.a.scales = mirror.bring(a_scales.data(), a_scales.size());
  args.a.scale_layout = ScaleLayout::kSwizzled128x4;
  const float a_global = a.global.multiplier();
  args.a.group_scales = mirror.bring(std::span(&a_global, 1));
  BlockScaledView weight = b.view();
  weight.codes = mirror.bring(weight.codes);
  weight.scales = mirror.bring(b_scales.data(), b_scales.size());
  weight.scale_layout = ScaleLayout::kSwizzled128x4;
  args.b = weight;
  const MatrixView<Bf16> d = mirror.bring(MatrixView<Bf16>(ours.data(), rows, columns));
  args.d = d;
  Bf16* lt_d = mirror.bring(theirs.data(), theirs.size());
  note =
      cuda::multiply_by_cublaslt({rows, columns, depth, args.a.codes.data, args.a.scales, weight.codes.data,
                                  weight.scales, a_global * b.global.multiplier(), lt_d});
  if (!note.empty()) return "";
  const AlignedWorkspace workspace(
      backend.gemm_workspace_bytes({args.a, {&args.b, 1}, {}, args.d, args.accumulation, {}, nullptr}),
      backend.memory());
  args.workspace = workspace.span();
  backend.gemm(args);
  mirror.fetch();
  const Comparison comparison = compare(MatrixView<const Bf16>(theirs.data(), rows, columns),
                                        MatrixView<const Bf16>(ours.data(), rows, columns));
  if (comparison.rel_l2 <= kRoundingLimit) return "";
  return fmt::format("relative L2 {:.2e} above {:.2e}", comparison.rel_l2, kRoundingLimit);
}
#endif

class GpuSelfTest {
 public:
  GpuSelfTest(const Backend& backend, const std::function<void(std::string_view)>& progress)
      : backend_(backend), progress_(progress) {}

  std::vector<SelfTest> run() {
    for (const ActivationFormat format : {ActivationFormat::kNvfp4, ActivationFormat::kNvfp4x2}) {
      for (const ScalePolicy policy :
           {ScalePolicy::kMaxOverExperts, ScalePolicy::kDynamicTensor, ScalePolicy::kDynamicToken}) {
        LayerOptions options;
        options.activations = format;
        options.x_scale = options.intermediate_scale = policy;
        const std::string name = fmt::format("{} {}", backend_.name(), to_string(policy));
        progress_(fmt::format("self-test: {}, {}", name, to_string(format)));
        tests_.push_back(test_backend(backend_, name, options));
      }
    }
    for (const auto& [groups, rows, columns, depth] : {std::array<int64_t, 4>{5, 300, 328, 272},
                                                       {1, 1, 64, 32},
                                                       {3, 130, 120, 48},
                                                       {4, 1000, 512, 2880}}) {
      const std::string name =
          fmt::format("{} gemm {},{},{},{}", backend_.name(), groups, rows, columns, depth);
      progress_("self-test: " + name);
      tests_.push_back(timed(name, "", [&] {
        return gemm_trouble(run_gemmtest({groups, rows, columns, depth, 1, &backend_}));
      }));
    }
#if FOURFOLD_HAS_BLACKWELL
    if (backend_.name() == blackwell_backend().name()) compare_dense();
#endif
    return std::move(tests_);
  }

 private:
#if FOURFOLD_HAS_BLACKWELL
  void compare_dense() {
    for (const auto& [rows, columns, depth] : {std::array<int64_t, 3>{256, 512, 1024}, {100, 264, 96}}) {
      const std::string name = fmt::format("blackwell, cuBLASLt {},{},{}", rows, columns, depth);
      progress_("self-test: " + name);
      std::string note;
      SelfTest test =
          timed(name, "", [&] { return compare_with_cublaslt(backend_, rows, columns, depth, note); });
      if (!note.empty()) test.backend += " (not compared: " + note + ")";
      tests_.push_back(test);
    }
  }
#endif

  const Backend& backend_;
  const std::function<void(std::string_view)>& progress_;
  std::vector<SelfTest> tests_;
};

}  // namespace

std::vector<SelfTest> run_gpu_self_tests(const std::function<void(std::string_view)>& progress) {
  std::vector<SelfTest> tests;
  for (const Backend* backend : backends()) {
    if (!backend->why_unavailable().empty() || backend->memory().device() == Device::host()) continue;
    for (SelfTest& test : GpuSelfTest(*backend, progress).run()) tests.push_back(std::move(test));
  }
  return tests;
}

}  // namespace fourfold
