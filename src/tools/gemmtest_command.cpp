// `fourfold gemmtest`.
#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <memory>

#include "tools/commands.h"
#include "tools/gemmtest.h"
#include "tools/terminal.h"

namespace fourfold {
namespace {

void set_shape(GemmtestRequest& request, const std::string& text) {
  int64_t* const fields[] = {&request.groups, &request.rows, &request.columns, &request.depth};
  const auto fits = [](const int64_t* field) { return *field >= 1 && *field <= 65536; };
  if (!parse_numbers(text, fields) || !std::all_of(std::begin(fields), std::end(fields), fits)) {
    throw CLI::ValidationError(
        "--shape",
        fmt::format("expected G,M,N,K: groups, rows, columns and depth from 1 to 65536; found '{}'", text));
  }
}

int print_report(const GemmtestRequest& request, const GemmtestReport& report, const std::string& reason) {
  fmt::print("backend      {} ({})\n", request.backend->name(), reason);
  fmt::print("shape        {} groups, M {}, N {}, K {}; group offsets {}\n", request.groups, request.rows,
             request.columns, request.depth, fmt::join(report.group_offsets, " "));
  fmt::print("operands     bf16 N(0, 1) -> NVFP4; relative L2 of a {:.4f}, of b {:.4f}\n\n",
             report.quantization_error_a, report.quantization_error_b);
  fmt::print("{}\n", bold(fmt::format("  {:<9} {:<10} {:<12} {:>10} {:>11} {:>10} {:>10}", "gemm", "scales",
                                      "against", "cosine", "norm ratio", "rel L2", "limit")));
  for (const GemmtestRow& row : report.rows) {
    const std::string text = fmt::format("  {:<9} {:<10} {:<12} {:>10.7f} {:>11.6f} {:>10.3e} {:>10.3e}",
                                         row.operation, row.scales, row.against, row.comparison.cosine,
                                         row.comparison.norm_ratio, row.comparison.rel_l2, row.limit);
    fmt::print("{}\n", row.exceeds() ? red(text + "  <-") : text);
  }
  fmt::print("  swizzled scales, padding poisoned with 0x7F, against row-major: {} of {} elements differ\n\n",
             report.different_elements, report.elements);
  fmt::print(
      "limits on relative L2: emulation, one bf16 ulp an element; bf16 matmul, 1.2 x the operands' own "
      "error\n");
  if (!report.has_finding()) {
    fmt::print("{}: nothing exceeds its limit\n", bold(green("verdict: fine")));
    return kExitFine;
  }
  fmt::print("{}: the marked GEMMs, or the swizzled layout, disagree\n", bold(red("verdict: kernel")));
  return kExitFinding;
}

}  // namespace

void add_gemmtest(CLI::App& app, int& exit_code) {
  struct GemmtestArguments {
    GemmtestRequest request;
    std::string shape = "5,300,328,272", backend;
  };
  auto arguments = std::make_shared<GemmtestArguments>();
  CLI::App* command = app.add_subcommand(
      "gemmtest", "Test a backend's dense and grouped NVFP4 GEMM, with row-major and swizzled scales");
  command->add_option("--shape", arguments->shape, "G,M,N,K: groups, rows in all, columns, depth")
      ->capture_default_str();
  command->add_option("--backend", arguments->backend,
                      "backend to test (default: the best that can run here)");
  add_isa_option(*command);
  command->add_option("--seed", arguments->request.seed, "seed of the operands")
      ->capture_default_str()
      ->check(whole_number<uint64_t>());
  command->footer("Exit code: 0 fine, 1 error, 2 usage, 3 a finding.");
  command->callback([arguments, &exit_code] {
    set_shape(arguments->request, arguments->shape);
    const BackendChoice choice = choose_backend(arguments->backend);
    arguments->request.backend = choice.backend;
    exit_code = print_report(arguments->request, run_gemmtest(arguments->request), choice.reason);
  });
}

}  // namespace fourfold
