// Combine on the GPU gives the reference's bits; and all stages together can be captured and replayed.
#include <cmath>
#include <memory>

#include "cuda/combine.h"
#include "cuda/permute.h"
#include "cuda/stage.h"
#include "cuda_support.h"
#include "fourfold/error.h"
#include "fourfold/reference.h"

namespace fourfold {
namespace {

struct CombineCase {
  int64_t tokens, top_k, hidden;
  bool weight_on_input = false;
  int absent_percent = 10;
  Values values = Values::kOrdinary;
  int64_t misaligned = 0;  ///< elements by which y starts and strides too late
  enum Shared : uint8_t { kNone, kPlain, kWeighted } shared = kNone;
};

/// Everything that combine reads: the slots of each token in random rows.
struct CombineInputs {
  CombineInputs(const CombineCase& c, uint64_t salt) {
    config.weight_on_input = c.weight_on_input;
    Engine random = engine(salt);
    const int64_t slots = c.tokens * c.top_k;
    int32_t rows = 0;
    for (int64_t slot = 0; slot < slots; ++slot) {
      row_of_slot.push_back(below(random, 100) < c.absent_percent ? -1 : rows++);
      weights.push_back(static_cast<float>(below(random, 2001) - 1000) / 777.0f);
    }
    std::shuffle(row_of_slot.begin(), row_of_slot.end(), random);
    z = random_rows(random, rows, c.hidden, c.values);
    if (c.shared != CombineCase::kNone) shared_z = random_rows(random, c.tokens, c.hidden, c.values);
    for (int64_t t = 0; t < c.tokens; ++t) {
      const auto weight = static_cast<float>(below(random, 1000)) / 999.0f;
      shared_weights.push_back(c.shared == CombineCase::kWeighted ? weight : 1.0f);
    }
    z_view = {z.data(), rows, c.hidden};
    weight_view = {weights.data(), c.tokens, c.top_k};
  }

  LayerConfig config;
  std::vector<int32_t> row_of_slot;
  std::vector<float> weights;
  std::vector<Bf16> z, shared_z;
  std::vector<float> shared_weights;
  MatrixView<const Bf16> z_view;
  MatrixView<const float> weight_view;
};

template <class T>
void check_combine(const CombineCase& c, uint64_t salt) {
  SCOPED_TRACE(testing::Message() << c.tokens << " tokens, top-" << c.top_k << ", H " << c.hidden << ", "
                                  << sizeof(T) << " bytes");
  const CombineInputs inputs(c, salt);
  std::vector<T> expected(static_cast<size_t>(c.tokens * c.hidden));
  reference::SharedOutput shared;
  if (c.shared != CombineCase::kNone) {
    shared = {{inputs.shared_z.data(), c.tokens, c.hidden}, inputs.shared_weights};
  }
  reference::combine(inputs.z_view, inputs.row_of_slot, inputs.weight_view, inputs.config, shared,
                     MatrixView<T>(expected.data(), c.tokens, c.hidden));

  const DeviceArray<Bf16> z(inputs.z);
  const DeviceArray<int32_t> row_of_slot(inputs.row_of_slot);
  const DeviceArray<float> weights(inputs.weights), shared_weights(inputs.shared_weights);
  const DeviceArray<Bf16> shared_z(inputs.shared_z);
  const int64_t stride = c.hidden + c.misaligned;
  for (int repeat = 0; repeat < (c.tokens < 1000 ? 20 : 2); ++repeat) {
    const DeviceArray<T> y(static_cast<size_t>(c.tokens * stride + c.misaligned));
    cuda::CombineArgs args{z.matrix(inputs.z_view.rows, c.hidden), row_of_slot.data(),
                           weights.matrix(c.tokens, c.top_k), c.weight_on_input,
                           MatrixView<T>(y.data() + c.misaligned, c.tokens, c.hidden, stride)};
    if (c.shared != CombineCase::kNone) args.shared_z = shared_z.matrix(c.tokens, c.hidden);
    if (c.shared == CombineCase::kWeighted) args.shared_weights = shared_weights.data();
    args.rows_are_known = repeat % 2 == 1;
    cuda::combine(args, nullptr);
    const std::vector<T> found = y.get();
    for (int64_t t = 0; t < c.tokens; ++t) {
      const auto row = std::span(found).subspan(static_cast<size_t>(t * stride + c.misaligned));
      const auto expected_row = std::span(expected).subspan(static_cast<size_t>(t * c.hidden));
      ASSERT_EQ(first_difference<T>(expected_row.first(static_cast<size_t>(c.hidden)),
                                    row.first(static_cast<size_t>(c.hidden))),
                -1)
          << "token " << t;
      if (c.misaligned > 0 && t + 1 < c.tokens) {
        ASSERT_TRUE(is_poison(row[static_cast<size_t>(c.hidden)])) << "token " << t;
      }
    }
  }
}

TEST(Combine, EqualsTheReferenceInEveryCase) {
  const CombineCase cases[] = {
      {0, 8, 64},
      {1, 1, 16},
      {1, 8, 7168},
      {5, 6, 2880, true},
      {100, 4, 1040, false, 100},
      {77, 9, 272, false, 40, Values::kHostile},
      {33, 8, 64, true, 5, Values::kHostile, 1},
      {131072, 2, 16},
      {50, 6, 208, false, 10, Values::kOrdinary, 0, CombineCase::kPlain},
      {50, 6, 208, true, 100, Values::kHostile, 3, CombineCase::kWeighted},
  };
  uint64_t salt = 3000;
  for (const CombineCase& c : cases) {
    check_combine<Bf16>(c, ++salt);
    check_combine<float>(c, ++salt);
  }
}

/// The sum has another order than the reference's: H roundings of at most half an ulp of a partial sum, which
/// is below |x| . |gate|, on either side; the sigmoid's slope is at most a quarter.
TEST(Combine, WeighsTheSharedExpertLikeTheReference) {
  for (const int64_t hidden : {16, 1000, 7168}) {
    constexpr int64_t kTokens = 40;
    Engine random = engine(3500 + static_cast<uint64_t>(hidden));
    const std::vector<Bf16> x = random_rows(random, kTokens, hidden, Values::kOrdinary);
    std::vector<float> gate(static_cast<size_t>(hidden));
    for (float& value : gate) value = static_cast<float>(below(random, 2001) - 1000) / 20000.0f;
    SharedExpert shared;
    shared.gate = DenseView{
        ElementType::kF32, reinterpret_cast<const std::byte*>(gate.data()), 1, hidden, 4 * hidden, {}};
    std::vector<float> expected(kTokens);
    reference::weigh_shared({x.data(), kTokens, hidden}, shared, expected);
    const DeviceArray<Bf16> device_x(x);
    const DeviceArray<float> device_gate(gate), weights(kTokens), ones(kTokens);
    cuda::weigh_shared(device_x.matrix(kTokens, hidden), device_gate.data(), weights.data(), nullptr);
    cuda::weigh_shared(device_x.matrix(kTokens, hidden), nullptr, ones.data(), nullptr);
    EXPECT_EQ(ones.get(), std::vector<float>(kTokens, 1.0f));
    const std::vector<float> found = weights.get();
    for (int64_t t = 0; t < kTokens; ++t) {
      double magnitude = 0.0;
      for (int64_t h = 0; h < hidden; ++h) {
        const auto at = static_cast<size_t>(t * hidden + h);
        magnitude += std::abs(double{static_cast<float>(x[at])} * gate[static_cast<size_t>(h)]);
      }
      const double tolerance = 0.25 * static_cast<double>(hidden) * 0x1p-23 * magnitude + 0x1p-24;
      EXPECT_NEAR(found[static_cast<size_t>(t)], expected[static_cast<size_t>(t)], tolerance);
    }
  }
}

TEST(Combine, RefusesRowsThatItCannotLoad) {
  const CombineInputs inputs({4, 2, 16}, 1);
  std::vector<float> y(4 * 16);
  const MatrixView<float> out(y.data(), 4, 16);
  const MatrixView<const Bf16> shifted(inputs.z.data() + 1, 1, 16);
  EXPECT_THROW(cuda::combine({shifted, nullptr, inputs.weight_view, false, out}, nullptr), Error);
}

/// Permute, stage to nvfp4 by token, and combine the staged rows as if they were z: every kernel of a layer
/// but its GEMMs, on fixed addresses.
class Pipeline {
 public:
  static constexpr int64_t kTokens = 60, kTopK = 4, kHidden = 528, kExperts = 9, kSlots = kTokens * kTopK;

  void set_inputs(uint64_t salt) {
    Engine random = engine(salt);
    x_.set(random_rows(random, kTokens, kHidden, Values::kOrdinary));
    std::vector<int64_t> ids(kSlots);
    const int64_t distinct = 1 + below(random, kExperts);
    for (int64_t& id : ids) id = below(random, distinct + 2) - 1;  // -1, and sometimes beyond the last
    ids_.set(ids);
    std::vector<float> weights(kSlots);
    for (float& weight : weights) weight = static_cast<float>(below(random, 100)) / 99.0f;
    weights_.set(weights);
  }

  void enqueue(void* stream) const {
    Routing routing;
    routing.topk_ids = MatrixView<const int64_t>(ids_.matrix(kTokens, kTopK));
    routing.topk_weights = weights_.matrix(kTokens, kTopK);
    cuda::permute({routing,
                   {offsets_.span(), slot_of_row_.span(), row_of_slot_.span()},
                   status_.data(),
                   scratch_.span()},
                  stream);
    cuda::StageArgs stage;
    stage.format = ActivationFormat::kNvfp4;
    stage.policy = ScalePolicy::kDynamicTensor;
    stage.source = {x_.matrix(kTokens, kHidden), slot_of_row_.data(), kTopK, {}};
    stage.group_offsets = offsets_.span();
    stage.max_rows = kSlots;
    stage.tensor_amax = amax_.data();
    stage.decoded.first = rows_.matrix(kSlots, kHidden);
    stage.decoded.row_scales = row_scales_.data();
    cuda::fill_async(amax_.data(), 0, sizeof(float), stream);
    cuda::find_amax(stage.source, stage.group_offsets, stage.max_rows, amax_.data(), stream);
    cuda::stage(stage, stream);
    cuda::combine({rows_.matrix(kSlots, kHidden), row_of_slot_.data(), routing.topk_weights, false,
                   y_.matrix(kTokens, kHidden)},
                  stream);
  }

  std::vector<Bf16> y() const { return y_.get(); }

 private:
  DeviceArray<Bf16> x_{kTokens * kHidden}, rows_{kSlots * kHidden}, y_{kTokens * kHidden};
  DeviceArray<int64_t> ids_{kSlots};
  DeviceArray<float> weights_{kSlots}, row_scales_{kSlots}, amax_{1};
  DeviceArray<int32_t> offsets_{kExperts + 1}, slot_of_row_{kSlots}, row_of_slot_{kSlots}, status_{1};
  DeviceArray<std::byte> scratch_{cuda::permute_scratch_bytes(kSlots, kExperts)};
};

TEST(Stages, CapturedOnceGiveForEveryRoutingWhatEagerCallsGive) {
  Pipeline eager, replayed;
  replayed.set_inputs(4000);
  CapturedGraph graph([&](void* stream) { replayed.enqueue(stream); });
  for (uint64_t routing = 0; routing < 50; ++routing) {
    eager.set_inputs(5000 + routing);
    eager.enqueue(nullptr);
    replayed.set_inputs(5000 + routing);
    cuda::synchronize(nullptr);
    graph.replay();
    ASSERT_EQ(eager.y(), replayed.y()) << "routing " << routing;
  }
}

}  // namespace
}  // namespace fourfold
