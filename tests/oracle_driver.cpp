// Runs one operation on tensors from a file and writes the results to another, so that the numpy oracle of
// tests/oracle can judge the library without sharing a line with it.
//
//   oracle_driver OP IN.safetensors OUT.safetensors [key=value ...]
#include <fmt/format.h>

#include <cstdio>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "fourfold/error.h"
#include "fourfold/expert_weights.h"
#include "fourfold/quantize.h"
#include "fourfold/reference.h"
#include "fourfold/router.h"
#include "fourfold/safetensors.h"
#include "fourfold/scale_layout.h"
#include "oracle_job.h"

namespace fourfold {
namespace {

void decode(Job& job) {
  float* e2m1 = job.result<float>("e2m1", DType::kF32, {16});
  for (int code = 0; code < 16; ++code) e2m1[code] = decode_e2m1(static_cast<uint8_t>(code));
  float* e4m3 = job.result<float>("e4m3", DType::kF32, {256});
  for (int code = 0; code < 256; ++code) e4m3[code] = decode_e4m3(static_cast<uint8_t>(code));
  float* e8m0 = job.result<float>("e8m0", DType::kF32, {256});
  for (int code = 0; code < 256; ++code) e8m0[code] = decode_e8m0(static_cast<uint8_t>(code));
  float* bf16 = job.result<float>("bf16", DType::kF32, {65536});
  for (int code = 0; code < 65536; ++code) bf16[code] = static_cast<float>(Bf16{static_cast<uint16_t>(code)});
}

void encode(Job& job) {
  const auto values = job.values<float>("values");
  uint8_t* e2m1 = job.result<uint8_t>("e2m1", DType::kU8, {ssize_of(values)});
  uint8_t* e4m3 = job.result<uint8_t>("e4m3", DType::kU8, {ssize_of(values)});
  Bf16* bf16 = job.result<Bf16>("bf16", DType::kBf16, {ssize_of(values)});
  for (size_t i = 0; i < values.size(); ++i) {
    e2m1[i] = encode_e2m1(values[i]);
    e4m3[i] = encode_e4m3(values[i]);
    bf16[i] = encode_bf16(values[i]);
  }
}

void quantize(Job& job) {
  const auto x = job.matrix<float>("x");
  const std::string policy = job.option("policy");
  const bool token = policy == "token", two_terms = job.option("terms", "1") == "2";
  const ScaleFloor floor =
      job.option("floor", "none") == "modelopt" ? ScaleFloor::kModelOpt : ScaleFloor::kNone;
  const ScaleRule rule = parse_scale_rule(job.option("rule", "amax")).value();

  float* global = job.result<float>("global", DType::kF32, {token ? x.rows : 1});
  if (policy == "static") global[0] = job.values<float>("global")[0];
  if (policy == "tensor") global[0] = nvfp4_global_scale(absolute_maximum(x));
  uint8_t* codes = job.result<uint8_t>("codes", DType::kU8, {x.rows, x.cols / 2});
  uint8_t* scales = job.result<uint8_t>("scales", DType::kU8, {x.rows, x.cols / 16});
  float* dequantized = job.result<float>("dequantized", DType::kF32, {x.rows, x.cols});
  uint8_t* residual_codes =
      two_terms ? job.result<uint8_t>("residual_codes", DType::kU8, {x.rows, x.cols / 2}) : nullptr;
  uint8_t* residual_scales =
      two_terms ? job.result<uint8_t>("residual_scales", DType::kU8, {x.rows, x.cols / 16}) : nullptr;
  for (int64_t row = 0; row < x.rows; ++row) {
    if (token) global[row] = nvfp4_global_scale(absolute_maximum(x.rows_from(row, 1)));
    const float g = global[token ? row : 0];
    const std::span<const float> values(x.row(row), static_cast<size_t>(x.cols));
    uint8_t *row_codes = codes + row * x.cols / 2, *row_scales = scales + row * x.cols / 16;
    if (two_terms) {
      quantize_row_nvfp4x2(values, g, row_codes, row_scales, residual_codes + row * x.cols / 2,
                           residual_scales + row * x.cols / 16);
    } else {
      quantize_row_nvfp4(values, g, floor, rule, row_codes, row_scales);
    }
    const BlockScaledView view{QuantFormat::kNvfp4,
                               1,
                               x.cols,
                               {row_codes, 1, x.cols / 2},
                               row_scales,
                               x.cols / 16,
                               ScaleLayout::kRowMajor,
                               {g, GlobalScaleKind::kMultiplier}};
    dequantize_row(view, 0, dequantized + row * x.cols);
  }
}

void save_matrix(Job& job, const BlockScaledMatrix& matrix) {
  job.result("codes", DType::kU8, {matrix.rows, matrix.cols / 2}, matrix.codes);
  job.result("scales", DType::kU8, {matrix.rows, matrix.cols / traits_of(matrix.format).block_size},
             matrix.scales);
}

void quantize_mx(Job& job) {
  const auto x = job.matrix<float>("x");
  const BlockScaledMatrix matrix = quantize_mxfp4(x);
  save_matrix(job, matrix);
  job.result("dequantized", DType::kF32, {x.rows, x.cols}, dequantize(matrix.view()));
}

void quantize_fp8(Job& job) {
  const auto x = job.matrix<Bf16>("x");
  StagedActivations staged;
  staged.codes = {job.result<uint8_t>("codes", DType::kU8, {x.rows, x.cols}), x.rows, x.cols};
  staged.row_scales = {job.result<float>("row_scales", DType::kF32, {x.rows}), static_cast<size_t>(x.rows)};
  reference::stage(ActivationFormat::kFp8, x, staged);
}

/// Row-major scales beside their codes.
BlockScaledView block_scaled(QuantFormat format, const MatrixView<const uint8_t>& codes,
                             const MatrixView<const uint8_t>& scales, float global = 1.0f) {
  return {format,      codes.rows,  codes.cols * 2,         codes,
          scales.data, scales.cols, ScaleLayout::kRowMajor, {global, GlobalScaleKind::kMultiplier}};
}

void cast(Job& job) {
  const auto codes = job.matrix<uint8_t>("codes"), scales = job.matrix<uint8_t>("scales");
  CastReport report;
  const BlockScaledMatrix matrix =
      cast_mxfp4_to_nvfp4(block_scaled(QuantFormat::kMxfp4, codes, scales), &report);
  save_matrix(job, matrix);
  job.result<float>("global", DType::kF32, {1})[0] = matrix.global.value;
  job.result<int64_t>("recoded", DType::kI64, {1})[0] = report.recoded;
  job.result<int64_t>("inexact", DType::kI64, {1})[0] = report.inexact;
}

void fold(Job& job) {
  const auto gate = job.matrix<uint8_t>("gate_scales"), up = job.matrix<uint8_t>("up_scales");
  const std::vector<uint8_t> codes(static_cast<size_t>(gate.rows * gate.cols * 8), 0x11);
  const int64_t cols = gate.cols * 16;
  const auto view = [&](const MatrixView<const uint8_t>& scales, float global) {
    return BlockScaledView{QuantFormat::kNvfp4,
                           scales.rows,
                           cols,
                           {codes.data(), scales.rows, cols / 2},
                           scales.data,
                           scales.cols,
                           ScaleLayout::kRowMajor,
                           {global, GlobalScaleKind::kMultiplier}};
  };
  Expert expert;
  expert.gate = view(gate, job.values<float>("gate_global")[0]);
  expert.up = view(up, job.values<float>("up_global")[0]);
  ExpertWeights weights{cols, gate.rows, {expert}, std::nullopt, nullptr};
  FoldReport report;
  const ExpertWeights folded = fold_gate_up(weights, &report);
  for (const auto& [name, half] :
       {std::pair("gate_scales", folded.experts[0].gate), std::pair("up_scales", folded.experts[0].up)}) {
    const auto& blocks = std::get<BlockScaledView>(half);
    uint8_t* out = job.result<uint8_t>(name, DType::kU8, {gate.rows, gate.cols});
    for (int64_t row = 0; row < gate.rows; ++row) {
      for (int64_t col = 0; col < gate.cols; ++col) out[row * gate.cols + col] = blocks.scale_code(row, col);
    }
  }
  const auto gate_global = global_multiplier(folded.experts[0].gate),
             up_global = global_multiplier(folded.experts[0].up);
  if (gate_global != up_global) throw std::runtime_error("fold: two global scales are left");
  job.result<float>("global", DType::kF32, {1})[0] = gate_global;
  job.result<int64_t>("changed", DType::kI64, {1})[0] = report.changed;
}

void save_bytes(Job& job, const std::string& name, const std::vector<uint8_t>& bytes) {
  job.result(name, DType::kU8, {ssize_of(bytes)}, bytes);
}

void save_per_expert(Job& job, const std::vector<uint8_t>& bytes, int64_t experts) {
  job.result("swizzled", DType::kU8, {experts, ssize_of(bytes) / experts}, bytes);
}

void unswizzle(Job& job) {
  const int64_t rows = std::stoll(job.option("rows")), cols = std::stoll(job.option("cols"));
  job.result("scales", DType::kU8, {rows, cols},
             unswizzle_scales(job.values<uint8_t>("swizzled"), rows, cols));
}

void permute(Job& job) {
  const int64_t experts = std::stoll(job.option("experts"));
  const std::vector<int64_t> shape = job.shape("topk_ids");
  const size_t slots = static_cast<size_t>(shape[0] * shape[1]);
  const std::vector<float> weights(slots, 1.0f);
  const auto wide = job.values<int64_t>("topk_ids");
  const auto narrow = job.values<int32_t>("topk_ids");
  Routing routing;
  if (narrow.size() == slots) {
    routing.topk_ids = MatrixView<const int32_t>(narrow.data(), shape[0], shape[1]);
  } else {
    routing.topk_ids = MatrixView<const int64_t>(wide.data(), shape[0], shape[1]);
  }
  routing.topk_weights = {weights.data(), shape[0], shape[1]};
  const auto local_experts =
      job.has("local_experts") ? job.values<int32_t>("local_experts") : std::vector<int32_t>{};
  routing.local_experts = local_experts;
  const Permutation permutation = permute_by_expert(routing, experts);
  job.result("group_offsets", DType::kI32, {experts + 1}, permutation.group_offsets);
  job.result("slot_of_row", DType::kI32, {permutation.rows()}, permutation.slot_of_row);
  job.result("row_of_slot", DType::kI32, {static_cast<int64_t>(slots)}, permutation.row_of_slot);
  job.result<int32_t>("status", DType::kI32, {1})[0] = permutation.status;
}

void swiglu(Job& job) {
  const auto h = job.matrix<Bf16>("h");
  const ActivationFunction function = activation_of(job);
  const int64_t cols = is_gated(function.kind) ? h.cols / 2 : h.cols;
  reference::activate(function, h, {job.result<Bf16>("a", DType::kBf16, {h.rows, cols}), h.rows, cols});
}

void combine(Job& job) {
  const auto z = job.matrix<Bf16>("z");
  const auto rows = job.values<int32_t>("row_of_slot");
  const auto weights = job.matrix<float>("topk_weights");
  const LayerConfig config;
  const std::vector<int64_t> shape = {weights.rows, z.cols};
  reference::combine(z, rows, weights, config, {},
                     MatrixView<Bf16>(job.result<Bf16>("y", DType::kBf16, shape), shape[0], shape[1]));
  reference::combine(z, rows, weights, config, {},
                     MatrixView<float>(job.result<float>("y32", DType::kF32, shape), shape[0], shape[1]));
}

void grouped_gemm(Job& job, bool grouped) {
  const auto a_codes = job.matrix<uint8_t>("a_codes"), a_scales = job.matrix<uint8_t>("a_scales");
  const auto b_codes = job.matrix<uint8_t>("b_codes"), b_scales = job.matrix<uint8_t>("b_scales");
  const bool swizzled = job.option("layout", "row_major") == "swizzled";
  const auto alphas = job.values<float>(grouped ? "alphas" : "alpha");
  const int64_t experts = ssize_of(alphas), rows = job.shape("b_codes")[grouped ? 1 : 0],
                cols = a_codes.cols * 2;
  std::vector<int32_t> offsets = {0, static_cast<int32_t>(a_codes.rows)};
  if (grouped) offsets = job.values<int32_t>("group_offsets");

  const std::vector<uint8_t> ones_a(static_cast<size_t>(a_scales.rows * a_scales.cols), 1);
  const std::vector<uint8_t> ones_b(static_cast<size_t>(b_scales.rows * b_scales.cols), 1);
  const MatrixView<const uint8_t> used_a{ones_a.data(), a_scales.rows, a_scales.cols};
  const MatrixView<const uint8_t> used_b{ones_b.data(), b_scales.rows, b_scales.cols};
  const auto a_swizzled =
      with_poisoned_padding(swizzle_scale_groups(a_scales, offsets), swizzle_scale_groups(used_a, offsets));
  const auto b_swizzled =
      with_poisoned_padding(swizzle_expert_scales(b_scales, experts), swizzle_expert_scales(used_b, experts));

  ActivationView a;
  a.format = ActivationFormat::kNvfp4;
  a.rows = a_codes.rows;
  a.cols = cols;
  a.codes = a_codes;
  a.scale_layout = swizzled ? ScaleLayout::kSwizzled128x4 : ScaleLayout::kRowMajor;
  a.scales = swizzled ? a_swizzled.data() : a_scales.data;
  const auto b = stacked_nvfp4_weights(b_codes.data, swizzled ? b_swizzled.data() : b_scales.data,
                                       a.scale_layout, alphas, rows, cols);
  OutputView d;
  if (job.option("out", "bf16") == "bf16") {
    d = MatrixView<Bf16>(job.result<Bf16>("d", DType::kBf16, {a.rows, rows}), a.rows, rows);
  } else {
    d = MatrixView<float>(job.result<float>("d", DType::kF32, {a.rows, rows}), a.rows, rows);
  }
  if (grouped) {
    reference::grouped_gemm({a, b, offsets, d, accumulation_of(job)});
  } else {
    reference::gemm({a, b.front(), d, accumulation_of(job)});
  }
}

void route_tokens(Job& job) {
  static const std::map<std::string, RouterScore> scores = {{"softmax", RouterScore::kSoftmax},
                                                            {"softmax_of_topk", RouterScore::kSoftmaxOfTopK},
                                                            {"sigmoid", RouterScore::kSigmoid},
                                                            {"sqrt_softplus", RouterScore::kSqrtSoftplus}};
  RouterConfig config;
  config.score = scores.at(job.option("score"));
  config.top_k = std::stoll(job.option("top_k"));
  config.renormalise = job.option("renormalise", "1") == "1";
  config.scaling_factor = std::stof(job.option("scaling_factor", "1"));
  config.groups = std::stoll(job.option("groups", "1"));
  config.top_groups = std::stoll(job.option("top_groups", "1"));
  RouterWeights weights;
  weights.weight = dense_view(job.matrix<Bf16>("weight"));
  if (job.has("bias")) weights.bias = dense_vector(job.matrix<float>("bias"));
  if (job.has("correction_bias"))
    weights.correction_bias = dense_vector(job.matrix<float>("correction_bias"));
  std::vector<int64_t> token_ids;
  if (job.has("experts_of_token")) {
    weights.experts_of_token = job.matrix<int64_t>("experts_of_token");
    token_ids = job.values<int64_t>("token_ids");
  }
  const auto x = job.matrix<Bf16>("x");
  const RoutingDecision decision = route(config, weights, x, token_ids);
  job.result("logits", DType::kF32, {x.rows, weights.weight.rows}, router_logits(x, weights));
  job.result("topk_ids", DType::kI32, {x.rows, config.top_k}, decision.topk_ids);
  job.result("topk_weights", DType::kF32, {x.rows, config.top_k}, decision.topk_weights);
}

int run(int argc, char** argv) {
  static const std::map<std::string, std::function<void(Job&)>> operations = {
      {"decode", decode},
      {"encode", encode},
      {"quantize", quantize},
      {"quantize_mxfp4", quantize_mx},
      {"quantize_fp8", quantize_fp8},
      {"cast", cast},
      {"fold", fold},
      {"swizzle",
       [](Job& job) { save_bytes(job, "swizzled", swizzle_scales(job.matrix<uint8_t>("scales"))); }},
      {"unswizzle", unswizzle},
      {"swizzle_groups",
       [](Job& job) {
         save_bytes(
             job, "swizzled",
             swizzle_scale_groups(job.matrix<uint8_t>("scales"), job.values<int32_t>("group_offsets")));
       }},
      {"swizzle_experts",
       [](Job& job) {
         const int64_t experts = job.shape("scales")[0];
         save_per_expert(job, swizzle_expert_scales(job.matrix<uint8_t>("scales"), experts), experts);
       }},
      {"swizzle_experts_transposed",
       [](Job& job) {
         const int64_t experts = job.shape("scales")[0];
         save_per_expert(job, swizzle_expert_scales_from_transposed(job.matrix<uint8_t>("scales"), experts),
                         experts);
       }},
      {"permute", permute},
      {"swiglu", swiglu},
      {"route", route_tokens},
      {"combine", combine},
      {"gemm", [](Job& job) { grouped_gemm(job, false); }},
      {"grouped_gemm", [](Job& job) { grouped_gemm(job, true); }},
      {"layer", run_layer},
      {"checkpoint_layer", run_checkpoint_layer},
      {"checkpoint_weights", read_checkpoint_weights},
  };
  if (argc < 4 || !operations.contains(argv[1])) {
    fmt::print(stderr, "usage: oracle_driver OP IN.safetensors OUT.safetensors [key=value ...]\n");
    return 2;
  }
  std::map<std::string, std::string> options;
  for (int i = 4; i < argc; ++i) {
    const std::string text = argv[i];
    options[text.substr(0, text.find('='))] = text.substr(text.find('=') + 1);
  }
  try {
    Job job(argv[2], options);
    operations.at(argv[1])(job);
    job.save(argv[3]);
    return 0;
  } catch (const std::exception& error) {
    fmt::print(stderr, "oracle_driver: {}\n", error.what());
    return 1;
  }
}

}  // namespace
}  // namespace fourfold

int main(int argc, char** argv) {
  return fourfold::run(argc, argv);
}
