#include "blackwell/expert_stages.h"

#include <algorithm>
#include <memory>

#include "base/fail.h"
#include "cuda/device.h"

namespace fourfold::blackwell {
namespace {

class Packer final : public cuda::WeightPacker {
 public:
  Packer(const BlockShape& gate_up, int64_t halves, const BlockShape& down)
      : gate_up_(gate_up), halves_(halves), down_(down) {}

  int64_t gate_up_bytes() const override { return expert_bytes(gate_up_, halves_); }
  int64_t down_bytes() const override { return expert_bytes(down_, 1); }
  void pack_gate_up(const BlockScaledView* gate, const BlockScaledView& up,
                    std::byte* packed) const override {
    if (gate != nullptr) pack(*gate, gate_up_, halves_, 0, packed);
    pack(up, gate_up_, halves_, halves_ - 1, packed);
  }
  void pack_down(const BlockScaledView& down, std::byte* packed) const override {
    pack(down, down_, 1, 0, packed);
  }

 private:
  static void pack(const BlockScaledView& matrix, const BlockShape& shape, int64_t halves, int64_t half,
                   std::byte* packed) {
    auto* codes = reinterpret_cast<uint8_t*>(packed);
    uint8_t* scales = codes + halves * shape.code_bytes();
    launch_block_weights(matrix, shape, codes + half * shape.code_bytes(),
                         scales + half * shape.scale_bytes(), nullptr);
  }

  BlockShape gate_up_;
  int64_t halves_;
  BlockShape down_;
};

int32_t halves_of(const LayerConfig& config) {
  return is_gated(config.activation.kind) ? 2 : 1;
}

}  // namespace

ExpertStages::ExpertStages(const ExpertWeights& weights, const LayerConfig& config,
                           const LayerOptions& options, const Memory& memory, const GemmKernels& kernels)
    : config_(config),
      options_(options),
      kernels_(kernels),
      gate_up_shape_{config.intermediate, config.hidden},
      down_shape_{config.hidden, config.intermediate},
      weights_(kBackend, weights, config, options, memory,
               std::make_unique<Packer>(gate_up_shape_, halves_of(config), down_shape_)) {}

ExpertStages::Gemm ExpertStages::gate_up_gemm(bool known_scales) const {
  return {weights_.gate_up(), gate_up_shape_, halves_of(config_),
          terms() == 1 && known_scales && weights_.gate_up().bias.bytes() == 0};
}

ExpertStages::Gemm ExpertStages::down_gemm() const {
  return {weights_.down(), down_shape_, 1,
          terms() == 1 && is_known_before(options_.intermediate_scale) && weights_.down().bias.bytes() == 0};
}

ExpertSpace ExpertStages::carve(WorkspaceCarver& carver, int64_t rows) const {
  ExpertSpace space;
  space.rows = rows;
  const int64_t experts = config_.experts, halves = halves_of(config_);
  const auto take_stacked = [&](int64_t depth) {
    StackedSpace stacked;
    stacked.codes = carver.take<uint8_t>(rows * terms() * depth / 2);
    stacked.scales = carver.take<uint8_t>(most_scale_bytes(rows, terms(), experts, depth));
    stacked.row_scales = carver.take<float>(rows);
    return stacked;
  };
  space.arrays[0] = carver.take<std::byte>(static_cast<int64_t>(group_arrays_bytes(experts * halves)));
  space.arrays[1] = carver.take<std::byte>(static_cast<int64_t>(group_arrays_bytes(experts)));
  space.places = carver.take<cuda::RowPlace>(rows);
  space.x = take_stacked(gate_up_shape_.padded_depth());
  space.intermediate = take_stacked(down_shape_.padded_depth());
  // Sized for float32, which experts() makes of rows that bring scales of their own.
  const int64_t columns = std::max(halves * gate_up_shape_.padded_rows(), down_shape_.padded_rows());
  space.result = carver.take<std::byte>(rows * terms() * columns * static_cast<int64_t>(sizeof(float)));
  space.z = carver.take<Bf16>(rows, config_.hidden);
  space.amaxes = carver.take<float>(2);
  size_t gemm = 0;
  for (const GemmKernel* kernel : {&kernels_.to_bf16, &kernels_.to_float32}) {
    gemm = std::max(
        gemm, kernel->workspace_bytes(static_cast<int32_t>(experts * halves), cuda::multiprocessor_count()));
  }
  space.gemm = carver.take<std::byte>(static_cast<int64_t>(gemm));
  return space;
}

std::string ExpertStages::describe_kernels(int64_t rows) const {
  if (config_.experts == 0 || rows == 0) return "none";
  const auto describe = [&](const Gemm& gemm) {
    const GemmKernel& kernel = kernel_of(gemm);
    return fmt::format("{}x{}x{} tiles to {}", kernel.tile_m, kernel.tile_n, kernel.tile_k,
                       gemm.to_bf16 ? "bf16" : "float32");
  };
  const std::string gate_up = describe(gate_up_gemm(is_known_before(options_.x_scale))),
                    down = describe(down_gemm());
  return fmt::format("{} {}: {}", kernels_.architecture, kernels_.instruction,
                     gate_up == down ? gate_up : fmt::format("gate/up {}, down {}", gate_up, down));
}

bool ExpertStages::needs(Walk walk) const {
  return walk == Walk::kCompute ||
         (walk == Walk::kFindXAmax && options_.x_scale == ScalePolicy::kDynamicTensor) ||
         (walk == Walk::kFindIntermediateAmax && options_.intermediate_scale == ScalePolicy::kDynamicTensor);
}

void ExpertStages::clear_amaxes(const ExpertSpace& space, void* stream) const {
  if (!needs(Walk::kFindXAmax) && !needs(Walk::kFindIntermediateAmax)) return;
  cuda::fill_async(space.amaxes.data(), 0, space.amaxes.size_bytes(), stream);
}

cuda::StackedRows ExpertStages::stacked(const ExpertSpace& space, const StackedSpace& rows,
                                        int64_t depth) const {
  return {rows.codes.data(), round_up(depth, kDepthMultiple) / 2, rows.scales.data(), depth / 16,
          space.places.data()};
}

GemmResult ExpertStages::gate_up_result(const Pass& pass) const {
  const Gemm gemm = gate_up_gemm(pass.known_scales);
  GemmResult result;
  result.data = pass.space.result.data();
  result.stride = config_.h_columns();
  result.is_float32 = !gemm.to_bf16;
  result.terms = terms();
  result.halves = gemm.halves;
  result.columns = config_.intermediate;
  result.places = pass.space.places.data();
  if (gemm.to_bf16 && !pass.taps.h.empty()) {
    result.data = pass.taps.h.data;
    result.stride = pass.taps.h.stride;
  }
  result.row_scales = pass.space.x.row_scales.data();
  result.globals = gemm.weights.global_scales();
  result.bias = gemm.weights.bias.bytes() > 0 ? gemm.weights.biases() : nullptr;
  return result;
}

GemmResult ExpertStages::down_result(const Pass& pass) const {
  const Gemm gemm = down_gemm();
  GemmResult result;
  result.data = gemm.to_bf16 ? static_cast<const void*>(pass.z.data) : pass.space.result.data();
  result.stride = gemm.to_bf16 ? pass.z.stride : config_.hidden;
  result.is_float32 = !gemm.to_bf16;
  result.terms = terms();
  result.columns = config_.hidden;
  result.places = pass.space.places.data();
  result.row_scales = pass.space.intermediate.row_scales.data();
  result.globals = gemm.weights.global_scales();
  result.bias = gemm.weights.bias.bytes() > 0 ? gemm.weights.biases() : nullptr;
  return result;
}

StackedGemm ExpertStages::stacked_gemm(const Gemm& gemm, const GemmResult& result, const StackedSpace& a,
                                       const float* scales) const {
  StackedGemm stacked;
  stacked.halves = gemm.halves;
  stacked.n = gemm.shape.padded_rows();
  stacked.k = gemm.shape.padded_depth();
  stacked.a_codes = a.codes.data();
  stacked.a_scales = a.scales.data();
  stacked.b_codes = reinterpret_cast<const uint8_t*>(gemm.weights.packed.data());
  stacked.b_scales = stacked.b_codes + gemm.halves * gemm.shape.code_bytes();
  stacked.b_expert_bytes = expert_bytes(gemm.shape, gemm.halves);
  stacked.d = const_cast<void*>(result.data);
  stacked.d_element_bytes = result.is_float32 ? sizeof(float) : sizeof(Bf16);
  stacked.d_row_bytes = result.stride * stacked.d_element_bytes;
  if (gemm.to_bf16) {
    stacked.scales = scales;
    stacked.globals = gemm.weights.global_scales();
  }
  return stacked;
}

void ExpertStages::build(const Pass& pass) const {
  const ExpertSpace& space = pass.space;
  BuildGroups args;
  args.group_offsets = pass.rows.group_offsets.first(static_cast<size_t>(config_.experts + 1));
  args.max_rows = pass.rows.rows;
  args.terms = terms();
  args.gemms[0] =
      stacked_gemm(gate_up_gemm(pass.known_scales), gate_up_result(pass), space.x, weights_.x_scales());
  args.gemms[1] =
      stacked_gemm(down_gemm(), down_result(pass), space.intermediate, weights_.intermediate_scales());
  for (int which = 0; which < 2; ++which) {
    args.arrays[which] = carve_group_arrays(space.arrays[which], config_.experts * args.gemms[which].halves);
  }
  args.places = space.places.data();
  // What staging does not write of the last tile of an expert, and of the last columns.
  for (const auto& [rows, depth] : {std::pair(&space.x, gate_up_shape_.padded_depth()),
                                    std::pair(&space.intermediate, down_shape_.padded_depth())}) {
    const int64_t bytes = most_scale_bytes(pass.rows.rows, terms(), config_.experts, depth);
    cuda::fill_async(rows->scales.data(), 0, static_cast<size_t>(bytes), pass.step.stream);
  }
  build_groups(args, pass.step.stream);
}

void ExpertStages::multiply(const Pass& pass, const Gemm& gemm, int which) const {
  kernel_of(gemm).launch(carve_group_arrays(pass.space.arrays[which], config_.experts * gemm.halves),
                         cuda::multiprocessor_count(), pass.space.gemm, pass.step.stream);
}

void ExpertStages::run(const ExpertSpace& space, const cuda::RowSource& source, const ExpertRows& rows,
                       const ExpertTaps& taps, MatrixView<Bf16> z, const Step& step) const {
  if (config_.experts == 0) return;
  const bool is_dynamic = options_.x_scale == ScalePolicy::kDynamicTensor;
  if (is_dynamic && (step.whole || step.walk == Walk::kFindXAmax)) {
    cuda::find_amax(source, rows.group_offsets, rows.rows, &space.amaxes[0], step.stream);
  }
  if (step.walk == Walk::kFindXAmax) return;
  const Pass pass{space, rows, taps, z, step, is_known_before(options_.x_scale)};
  build(pass);
  cuda::StageArgs stage;
  stage.format = options_.activations;
  stage.policy = options_.x_scale;
  stage.source = source;
  stage.group_offsets = rows.group_offsets;
  stage.max_rows = rows.rows;
  stage.expert_scales = weights_.x_scales();
  stage.tensor_amax = &space.amaxes[0];
  stage.decoded.row_scales = space.x.row_scales.data();
  stage.stacked = stacked(space, space.x, config_.hidden);
  if (taps.staged_x) stage.staged = *taps.staged_x;
  cuda::stage(stage, step.stream);
  step.finish("stage");
  run_stacked(pass);
}

void ExpertStages::run_staged(const ExpertSpace& space, const ActivationView& staged,
                              std::span<const int32_t> all_offsets, int64_t first_row, const ExpertRows& rows,
                              const ExpertTaps& taps, MatrixView<Bf16> z, const Step& step) const {
  if (config_.experts == 0 || step.walk == Walk::kFindXAmax) return;  // x has its scales
  const Pass pass{space, rows, taps, z, step, false};
  build(pass);
  stack_staged(staged, all_offsets, first_row, rows.rows, stacked(space, space.x, config_.hidden),
               space.x.row_scales.data(), step.stream);
  run_stacked(pass);
}

ActivateRows ExpertStages::activation_of(const Pass& pass) const {
  const ExpertSpace& space = pass.space;
  ActivateRows args;
  args.function = config_.activation;
  args.h = gate_up_result(pass);
  args.rows = pass.rows.group_offsets.data() + config_.experts;
  args.max_rows = pass.rows.rows;
  args.format = options_.activations;
  args.policy = options_.intermediate_scale;
  args.expert_scales = weights_.intermediate_scales();
  args.tensor_amax = &space.amaxes[1];
  args.stacked = stacked(space, space.intermediate, config_.intermediate);
  args.row_scales = space.intermediate.row_scales.data();
  if (args.h.is_float32) args.h_tap = pass.taps.h;
  args.activation_tap = pass.taps.activation;
  if (pass.taps.staged_intermediate) args.staged_tap = *pass.taps.staged_intermediate;
  return args;
}

void ExpertStages::run_stacked(const Pass& pass) const {
  multiply(pass, gate_up_gemm(pass.known_scales), 0);
  pass.step.finish("gemm1");
  const ActivateRows activation = activation_of(pass);
  const bool is_dynamic = options_.intermediate_scale == ScalePolicy::kDynamicTensor;
  if (is_dynamic && (pass.step.whole || pass.step.walk == Walk::kFindIntermediateAmax)) {
    find_activation_amax(activation, pass.step.stream);
  }
  if (pass.step.walk == Walk::kFindIntermediateAmax) return;
  activate_rows(activation, pass.step.stream);
  pass.step.finish("activate+restage");
  const Gemm down = down_gemm();
  multiply(pass, down, 1);
  if (!down.to_bf16)
    finish_rows(down_result(pass), activation.rows, pass.rows.rows, pass.z, pass.step.stream);
  pass.step.finish("gemm2");
}

}  // namespace fourfold::blackwell
