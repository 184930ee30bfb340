// Checks and choices of the grouped GEMM that need no GPU.
#include "sm90/expert_gemm.h"

#include <cstdint>
#include <limits>
#include <string>
#include <variant>

#include "base/fail.h"
#include "fourfold/number_formats.h"
#include "sm90/expert_gemm_checks.h"
#include "sm90/gemm_choice.h"

namespace fourfold::sm90 {
namespace {

bool is_aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

void require_aligned(const std::string& what, const void* pointer, uintptr_t bytes) {
  if (pointer == nullptr || !is_aligned(pointer, bytes)) {
    reject(what, fmt::format("a pointer aligned to {} bytes", bytes),
           pointer == nullptr ? std::string("null") : fmt::format("{}", pointer));
  }
}

template <class T>
void require_matrix(const std::string& what, const MatrixView<T>& matrix, int64_t rows, int64_t cols) {
  if (matrix.rows != rows || matrix.cols != cols) {
    reject(what, shape_text(rows, cols), shape_text(matrix.rows, matrix.cols));
  }
  require_aligned(what, matrix.data, 16);
  constexpr int64_t kMultiple = 16 / static_cast<int64_t>(sizeof(T));
  if (matrix.stride < cols || matrix.stride % kMultiple != 0) {
    reject(what + ": stride", fmt::format("a multiple of {}, at least {}", kMultiple, cols), matrix.stride);
  }
}

void require_shape(const PackedShape& shape) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 2;
  if (shape.channels <= 0 || shape.channels % 16 != 0 || shape.channels > kMost || shape.depth <= 0 ||
      shape.depth % 16 != 0 || shape.depth > kMost) {
    reject("packed weights: channels and depth", "positive multiples of 16",
           shape_text(shape.channels, shape.depth));
  }
}

void require_source(const std::string& what, const BlockScaledView& matrix, const PackedShape& shape) {
  if (matrix.format != QuantFormat::kNvfp4) {
    reject(what, "nvfp4 (cast MXFP4 first)", traits_of(matrix.format).name);
  }
  if (matrix.rows != shape.channels || matrix.cols != shape.depth) {
    reject(what, shape_text(shape.channels, shape.depth), shape_text(matrix.rows, matrix.cols));
  }
  if (matrix.codes.data == nullptr || matrix.scales == nullptr) {
    reject(what, "codes and scales in device memory", "null");
  }
}

void require_activation(const ExpertGemm& args) {
  const auto* d = std::get_if<MatrixView<Bf16>>(&args.d);
  const bool paired = args.weights.order == RowOrder::kGateUpPaired;
  if (!args.activation) {
    if (paired) reject("expert gemm: an epilogue for paired gate and up", "a gated activation", "none");
    if (!args.h.empty()) reject("expert gemm: h without an activation", "an empty view", "one with data");
    return;
  }
  if (d == nullptr) reject("expert gemm: output of an activation", "bf16", "float32");
  if (is_gated(args.activation->kind) != paired) {
    reject("expert gemm: row order for " + describe(*args.activation),
           is_gated(args.activation->kind) ? "gate and up paired" : "plain", paired ? "paired" : "plain");
  }
  if (!args.h.empty()) {
    require_matrix("expert gemm: h", args.h, args.max_rows, args.weights.rows());
  }
}

constexpr const char* kActivatedInEpilogue = "SwiGLU with a limit that bf16 holds";

std::string activation_text(const ExpertGemm& args) {
  return args.activation ? describe(*args.activation) : "none";
}

void require_requantization(const ExpertGemm& args) {
  const Requantize& requantize = args.requantize;
  if (requantize.expert_scales == nullptr) return;
  if (!activates_in_epilogue(args)) {
    reject("expert gemm: an epilogue that quantizes", kActivatedInEpilogue, activation_text(args));
  }
  require_aligned("expert gemm: requantize.row_scales", requantize.row_scales, 4);
  if (requantize.residual.empty()) return;
  require_matrix("expert gemm: requantize.residual", requantize.residual, args.max_rows,
                 args.weights.channels);
  const int64_t stride = std::get<MatrixView<Bf16>>(args.d).stride;
  if (requantize.residual.stride != stride) {
    reject("expert gemm: requantize.residual: stride", fmt::format("{}, as d's", stride),
           requantize.residual.stride);
  }
}

/// Of token rows: sorted ones, or those that the kernel gathers.
void require_tokens(const ExpertGemm& args) {
  const MatrixView<const Bf16>& tokens = args.tokens[0];
  if (args.slot_of_row == nullptr) {
    require_matrix("expert gemm: tokens", tokens, args.max_rows, args.weights.depth);
    if (args.tokens[1].empty()) return;
    return require_matrix("expert gemm: tokens, second term", args.tokens[1], args.max_rows,
                          args.weights.depth);
  }
  if (!can_gather(args)) {
    reject("expert gemm: kernel for rows by slot_of_row", "one term, gate and up paired, any kernel but few",
           describe_kernel(args));
  }
  require_matrix("expert gemm: gathered tokens", tokens, tokens.rows, args.weights.depth);
  require_aligned("expert gemm: slot_of_row", args.slot_of_row, 4);
  if (args.top_k < 1) reject("expert gemm: top_k", "at least 1", args.top_k);
  constexpr int64_t kMost = std::numeric_limits<uint32_t>::max();  // the kernel counts units of 16 bytes
  if (tokens.rows > kMost / (tokens.stride / 8)) {
    reject("expert gemm: gathered tokens", "less than 64 GB", shape_text(tokens.rows, tokens.stride));
  }
}

/// Of launch_expert_gemms: what the second reads is what the first writes.
void require_rows_of(const std::string& what, const MatrixView<const Bf16>& read,
                     const MatrixView<Bf16>& written) {
  if (read.data == written.data && read.cols == written.cols &&
      (read.empty() || read.stride == written.stride))
    return;
  const auto text = [](const MatrixView<const Bf16>& rows) {
    return rows.empty() ? std::string("none")
                        : fmt::format("{} of stride {} at {}", shape_text(rows.rows, rows.cols), rows.stride,
                                      static_cast<const void*>(rows.data));
  };
  reject("expert gemms: " + what + " of the second", "what the first writes, " + text(written), text(read));
}

/// The kernel counts tiles in 32 bits.
void require_countable_tiles(const ExpertGemm& args) {
  const int64_t token_tiles = args.max_rows / 8 + args.experts;
  if (token_tiles > std::numeric_limits<int32_t>::max() / args.weights.row_blocks()) {
    reject("expert gemm: tiles (rows / 8 x weight rows / 64)", "fewer than 2^31; split the rows",
           fmt::format("{} rows, {} weight rows", args.max_rows, args.weights.rows()));
  }
}

}  // namespace

void validate(const PackWeights& args) {
  require_shape(args.shape);
  const bool paired = args.shape.order == RowOrder::kGateUpPaired;
  require_source(paired ? "pack weights: gate" : "pack weights: matrix", args.matrix, args.shape);
  if (paired) require_source("pack weights: up", args.up, args.shape);
  require_aligned("pack weights: packed", args.packed, 128);
}

void validate(const ExpertGemm& args) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (args.experts <= 0 || args.experts > kMost - 1)
    reject("expert gemm: experts", "at least 1", args.experts);
  if (args.max_rows < 0 || args.max_rows > kMost) {
    reject("expert gemm: max_rows", "0 to 2^31 - 1", args.max_rows);
  }
  require_shape(args.weights);
  if (args.max_rows == 0) return;
  require_countable_tiles(args);
  require_tokens(args);
  require_aligned("expert gemm: group_offsets", args.group_offsets, 4);
  if (args.tickets != nullptr) require_aligned("expert gemm: tickets", args.tickets, 4);
  require_aligned("expert gemm: packed", args.packed, 128);
  require_aligned("expert gemm: weight_globals", args.weight_globals, 4);
  std::visit(
      [&](const auto& d) { require_matrix("expert gemm: d", d, args.max_rows, args.weights.channels); },
      args.d);
  require_activation(args);
  require_requantization(args);
  if (const size_t needed = workspace_bytes(args); needed > 0) {
    require_aligned("expert gemm: workspace", args.workspace.data(), kWorkspaceAlignment);
    if (args.workspace.size() < needed) reject("expert gemm: workspace bytes", needed, args.workspace.size());
  }
}

void validate(const ExpertGemm& first, const ExpertGemm& second, const int32_t* progress) {
  validate(first);
  validate(second);
  if (first.max_rows == 0) return;
  if (second.experts != first.experts || second.max_rows != first.max_rows) {
    reject("expert gemms: experts and max_rows of the second",
           fmt::format("the first's, {} and {}", first.experts, first.max_rows),
           fmt::format("{} and {}", second.experts, second.max_rows));
  }
  if (second.group_offsets != first.group_offsets) {
    reject("expert gemms: group_offsets of the second",
           fmt::format("the first's, {}", static_cast<const void*>(first.group_offsets)),
           fmt::format("{}", static_cast<const void*>(second.group_offsets)));
  }
  if (!activates_in_epilogue(first)) {
    reject("expert gemms: activation of the first", kActivatedInEpilogue, activation_text(first));
  }
  if (second.activation) reject("expert gemms: activation of the second", "none", activation_text(second));
  // What the first writes beside d, it writes where it quantizes.
  const Requantize written = first.requantize.expert_scales != nullptr ? first.requantize : Requantize{};
  require_rows_of("tokens", second.tokens[0], std::get<MatrixView<Bf16>>(first.d));
  require_rows_of("tokens, second term", second.tokens[1], written.residual);
  if (second.row_scales != written.row_scales) {
    const auto text = [](const float* scales) {
      return scales == nullptr ? std::string("none") : fmt::format("{}", static_cast<const void*>(scales));
    };
    reject("expert gemms: row_scales of the second",
           "what the first writes (requantize.row_scales, where it quantizes), " + text(written.row_scales),
           text(second.row_scales));
  }
  if (second.slot_of_row != nullptr)
    reject("expert gemms: slot_of_row of the second", "none: sorted rows", "one");
  require_aligned("expert gemms: progress", progress, 4);
  if (first.max_rows > std::numeric_limits<int32_t>::max() / first.weights.row_blocks()) {
    reject("expert gemms: rows x weight rows / 64 of the first", "fewer than 2^31; split the rows",
           fmt::format("{} rows, {} weight rows", first.max_rows, first.weights.rows()));
  }
}

GemmPlan planned_launches(const ExpertGemm& args) {
  if (args.kernel) return {{{{*args.kernel}}}};
  return plan_gemm(args.max_rows, args.experts, args.weights.row_blocks());
}

bool needs_own_activation(const ExpertGemm& args) {
  if (!args.activation) return false;
  // The epilogue compares h with the limit in bf16.
  const float limit = args.activation->limit;
  return args.activation->kind != ActivationKind::kSwiglu || static_cast<float>(encode_bf16(limit)) != limit;
}

bool activates_in_epilogue(const ExpertGemm& args) {
  return args.activation && !needs_own_activation(args) && args.weights.order == RowOrder::kGateUpPaired;
}

bool can_gather(const ExpertGemm& args) {
  return args.tokens[1].empty() && args.weights.order == RowOrder::kGateUpPaired &&
         planned_launches(args).main().gathers;
}

size_t workspace_bytes(const ExpertGemm& args) {
  if (!needs_own_activation(args) || !args.h.empty()) return 0;
  return static_cast<size_t>(args.max_rows * args.weights.rows()) * sizeof(Bf16);
}

std::string describe_kernel(const ExpertGemm& args) {
  const GemmPlan plan = planned_launches(args);
  const std::string text =
      fmt::format("sm90 {} (at most {:.1f} rows an expert on average)", plan.main().name,
                  static_cast<double>(args.max_rows) / static_cast<double>(args.experts));
  if (plan.count == 1) return text;
  const GemmPart& other = plan.parts[1];
  const std::string_view name = shape_of(other.kernel).name;
  const std::string_view short_name = name.substr(0, name.find(':'));
  return text + (other.band.above > 0
                     ? fmt::format(" [experts with more than {} rows: {}]", other.band.above, short_name)
                     : fmt::format(" [experts with at most {} rows: {}]", other.band.most, short_name));
}

}  // namespace fourfold::sm90
