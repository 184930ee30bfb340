// The C interface on GPUs: the bits of the C++ interface on the same backend, from a caller's own memory and
// from the workspace's, on streams and captured. Exit code 77: no GPU here.
#include <fourfold/fourfold.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "cuda_support.h"
#include "fourfold/checkpoint.h"
#include "fourfold/model_family.h"
#include "fourfold/moe_layer.h"
#include "temporary_folder.h"
#include "tools/synthesize.h"

namespace fourfold {
namespace {

/// Those that this GPU can run.
std::vector<std::string> backends_on_device();

}  // namespace

std::string why_not_on_this_gpu() {
  return backends_on_device().empty() ? "no backend of this build runs on this GPU" : "";
}

namespace {

constexpr int64_t kTokens = 37, kHidden = 128, kExperts = 8, kTopK = 2;

/// A handle of the C interface, destroyed by `kDestroy`.
template <class T, void (*kDestroy)(T*)>
struct Destroyer {
  void operator()(T* handle) const { kDestroy(handle); }
};
using CheckpointHandle =
    std::unique_ptr<fourfold_checkpoint, Destroyer<fourfold_checkpoint, fourfold_checkpoint_close>>;
using LayerHandle = std::unique_ptr<fourfold_layer, Destroyer<fourfold_layer, fourfold_layer_destroy>>;
using WorkspaceHandle =
    std::unique_ptr<fourfold_workspace, Destroyer<fourfold_workspace, fourfold_workspace_destroy>>;

void expect_ok(fourfold_status status) {
  EXPECT_EQ(status, FOURFOLD_OK) << fourfold_last_error();
}

void expect_refused(fourfold_status status, const char* words) {
  EXPECT_EQ(status, FOURFOLD_INVALID_ARGUMENT);
  EXPECT_NE(std::string(fourfold_last_error()).find(words), std::string::npos) << fourfold_last_error();
}

std::vector<std::string> backends_on_device() {
  std::vector<std::string> names;
  for (int32_t i = 0; i < fourfold_backend_count(); ++i) {
    fourfold_backend_info info = {};
    info.size = sizeof info;
    expect_ok(fourfold_backend_describe(i, &info));
    if (info.on_device == 1) names.emplace_back(info.name);
  }
  return names;
}

std::vector<std::string> formats_of(const std::string& backend) {
  if (backend == "blackwell") return {"nvfp4", "nvfp4x2"};
  return {"nvfp4", "nvfp4x2", "fp8", "bf16"};
}

/// A Qwen3-MoE of one layer, routed at random; some slots are empty.
class CApiOnGpu : public TestInFolder {
 protected:
  void SetUp() override {
    ASSERT_NO_FATAL_FAILURE(TestInFolder::SetUp());
    SynthesizeRequest request;
    request.directory = folder_;
    request.family = "qwen3-moe";
    request.original = OriginalFormat::kBf16;
    request.experts = kExperts;
    request.hidden = kHidden;
    request.intermediate = 64;
    request.top_k = kTopK;
    request.force = true;
    synthesize(request);
    fourfold_checkpoint* opened = nullptr;
    expect_ok(fourfold_checkpoint_open(model().c_str(), nullptr, &opened));
    checkpoint_.reset(opened);

    Engine random = engine(1);
    x_ = random_rows(random, kTokens, kHidden, Values::kOrdinary);
    for (int64_t slot = 0; slot < kTokens * kTopK; ++slot) {
      ids_.push_back(static_cast<int32_t>(below(random, kExperts + 1)) - 1);
      weights_.push_back(static_cast<float>(1 + below(random, 100)) / 64.0f);
    }
  }

  std::string model() const { return (folder_ / "nvfp4").string(); }

  LayerHandle make_layer(const std::string& backend, const std::string& activations,
                         const std::vector<int64_t>& held = {}) const {
    fourfold_layer_options options = {};
    options.size = sizeof options;
    options.backend = backend.c_str();
    options.activations = activations.c_str();
    options.experts = held.empty() ? nullptr : held.data();
    options.expert_count = std::ssize(held);
    fourfold_layer* layer = nullptr;
    expect_ok(fourfold_layer_create(checkpoint_.get(), 0, &options, &layer));
    return LayerHandle(layer);
  }

  static WorkspaceHandle make_workspace(const LayerHandle& layer, void* memory = nullptr, size_t bytes = 0) {
    fourfold_workspace* workspace = nullptr;
    expect_ok(fourfold_workspace_create(layer.get(), kTokens, memory, bytes, &workspace));
    return WorkspaceHandle(workspace);
  }

  /// What the C++ interface computes: y [T, H].
  std::vector<Bf16> expected(const std::string& backend, const std::string& activations) const {
    const auto checkpoint = Checkpoint::open(model());
    const ExpertLayer loaded = load_experts(checkpoint, 0, {});
    const LayerConfig config = layer_config(loaded, rules_of(checkpoint->config()));
    LayerOptions options;
    options.activations = parse_activation_format(activations).value();
    const DefaultPolicies policies = default_scale_policies(loaded.weights, options.activations);
    options.x_scale = policies.x;
    options.intermediate_scale = policies.intermediate;
    const BackendChoice choice = choose_backend(backend, loaded.weights, config, options);
    const auto layer = choice.backend->make_layer(loaded.weights, config, options);
    const LayerPlan plan = layer->plan(kTokens);
    const Buffer workspace = choice.backend->memory().allocate(plan.workspace_bytes);
    const DeviceArray<Bf16> x(x_), y(x_.size());
    const DeviceArray<int32_t> ids(ids_);
    const DeviceArray<float> weights(weights_);
    ForwardArgs args;
    args.x = x.matrix(kTokens, kHidden);
    args.routing.topk_ids = MatrixView<const int32_t>(ids.matrix(kTokens, kTopK));
    args.routing.topk_weights = weights.matrix(kTokens, kTopK);
    args.y = y.matrix(kTokens, kHidden);
    args.workspace = {workspace.data(), workspace.bytes()};
    layer->forward(plan, args);
    return y.get();
  }

  CheckpointHandle checkpoint_;
  std::vector<Bf16> x_;
  std::vector<int32_t> ids_;
  std::vector<float> weights_;
};

/// The arrays of a call, in the GPU's memory.
struct DeviceCall {
  DeviceCall(const std::vector<Bf16>& x_values, const std::vector<int32_t>& id_values,
             const std::vector<float>& weight_values)
      : x(x_values),
        ids(id_values),
        wide_ids(std::vector<int64_t>(id_values.begin(), id_values.end())),
        weights(weight_values),
        y(x_values.size()),
        y_f32(x_values.size()),
        status(std::vector<int32_t>{0}) {}

  fourfold_forward_args args(void* stream = nullptr) const {
    fourfold_forward_args args = {};
    args.size = sizeof args;
    args.tokens = kTokens;
    args.x = reinterpret_cast<const uint16_t*>(x.data());
    args.topk_ids = ids.data();
    args.topk_weights = weights.data();
    args.y = reinterpret_cast<uint16_t*>(y.data());
    args.status = status.data();
    args.stream = stream;
    return args;
  }

  DeviceArray<Bf16> x;
  DeviceArray<int32_t> ids;
  DeviceArray<int64_t> wide_ids;
  DeviceArray<float> weights;
  DeviceArray<Bf16> y;
  DeviceArray<float> y_f32;
  DeviceArray<int32_t> status;
};

TEST_F(CApiOnGpu, GivesWhatTheCppInterfaceGives) {
  for (const std::string& backend : backends_on_device()) {
    for (const std::string& format : formats_of(backend)) {
      SCOPED_TRACE(backend + ", " + format);
      const LayerHandle layer = make_layer(backend, format);
      ASSERT_NE(layer, nullptr);
      fourfold_layer_description made = {};
      made.size = sizeof made;
      expect_ok(fourfold_layer_describe(layer.get(), &made));
      EXPECT_EQ(made.backend, backend);
      EXPECT_EQ(made.activations, format);
      EXPECT_EQ(made.on_device, 1);
      EXPECT_EQ(made.device, cuda::current_device());

      const DeviceCall call(x_, ids_, weights_);
      const WorkspaceHandle workspace = make_workspace(layer);
      const TestStream stream;
      const fourfold_forward_args args = call.args(stream.get());
      expect_ok(fourfold_forward(layer.get(), workspace.get(), &args));
      stream.synchronize();
      EXPECT_EQ(first_difference<Bf16>(call.y.get(), expected(backend, format)), -1);
      EXPECT_EQ(call.status.get()[0], 0);
    }
  }
}

TEST_F(CApiOnGpu, TakesTheCallersMemoryWideIdsStridesAndFloat32) {
  for (const std::string& backend : backends_on_device()) {
    SCOPED_TRACE(backend);
    const LayerHandle layer = make_layer(backend, "nvfp4");
    ASSERT_NE(layer, nullptr);
    const std::vector<Bf16> y = expected(backend, "nvfp4");
    size_t bytes = 0;
    expect_ok(fourfold_workspace_bytes(layer.get(), kTokens, &bytes));
    const DeviceArray<std::byte> memory(bytes + 2 * FOURFOLD_WORKSPACE_ALIGNMENT);
    std::byte* const aligned =
        memory.data() + FOURFOLD_WORKSPACE_ALIGNMENT -
        reinterpret_cast<uintptr_t>(memory.data()) % uintptr_t{FOURFOLD_WORKSPACE_ALIGNMENT};
    fourfold_workspace* none = nullptr;
    expect_refused(fourfold_workspace_create(layer.get(), kTokens, aligned + 1, bytes, &none),
                   "multiple of 256");
    expect_refused(fourfold_workspace_create(layer.get(), kTokens, aligned, bytes - 1, &none), "bytes");
    EXPECT_EQ(none, nullptr);
    const WorkspaceHandle workspace = make_workspace(layer, aligned, bytes);

    const DeviceCall call(x_, ids_, weights_);
    fourfold_forward_args args = call.args();
    args.topk_ids = nullptr;
    args.topk_ids_i64 = call.wide_ids.data();
    expect_ok(fourfold_forward(layer.get(), workspace.get(), &args));
    EXPECT_EQ(first_difference<Bf16>(call.y.get(), y), -1);

    constexpr int64_t kStride = kHidden + 24, kXStride = kHidden + 8;
    std::vector<Bf16> spread(static_cast<size_t>(kTokens * kXStride));
    for (int64_t token = 0; token < kTokens; ++token) {
      std::copy_n(x_.begin() + token * kHidden, kHidden, spread.begin() + token * kXStride);
    }
    const DeviceArray<Bf16> spread_x(spread), wide(static_cast<size_t>(kTokens * kStride));
    args = call.args();
    args.x = reinterpret_cast<const uint16_t*>(spread_x.data());
    args.x_stride = kXStride;
    args.y = reinterpret_cast<uint16_t*>(wide.data());
    args.y_stride = kStride;
    expect_ok(fourfold_forward(layer.get(), workspace.get(), &args));
    const std::vector<Bf16> rows = wide.get();
    for (int64_t token = 0; token < kTokens; ++token) {
      const auto row = std::span(rows).subspan(static_cast<size_t>(token * kStride), kStride);
      EXPECT_EQ(first_difference<Bf16>(row.first(kHidden),
                                       std::span(y).subspan(static_cast<size_t>(token * kHidden), kHidden)),
                -1);
      EXPECT_TRUE(std::all_of(row.begin() + kHidden, row.end(), is_poison<Bf16>));
    }

    args = call.args();
    args.y = nullptr;
    args.y_f32 = call.y_f32.data();
    expect_ok(fourfold_forward(layer.get(), workspace.get(), &args));
    const std::vector<float> sums = call.y_f32.get();
    for (size_t i = 0; i < sums.size(); ++i) ASSERT_EQ(encode_bf16(sums[i]).bits, y[i].bits) << "at " << i;

    args.y = reinterpret_cast<uint16_t*>(call.y.data());
    expect_refused(fourfold_forward(layer.get(), workspace.get(), &args), "found both");
    args = call.args();
    args.tokens = kTokens + 1;
    expect_refused(fourfold_forward(layer.get(), workspace.get(), &args), "tokens: expected at most 37");
  }
}

// A rank's experts, by the model's numbers; an id of no expert is noted in the GPU's memory.
TEST_F(CApiOnGpu, HoldsSomeExpertsAndNotesIdsOfNone) {
  const std::vector<int64_t> first = {0, 3, 4}, second = {1, 2, 5, 6, 7};
  for (const std::string& backend : backends_on_device()) {
    SCOPED_TRACE(backend);
    std::vector<std::vector<float>> parts;
    for (const std::vector<int64_t>& held : {std::vector<int64_t>{}, first, second}) {
      const LayerHandle layer = make_layer(backend, "nvfp4", held);
      ASSERT_NE(layer, nullptr);
      std::vector<int32_t> ids = ids_;
      ids[0] = kExperts;  // nobody's
      const DeviceCall call(x_, ids, weights_);
      fourfold_forward_args args = call.args();
      args.y = nullptr;
      args.y_f32 = call.y_f32.data();
      const WorkspaceHandle workspace = make_workspace(layer);
      expect_ok(fourfold_forward(layer.get(), workspace.get(), &args));
      parts.push_back(call.y_f32.get());
      EXPECT_EQ(call.status.get()[0], FOURFOLD_EXPERT_OUT_OF_RANGE);
    }
    // The same kernels take 3, 5 and 8 experts, but z may be rounded otherwise by another: to the next bf16,
    // 2^-7 of it, each of a token's two terms.
    for (size_t i = 0; i < parts[0].size(); ++i) {
      const float terms = std::abs(parts[1][i]) + std::abs(parts[2][i]);
      ASSERT_NEAR(parts[1][i] + parts[2][i], parts[0][i], 0x1p-7f * terms) << "at " << i;
    }
  }
}

TEST_F(CApiOnGpu, IsCapturedInAGraph) {
  for (const std::string& backend : backends_on_device()) {
    SCOPED_TRACE(backend);
    const LayerHandle layer = make_layer(backend, "nvfp4");
    ASSERT_NE(layer, nullptr);
    const WorkspaceHandle workspace = make_workspace(layer);
    DeviceCall call(x_, ids_, weights_);
    CapturedGraph graph([&](void* stream) {
      const fourfold_forward_args args = call.args(stream);
      expect_ok(fourfold_forward(layer.get(), workspace.get(), &args));
    });
    for (int replay = 0; replay < 3; ++replay) {
      std::rotate(ids_.begin(), ids_.begin() + kTopK, ids_.end());
      call.ids.set(ids_);
      graph.replay();
      EXPECT_EQ(first_difference<Bf16>(call.y.get(), expected(backend, "nvfp4")), -1) << "replay " << replay;
    }
  }
}

}  // namespace
}  // namespace fourfold
